"""Guesses the task of a labelled file, and its columns, from names and values; trains nothing.

A guess is told in one line, and every part of it can be given instead. Where two columns are as
likely, the error lists the columns.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tinybert_jax.config.tasks import (
    ClassificationTask,
    MultiLabelTask,
    QuestionAnsweringTask,
    RegressionTask,
    TaggingTask,
)
from tinybert_jax.data.conll import SUFFIXES as TAGGED_SUFFIXES
from tinybert_jax.data.errors import fail, fail_column, listed, separator_hint
from tinybert_jax.data.json_text import parse_json
from tinybert_jax.data.squad import SUFFIXES as QUESTION_SUFFIXES
from tinybert_jax.data.table_columns import LABEL_NAMES, TEXT_NAMES, Columns, names_of, read_columns
from tinybert_jax.data.tables import (
    read_jsonl,
    read_utf8,
    split_lines,
)

_CLASSES, _LISTS, _NUMBERS, _TAGS, _ANSWERS = (
    section.model_fields["kind"].default
    for section in (
        ClassificationTask,
        MultiLabelTask,
        RegressionTask,
        TaggingTask,
        QuestionAnsweringTask,
    )
)
_OTHERWISE = "if not: --text, --label, --text-pair or --task"

_SCORE_NAMES = frozenset("score similarity relevance".split())
_NUMBER_NAMES = _SCORE_NAMES | frozenset("price amount value".split())
_PAIRS = (
    ("premise", "hypothesis"),
    ("text", "text_pair"),
    ("query", "passage"),
    ("query", "document"),
    ("question", "answer"),
    ("question", "sentence"),
)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+(,\d+)?")
_TAG = re.compile(r"O|[BIES]-\S+")
_SEPARATORS = (",", ";", "|")
_MOST_IDS = 30  # integers that are classes though they are not 0, 1, 2, …


class Guess(NamedTuple):
    settings: dict[str, Any]  # of the section `task`: its kind and columns
    told: str  # the guess in a line


def guess_task(path: str, given: Mapping[str, Any]) -> Guess:
    """The task of a file that `task.train` may name; settings of the task that are `given` stay.

    Raises ValueError for a file that cannot be read, a column that is not there, and a choice
    between columns that needs a person.
    """
    path = os.path.expanduser(path)
    kind, sign = given.get("kind"), "as you say"
    if kind is None:
        kind, sign = _kind_of_form(path, given)
    if kind in (_TAGS, _ANSWERS):
        return Guess({"kind": kind}, f"{kind}, {sign}; if not: --task")
    columns = read_columns(path, given)
    if len(columns.values) == 1:
        (name,) = columns.values
        fix = separator_hint([name]).removeprefix("; ") or "check how the file was written"
        fail(path, "rows with a column of text and one of labels", f"the only column {name!r}", fix)
    text, pair = _text_columns(columns, given)
    indicators = _indicators(columns, given, kind, text, pair)
    found = {"text": text} | ({"text_pair": pair} if pair else {})
    read = f"text in column {text!r}" if not pair else f"texts in columns {text!r} and {pair!r}"
    if indicators:
        settings = {"kind": _LISTS, **found, "label_columns": indicators}
        told = f"{_LISTS}, {read}, a column of 0 and 1 for each of {listed(indicators)}"
        return Guess({**columns.settings, **settings}, f"{told}; {_OTHERWISE}")
    label = _label_column(columns, given, kind, text, pair)
    labels, amount = _kind_of_labels(columns, label, kind)
    if kind is not None and labels["kind"] != kind:
        labels, amount = {"kind": kind}, "labels"
    settings = {**labels, **found, "label": label}
    told = f"{settings['kind']}, {read}, {amount} in column {label!r}{columns.note}"
    return Guess({**columns.settings, **settings}, f"{told}; {_OTHERWISE}")


def guess_text(
    path: str, given: Mapping[str, Any], trained: Mapping[str, str], *, reads_pairs: bool | None
) -> Guess:
    """The columns of text that a model reads in a file; settings that are `given` stay.

    `trained`: the columns that the model was trained on, taken where the file has them; else
    `text`; else, for single texts, the only column with a name of text but that of labels.
    `reads_pairs`: None where there are no pairs. Raises ValueError for a file that cannot be read,
    and where no column, or several, may be the text. Columns without names are never guessed.
    """
    names = names_of(path, given)
    wanted = {name: column for name, column in trained.items() if name not in given}
    if trained and set(wanted.values()) <= set(names):
        return Guess(wanted, f"text in {_in_columns(wanted)}, as the model was trained on")
    if "text" in names:
        return Guess({}, "text in column 'text'" if trained else "")
    others = [name for name in names if name != given.get("label")]
    likely = [name for name in others if name.strip().casefold() in TEXT_NAMES]
    if reads_pairs or given.get("text_pair") or len(likely) != 1:
        shown = Columns(path, {name: [] for name in names})
        hint = "; 0, 1 … in a file without a line of names"
        _fail_choice(shown, "text", likely, hint, has_pairs=reads_pairs is not None)
    return Guess({"text": likely[0]}, f"text in {_in_columns({'text': likely[0]})}")


def _in_columns(found: Mapping[str, str]) -> str:
    named = [repr(column) for column in found.values()]
    return f"column{'s' * (len(named) > 1)} {' and '.join(named)}"


def _kind_of_form(path: str, given: Mapping[str, Any]) -> tuple[str | None, str]:
    """(kind, sign of it) of files of questions and of tags; None for tables."""
    if path.startswith("hub:") or os.path.isdir(path) or not os.path.exists(path):
        return None, ""
    suffix = Path(path).suffix.lower()
    if suffix == ".jsonl":
        return _kind_of_objects(path)
    if suffix in QUESTION_SUFFIXES and "format" not in given and not _holds_articles(path):
        fix = "write an object on each line (pandas: orient='records', lines=True) and name it"
        fail(path, "SQuAD's form in a .json file", "no key 'data'", f"{fix} .jsonl")
    if suffix in QUESTION_SUFFIXES or given.get("format") == "squad":
        return _ANSWERS, f"as {suffix} files hold SQuAD's questions"
    if suffix == ".tsv" and "format" not in given and _holds_tags(path):
        return _TAGS, "as it has a word and its tag on each line"
    if suffix != ".tsv" and suffix in TAGGED_SUFFIXES or given.get("format") == "conll":
        return _TAGS, f"as {suffix} files hold a word and its tag on each line"
    return None, ""


def _kind_of_objects(path: str) -> tuple[str | None, str]:
    columns = read_jsonl(path, None).columns
    if {"question", "context"} <= set(columns):
        return _ANSWERS, "as its rows have question and context"
    if {"tokens", "tags"} <= set(columns) and all(isinstance(v, list) for v in columns["tokens"]):
        return _TAGS, "as its rows have lists of tokens and tags"
    return None, ""


def _holds_articles(path: str) -> bool:
    """Whether a .json file may have the form of SQuAD; its reader tells of one that is broken."""
    text = read_utf8(path)
    try:
        tree = parse_json(text)
    except ValueError:
        return not text.lstrip().partition("\n")[0].rstrip().endswith("}")  # an object on a line
    return isinstance(tree, dict) and "data" in tree


def _holds_tags(path: str) -> bool:
    """Whether the lines of a .tsv end in tags of entities, and blank lines part sentences."""
    lines = split_lines(read_utf8(path))
    words = [line for line in lines if line.strip() and not line.startswith("-DOCSTART-")]
    num_tags = sum(bool(_TAG.fullmatch(line.split("\t")[-1].strip())) for line in words)
    return len(words) < len(lines) and num_tags > 0.9 * len(words)


def _text_columns(columns: Columns, given: Mapping[str, Any]) -> tuple[str, str | None]:
    """The columns of the text and of the second text, if there is one."""
    text, pair = (_given_column(columns, given, name) for name in ("text", "text_pair"))
    label = _given_column(columns, given, "label")
    if text is not None:
        return text, pair
    free = [name for name in columns.others(pair, label) if _is_text(columns.values[name])]
    by_name = {name.strip().casefold(): name for name in free}
    for first, second in [*_PAIRS, *_numbered(by_name)] if pair is None else ():
        if first in by_name and second in by_name:
            return by_name[first], by_name[second]
    named = [by_name[name] for name in by_name if name in TEXT_NAMES]
    likely = named or [name for name in free if _is_varied(name, columns.values[name])] or free
    lengths = {name: _mean_length(columns.values[name]) for name in likely}
    order = sorted(lengths, key=lambda name: -lengths[name])
    if not order or not named and len(order) > 1 and lengths[order[0]] < 2 * lengths[order[1]]:
        if pair is None and len(likely) == 2 and _has_amounts(columns, likely, label):
            return likely[0], likely[1]
        _fail_choice(columns, "text", order)
    return order[0], pair


def _has_amounts(columns: Columns, texts: Sequence[str], label: str | None) -> bool:
    """Whether the column beside two texts holds scores of them, by its name and its values."""
    beside = [label] if label else columns.others(*texts)
    if len(beside) != 1 or beside[0].strip().casefold() not in _SCORE_NAMES:
        return False
    values = [str(value).strip() for value in columns.values[beside[0]]]
    return all(map(_is_number, values)) and _are_amounts(beside[0], set(values))


def _numbered(names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names that differ in their ends 1 and 2, or a and b."""
    for name in names:
        for first, second in ("12", "ab"):
            if re.fullmatch(rf"(sentence|text|question|body|s|q).?{first}", name):
                yield name, name[:-1] + second


