"""Reads questions about texts: files in the form of SQuAD, and JSON lines with one question each.

As in `tables`, a file is read whole or not at all: a mistake is a ValueError with the place of it.
"""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from tinybert_jax.data.errors import fail, short
from tinybert_jax.data.json_text import is_utf8, parse_json
from tinybert_jax.data.tables import (
    Table,
    fail_rows,
    format_by_suffix,
    read_jsonl,
    read_utf8,
)

SUFFIXES = {".json": "squad", ".jsonl": "jsonl"}


class Answer(NamedTuple):
    """A part of a text: `text` stands at the character `start`."""

    text: str
    start: int


class Questions(NamedTuple):
    """n questions."""

    questions: list[str]
    texts: list[str]  # that hold the answers
    answers: list[tuple[Answer, ...]] | None  # empty: the text has no answer; None: not read
    articles: list[str]  # equal for questions about one article, or about one text of .jsonl


def read_questions(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    is_labelled: bool = True,
    keep_blank: bool = False,
) -> Questions:
    """Reads one file of questions and, if `is_labelled`, their answers.

    `format`: `squad` (the JSON of SQuAD 1.1 and 2.0), `jsonl` (objects with question, context and
    answers, which are a list of {text, answer_start}, or {text: […], answer_start: […]}), or
    `auto`: by suffix. An answer that does not stand at its
    place in the text is looked for: the nearest place counts. `keep_blank` reads a blank question
    or text as "" instead of refusing it.

    Raises ValueError for a file that cannot be read, for blank text, and for answers that are not
    parts of their texts.
    """
    path = os.path.expanduser(os.fspath(path))
    form = format_by_suffix(path, format, SUFFIXES)
    rows = list(_articles(path) if form == "squad" else _objects(path, is_labelled))
    table = Table(path, {}, [row.place for row in rows], unit="question")
    if form == "jsonl":
        table = table._replace(unit="line")
    for name in ("question", "context"):
        values = [getattr(row, name) for row in rows]
        wrong = [
            (row.place, short(value))
            for row, value in zip(rows, values, strict=True)
            if not isinstance(value, str) or not (keep_blank or value.strip())
        ]
        fail_rows(table, f"text as {name}", wrong, "fill in or remove these questions")
    return Questions(
        [row.question if row.question.strip() else "" for row in rows],
        [row.context if row.context.strip() else "" for row in rows],
        _answers(table, rows) if is_labelled else None,
        [row.article for row in rows],
    )


class _Row(NamedTuple):
    place: int  # number of the question, or of the line, from 1
    question: Any
    context: Any
    answers: Any
    article: str


def _articles(path: str) -> Iterator[_Row]:
    """The questions of a SQuAD file, in order."""
    try:
        tree = parse_json(read_utf8(path))
    except ValueError as error:
        fail(path, "JSON in the form of SQuAD", str(error), "give .jsonl files that suffix")
    if not is_utf8(tree):
        fix = "remove or replace the escapes from \\ud800 to \\udfff that do not stand in pairs"
        fail(path, "text without halves of characters (lone surrogates)", "some", fix)
    place = 0
    for number, article in enumerate(_list(path, tree, "data", "the file"), 1):
        where = f"article {number}"
        title = article.get("title") if isinstance(article, dict) else None
        for paragraph in _list(path, article, "paragraphs", where):
            for asked in _list(path, paragraph, "qas", f"a paragraph of {where}"):
                place += 1
                if not isinstance(asked, dict):
                    fix = "write questions as objects"
                    fail(path, f"an object as question {place}", short(asked), fix)
                answers = [] if asked.get("is_impossible") else asked.get("answers")
                name = title if isinstance(title, str) and title else where
                yield _Row(place, asked.get("question"), paragraph.get("context"), answers, name)
    if not place:
        fail(path, "questions", "none", "give a file with data, paragraphs and qas")


def _list(path: str, tree: Any, key: str, where: str) -> list[Any]:
    found = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(found, list):
        got = f"{short(found)} in {where}" if isinstance(tree, dict) else short(tree)
        fail(path, f"a list {key!r}, as SQuAD has it", got, "see the form of SQuAD 1.1")
    return found


def _objects(path: str, is_labelled: bool) -> Iterator[_Row]:
    """The questions of a file of JSON lines."""
    wanted = ["question", "context", *(["answers"] if is_labelled else [])]
    table = read_jsonl(path, wanted)
    answers = table.columns.get("answers") or [None] * len(table.numbers)
    for place, question, context, own in zip(
        table.numbers, table.columns["question"], table.columns["context"], answers, strict=True
    ):
        yield _Row(place, question, context, own, str(context))


def _answers(table: Table, rows: list[_Row]) -> list[tuple[Answer, ...]]:
    form = "a list of answers, each with text and answer_start"
    found: list[tuple[Answer, ...]] = []
    wrong, lost = [], []
    for row in rows:
        pairs = _pairs(row.answers)
        if pairs is None:
            wrong.append((row.place, short(row.answers)))
            continue
        own = [_placed(text, start, row.context) for text, start in pairs]
        lost += [
            (row.place, short(text))
            for (text, _), answer in zip(pairs, own, strict=True)
            if answer is None
        ][:1]
        found.append(tuple(dict.fromkeys(answer for answer in own if answer is not None)))
    fail_rows(table, form, wrong, "an empty list says that the text has no answer")
    fix = "answers are copied out of the context: correct or remove these questions"
    fail_rows(table, "answers that are parts of their contexts", lost, fix)
    return found


def _pairs(answers: Any) -> list[tuple[str, int]] | None:
    """(text, start) of each answer in either form; None for another form."""
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list):
            return None
        if len(texts) != len(starts):
            return None
        answers = [
            {"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)
        ]
    if not isinstance(answers, list):
        return None
    pairs = []
    for answer in answers:
        if not isinstance(answer, dict):
            return None
        text, start = answer.get("text"), answer.get("answer_start")
        if not isinstance(text, str) or not text.strip() or type(start) is not int:
            return None
        pairs.append((text, start))
    return pairs


def _placed(text: str, start: int, context: str) -> Answer | None:
    """The answer at its place or, where it does not stand there, at the nearest one."""
    if start >= 0 and context.startswith(text, start):
        return Answer(text, start)
    after = context.find(text, max(start, 0))
    before = context.rfind(text, 0, max(start, 0) + len(text) - 1)
    places = [place for place in (before, after) if place >= 0]
    return Answer(text, min(places, key=lambda place: abs(place - start))) if places else None
