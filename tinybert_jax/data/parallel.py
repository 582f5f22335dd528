"""Reads sentences and their translations, from a table or from two files of lines."""

import os
from pathlib import Path

from tinybert_jax.data.corpus import is_plain_text
from tinybert_jax.data.errors import fail, fail_missing
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.tables import (
    format_of,
    read_table,
    read_utf8,
    split_lines,
    texts_or_blank,
)


def read_parallel(
    path: str,
    target_path: str | None,
    *,
    text: str,
    target: str,
    format: str = "auto",
    split: str | None = None,
    keep_blank: bool = False,
) -> Examples:
    """The sources as `text` and the targets as `text_pair`; blank sides are "".

    With `target_path` both files hold a sentence a line; otherwise `path` is a table with the
    columns `text` and `target` (names, or positions in a file without header). Raises ValueError
    for files of other numbers of lines, for a pair without any text, and for what is no table.
    """
    if target_path is not None:
        sides = [_read_lines(own) for own in (path, target_path)]
        if len(sides[0]) != len(sides[1]):
            fail(
                target_path,
                f"{len(sides[0]):,} lines, a translation for each line of {path}",
                f"{len(sides[1]):,}",
                "put the missing lines back; a blank one where there is no translation",
            )
    else:
        path = os.path.expanduser(path)
        is_lines = format == "auto" and Path(path).suffix not in (".tsv", ".csv", ".jsonl")
        if os.path.isfile(path) and (is_lines or is_plain_text(path, format)):
            fix = "name the file of its translations too, task.train_target or task.dev_target"
            fail(path, "a .tsv, .csv or .jsonl table", "another file", fix)
        table = read_table(path, format_of(path, format), split, [text, target])
        sides = [texts_or_blank(table, column) for column in (text, target)]
    blank = [number for number, pair in enumerate(zip(*sides, strict=True), 1) if not all(pair)]
    if blank and not keep_blank:
        shown = ", ".join(map(str, blank[:5]))
        fail(path, "text on both sides", f"{len(blank):,} blank rows: {shown}", "set blank: drop")
    return Examples(sides[0], sides[1], None, None)


def _read_lines(path: str) -> list[str]:
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        fail_missing(path)
    return [line.strip() for line in split_lines(read_utf8(path))]


def without_blank(examples: Examples) -> tuple[Examples, int]:
    """(the examples with text on both sides, how many were left out)."""
    pairs = zip(examples.text, examples.text_pair or [], strict=True)
    kept = [place for place, pair in enumerate(pairs) if all(side.strip() for side in pair)]
    return examples.take(kept), len(examples.text) - len(kept)


def check_sides(path: str, examples: Examples) -> None:
    """Raises ValueError where most targets are their source, as where one column is read twice."""
    pairs = list(zip(examples.text, examples.text_pair or [], strict=True))
    same = sum(source == target for source, target in pairs)
    if pairs and 2 * same > len(pairs):
        fail(
            path,
            "sources and their translations",
            f"{same:,} of {len(pairs):,} rows with the same text on both sides",
            "correct task.text and task.target (or train_target)",
        )