def _given_column(columns: Columns, given: Mapping[str, Any], name: str) -> str | None:
    column = given.get(name)
    if column is not None and str(column) not in columns.values:
        fail_column(columns.path, str(column), list(columns.values))
    return None if column is None else str(column)


def _indicators(
    columns: Columns, given: Mapping[str, Any], kind: str | None, text: str, pair: str | None
) -> list[str]:
    """The columns of 0 and 1 of a multi-label table; empty where a column holds the labels."""
    if given.get("label_columns"):
        return list(given["label_columns"])
    free = columns.others(text, pair)
    is_named = any(name.strip().casefold() in LABEL_NAMES for name in free)
    if given.get("label") or is_named or kind not in (None, _LISTS):
        return []
    found = [name for name in free if {str(v) for v in columns.values[name]} == {"0", "1"}]
    return found if len(found) > 1 else []


def _label_column(
    columns: Columns, given: Mapping[str, Any], kind: str | None, text: str, pair: str | None
) -> str:
    label = _given_column(columns, given, "label")
    if label is not None:
        return label
    free = columns.others(text, pair)
    named = [name for name in free if name.strip().casefold() in LABEL_NAMES]
    plain = [name for name in named if name.strip().casefold() in ("label", "labels")]
    candidates = plain or named or free
    if len(candidates) > 1 and not named:
        candidates = [name for name in free if _is_label(columns.values[name], kind)] or free
    if len(candidates) != 1:
        _fail_choice(columns, "label", candidates)
    return candidates[0]


