"""Owns reading tagged text from disk: sentences of words with one tag per word. No word pieces.

As in `tables`, a file is read whole or not at all: every mistake of one sort becomes one
ValueError with what was expected, what was got, the first five places and the fix.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tinybert_jax.data.errors import fail, listed, short
from tinybert_jax.data.tables import (
    Table,
    fail_rows,
    format_by_suffix,
    read_jsonl,
    read_utf8,
    split_lines,
)
from tinybert_jax.metrics.tagging import SCHEME_RULES, Scheme, is_tag, scheme_mistakes

SUFFIXES = {
    ".jsonl": "jsonl",
    **dict.fromkeys([".conll", ".txt", ".tsv", ".iob", ".iob2", ".bio", ".bioes"], "conll"),
}


class TaggedText(NamedTuple):
    """The sentences of a tagging task: n lists of words, n lists of tags, n line numbers."""

    words: list[list[str]]  # no word is empty or white space alone
    tags: list[list[str]] | None  # as in the file, one per word; None: unlabelled
    places: list[int]  # the line of the file on which each sentence starts, from 1


def read_tagged(
    path: str | os.PathLike[str],
    *,
    tokens: str = "auto",
    tags: str | None = "auto",
    format: str = "auto",
    scheme: Scheme | None = None,
    plain: bool = False,
    known_tags: Sequence[str] | None = None,
    drop_empty_tokens: bool = False,
    keep_empty_sentences: bool = False,
    max_rows: int | None = None,
) -> TaggedText:
    """Reads one file of sentences and, unless `tags` is None, the tags of their words.

    `format`: `conll` (one word a line, columns separated by tabs or by spaces, sentences by blank
    lines or -DOCSTART- lines; in files with tabs, lines with "# " and no tab are comments), `jsonl`
    (one object a line that holds a list of words and a list of tags), or `auto`: by suffix.
    `tokens` and `tags`: positions of columns ("0" first, "-1" last) or keys of the objects; `auto`
    is the first and the last column, or the keys "tokens" and "tags".

    Tags are O, or B-, I-, E- or S- and a kind; `plain` ones are any words. With `scheme` every
    sentence must be well-formed in it, with `known_tags` every tag must be one of them; neither is
    used where `tags` is None. `drop_empty_tokens` leaves out words of white space alone that are
    tagged O or not tagged. `keep_empty_sentences` reads a sentence without words instead of
    refusing it.
    `max_rows` keeps the first sentences; all are checked all the same.

    Raises ValueError for all that is wrong with the file or the arguments.
    """
    path = os.path.expanduser(os.fspath(path))
    if isinstance(known_tags, str) or (known_tags is not None and not known_tags):
        fail("known_tags", "a list of tags", repr(known_tags), "as in ['O', 'B-PER', 'I-PER']")
    if max_rows is not None and max_rows < 1:
        fail("max_rows", "1 or more", str(max_rows), "leave it out to read all sentences")
    if format_by_suffix(path, format, SUFFIXES) == "jsonl":
        found = _read_objects(path, tokens, tags)
    else:
        found = _read_columns(path, tokens, tags)
    if drop_empty_tokens:
        found = _without_empty_tokens(found)
    _check_words(found, keep_empty_sentences)
    if found.tags is not None:
        _check_tags(found, found.tags, scheme, plain, known_tags)
    return TaggedText(
        words=found.words[:max_rows],
        tags=None if found.tags is None else found.tags[:max_rows],
        places=found.places[:max_rows],
    )


class _Sentences(NamedTuple):
    path: str
    words: list[list[str]]
    tags: list[list[str]] | None
    places: list[int]  # each sentence's first line
    lines: list[list[int]]  # each word's line


def _read_objects(path: str, tokens: str, tags: str | None) -> _Sentences:
    """The sentences of a JSONL file, each on the line of its object."""
    token_key = "tokens" if tokens == "auto" else tokens
    tag_key = "tags" if tags == "auto" else tags
    table = read_jsonl(path, [token_key] if tag_key is None else [token_key, tag_key])
    for key, values in table.columns.items():
        wrong = [
            (n, short(value))
            for n, value in zip(table.numbers, values, strict=True)
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value)
        ]
        fix = 'write words and tags as in ["In", "Rome"] and ["O", "B-LOC"], not as ids'
        fail_rows(table, f"a list of strings under the key {key!r}", wrong, fix)
    words = table.columns[token_key]
    if tag_key is not None:
        pairs = zip(table.numbers, words, table.columns[tag_key], strict=True)
        wrong = [(n, f"{len(t)} for {len(w)}") for n, w, t in pairs if len(t) != len(w)]
        fail_rows(table, "one tag for each token", wrong, "correct or remove these rows")
    return _Sentences(
        path,
        words,
        None if tag_key is None else table.columns[tag_key],
        list(table.numbers),
        [[n] * len(w) for n, w in zip(table.numbers, words, strict=True)],
    )


def _read_columns(path: str, tokens: str, tags: str | None) -> _Sentences:
    """The sentences of a CoNLL file."""
    blocks = _blocks(path)
    rows = [row for block in blocks for row in block]
    table = Table(path, {}, [number for number, _ in rows])
    width = Counter(len(columns) for _, columns in rows).most_common(1)[0][0]
    ragged = [(n, f"{len(columns)}") for n, columns in rows if len(columns) != width]
    fix = 'look for stray or missing separators; "# " starts a comment only in files with tabs'
    fail_rows(table, f"{width} columns in every row, as in most", ragged, fix)
    token_place = _position(path, "0" if tokens == "auto" else tokens, width)
    tag_place = None if tags is None else _position(path, "-1" if tags == "auto" else tags, width)
    if tag_place == token_place:
        got = f"column {token_place} of {width} for both"
        fix = "name another column, or for text without tags give tags=None"
        fail(path, "a column of tokens and another of tags", got, fix)
    return _Sentences(
        path,
        [[columns[token_place] for _, columns in block] for block in blocks],
        None if tag_place is None else [[c[tag_place] for _, c in block] for block in blocks],
        [block[0][0] for block in blocks],
        [[number for number, _ in block] for block in blocks],
    )


def _blocks(path: str) -> list[list[tuple[int, list[str]]]]:
    """Each sentence's rows: the line, from 1, and the columns."""
    lines = list(enumerate(split_lines(read_utf8(path)), 1))
    has_tabs = _has_tabs(line for _, line in lines if not _is_boundary(line))
    if has_tabs:  # in a file with spaces "# O" is a word and its tag
        lines = [(n, line) for n, line in lines if "\t" in line or not line.startswith("# ")]
    by_boundary = itertools.groupby(lines, key=lambda row: _is_boundary(row[1]))
    blocks = [list(block) for is_boundary, block in by_boundary if not is_boundary]
    if not blocks:
        got = "blank lines, comments and -DOCSTART- lines alone"
        fail(path, "sentences", got, "check how the file was written")
    rows = [row for block in blocks for row in block]
    wrong = [(n, short(line)) for n, line in rows if ("\t" in line) != has_tabs]
    expected = f"columns separated by {'tabs' if has_tabs else 'spaces'} in every row, as in most"
    fail_rows(Table(path, {}, [n for n, _ in rows]), expected, wrong, "use one separator")
    return [[(n, _columns(line, has_tabs)) for n, line in block] for block in blocks]