def _is_label(values: Sequence[Any], kind: str | None) -> bool:
    if any(isinstance(value, list) for value in values):
        return True
    if kind == _NUMBERS:
        return all(map(_is_number, values))
    return 2 <= len(set(map(str, values))) <= len(values) / 2


def _kind_of_labels(columns: Columns, label: str, kind: str | None) -> tuple[dict[str, Any], str]:
    """(settings with the kind, what the column holds in words); `kind`: the one that is given."""
    values = columns.values[label]
    if any(isinstance(value, list) for value in values):
        return {"kind": _LISTS}, "lists of labels"
    raw = [str(value).strip() for value in values if value is not None]
    distinct = set(raw)
    classes = {"kind": _CLASSES}, f"one of {len(distinct):,} labels"
    if label in columns.class_names:
        return {"kind": _CLASSES}, f"one of {columns.class_names[label]:,} labels"
    if all(map(_is_number, distinct)):
        return ({"kind": _NUMBERS}, "numbers") if _are_amounts(label, distinct) else classes
    if kind in (None, _NUMBERS) and all(map(_DECIMAL_COMMA.fullmatch, distinct)):
        fix = "write 3.5 for 3,5; for lists of numbered labels give --task multi_label"
        fail(columns.path, f"numbers with a point in column {label!r}", "numbers with a comma", fix)
    for separator in _SEPARATORS:
        parts = {part.strip() for value in distinct for part in value.split(separator)}
        several = sum(separator in value for value in raw)
        if several >= 0.1 * len(raw) and len(parts) < len(distinct):
            told = f"lists of {len(parts):,} labels with {separator!r} between them"
            return {"kind": _LISTS, "separator": separator}, told
    return classes


def _are_amounts(label: str, distinct: set[str]) -> bool:
    """Whether numbers are amounts, not the numbers of classes."""
    numbers = [float(value) for value in distinct]
    if not all(number.is_integer() for number in numbers):
        return True
    if label.strip().casefold() in _NUMBER_NAMES and len(numbers) > 2:
        return True
    is_counted = min(numbers) in (0, 1) and max(numbers) - min(numbers) + 1 == len(numbers)
    return len(numbers) > _MOST_IDS and not is_counted


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _is_text(values: Sequence[Any]) -> bool:
    return all(isinstance(v, str | None) for v in values) and not all(map(_is_number, values))


def _is_varied(name: str, values: Sequence[Any]) -> bool:
    """Whether most values differ, as those of text do, in a column that is not named a label."""
    is_label = name.strip().casefold() in LABEL_NAMES
    return not is_label and len(set(values)) > len(values) / 2


def _mean_length(values: Sequence[Any]) -> float:
    return sum(len(value or "") for value in values) / max(len(values), 1)


def _fail_choice(
    columns: Columns,
    what: str,
    candidates: Sequence[str],
    hint: str = "",
    *,
    has_pairs: bool = True,
) -> NoReturn:
    got = f"columns {listed(list(columns.values))}"
    if 1 < len(candidates) < len(columns.values):
        got += f", of which it may be {listed(list(candidates))}"
    fix = f"give --{what} COLUMN"
    if what == "text" and len(candidates) == 2 and has_pairs:
        fix += ", and of a pair of texts --text-pair COLUMN too"
    fail(columns.path, f"one column that can be the {what}", got, fix + hint)