def _is_boundary(line: str) -> bool:
    return not line.strip(" \t") or re.match(r"-DOCSTART-([ \t]|$)", line) is not None


def _has_tabs(lines: Iterable[str]) -> bool:
    """Whether most lines that are no comments have tabs."""
    counts = Counter("\t" in line for line in lines if "\t" in line or not line.startswith("# "))
    return counts[True] > counts[False]


def _columns(line: str, has_tabs: bool) -> list[str]:
    if has_tabs:
        return line.split("\t")
    return [column for column in line.split(" ") if column]  # some files align with spaces


def _position(path: str, column: str, width: int) -> int:
    if not re.fullmatch(r"-?\d+", column):
        fix = "a CoNLL file has no header; count columns from 0, or back from -1"
        fail(path, "a position as the column", repr(column), fix)
    if not -width <= int(column) < width:
        fix = "count columns from 0, or back from -1"
        fail(path, f"a column from {-width} to {width - 1}", repr(column), fix)
    return int(column) % width


def _without_empty_tokens(found: _Sentences) -> _Sentences:
    """Leaves out words of white space alone, unless a part of an entity would go with them."""
    tags = found.tags or [["O"] * len(words) for words in found.words]
    kept = [
        [bool(word.strip()) or tag != "O" for word, tag in zip(*pair, strict=True)]
        for pair in zip(found.words, tags, strict=True)
    ]

    def keep(rows: list[list]) -> list[list]:
        return [list(itertools.compress(*pair)) for pair in zip(rows, kept, strict=True)]

    return found._replace(
        words=keep(found.words),
        tags=None if found.tags is None else keep(found.tags),
        lines=keep(found.lines),
    )


def _check_words(found: _Sentences, keep_empty_sentences: bool) -> None:
    places = zip(found.places, found.words, strict=True)
    empty = [(place, "none") for place, words in places if not words]
    table = Table(found.path, {}, found.places)
    if not keep_empty_sentences:
        fail_rows(table, "at least one token in every sentence", empty, "remove these sentences")
    blank = [(n, short(word)) for n, word in _flat(found.lines, found.words) if not word.strip()]
    fix = "fill in or remove these tokens; drop_empty_tokens leaves out those tagged O"
    _fail_words(found, "a token that is not empty in every row", blank, fix)


def _check_tags(
    found: _Sentences,
    tags: list[list[str]],
    scheme: Scheme | None,
    plain: bool,
    known_tags: Sequence[str] | None,
) -> None:
    pairs = list(_flat(found.lines, tags))
    wrong = [(n, short(tag)) for n, tag in pairs if not (tag.strip() if plain else is_tag(tag))]
    fix = "correct these tags, or name the column or key that holds tags"
    expected = "tags that are O, or B-, I-, E- or S- and a kind"
    if plain:
        expected = "a tag for every token"
    else:
        fix += "; tags without such prefixes have task.scheme plain"
    _fail_words(found, expected, wrong, fix)
    if known_tags is not None:
        known = set(known_tags)
        unknown = [(n, short(tag)) for n, tag in pairs if tag not in known]
        fix = "correct these tags or complete the list of tags"
        _fail_words(found, f"one of the tags {listed(known_tags)}", unknown, fix)
    if scheme is not None:
        wrong = [
            (numbers[position], got)
            for numbers, row in zip(found.lines, tags, strict=True)
            for position, got in scheme_mistakes(row, scheme)
        ]
        expected = f"{scheme} tags ({SCHEME_RULES[scheme]})"
        _fail_words(found, expected, wrong, "correct these tags or name the scheme of the file")


def _flat(lines: list[list[int]], values: list[list[str]]) -> Iterator[tuple[int, str]]:
    for pair in zip(lines, values, strict=True):
        yield from zip(*pair, strict=True)


def _fail_words(found: _Sentences, expected: str, wrong: list[tuple[int, str]], fix: str) -> None:
    """Fails if any word is wrong, naming the first wrong one of each line."""
    if wrong:
        first = dict(reversed(wrong))
        numbers = sorted({number for row in found.lines for number in row})
        fail_rows(Table(found.path, {}, numbers), expected, sorted(first.items()), fix)
