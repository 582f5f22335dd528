"""The columns of a labelled file by name, as far as they are seen before its task is known."""

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tinybert_jax.data.errors import fail
from tinybert_jax.data.json_text import parse_json
from tinybert_jax.data.tables import (
    Table,
    fail_rows,
    format_of,
    load_dataset,
    read_jsonl,
    read_rows,
    read_utf8,
    split_lines,
)

TEXT_NAMES = frozenset(
    "text sentence body content message mail email review comment utterance question query "
    "description document article abstract tweet post title subject headline".split()
)
LABEL_NAMES = frozenset(
    "label labels category categories class classes intent folder topic topics sentiment target "
    "tag tags genre type department stars rating score similarity relevance y".split()
)


class Columns(NamedTuple):
    """The columns of a file by name; by position where it has no line of names."""

    path: str
    values: dict[str, list[Any]]
    class_names: dict[str, int] = {}  # column -> classes that a data set declares for it
    settings: dict[str, Any] = {}  # how the file is read
    note: str = ""  # what else was seen

    def others(self, *names: str | None) -> list[str]:
        return [name for name in self.values if name not in names]


def read_columns(path: str, given: Mapping[str, Any]) -> Columns:
    form = format_of(path, given.get("format", "auto"))
    if form in ("hub", "datasets"):
        return _read_dataset(path, given)
    if form == "jsonl":
        rows = _read_objects(path)
        counts = collections.Counter(key for row in rows for key in row)
        named = {given.get(name) for name in ("text", "text_pair", "label")}
        named |= set(given.get("label_columns") or ())
        keys = [key for key, count in counts.items() if 2 * count > len(rows) or key in named]
        return Columns(path, {key: [row.get(key) for row in rows] for key in keys})
    rows, numbers, separator = read_rows(path, form)
    names, note = rows[0], ", columns separated by ';'" if separator == ";" else ""
    if len(rows) > 1 and len(names) not in map(len, rows[1:]):
        table = Table(path, {}, numbers[1:])
        widths = [(n, str(len(row))) for n, row in zip(table.numbers, rows[1:], strict=True)]
        fail_rows(table, f"{len(names)} columns, as in the first line", widths, _ragged_fix(names))
    rows = [row for row in rows if len(row) == len(names)]  # the reader tells of the others
    if _has_names(rows):
        rows = rows[1:]
    else:
        names = [str(place) for place in range(len(names))]
        note += " (counted from 0, as the first line is like the others)"
    if not rows:
        fix = "check how the file was written"
        if any("\r" in name for name in names):
            fix = "end its lines with LF, not with CR"
        fail(path, "rows", "no rows, only a header", fix)
    values = map(list, zip(*rows, strict=True))
    return Columns(path, dict(zip(names, values, strict=True)), note=note)


def _ragged_fix(names: list[str]) -> str:
    if not any(name.strip() for name in names):
        return "remove the blank first line: it has to name the columns"
    return "name every column in the first line, and quote a text with the separator in it (.csv)"


def _has_names(rows: list[list[str]]) -> bool:
    """Whether the first row names the columns: then it is not like the rows below.

    It is like them where a value of it is one of those that repeat in its column.
    """
    for name, *values in zip(*rows, strict=True):
        is_known = name.strip().casefold() in TEXT_NAMES | LABEL_NAMES
        if not is_known and name in values and len(set(values)) <= len(values) / 2:
            return False
    return True


def _read_dataset(path: str, given: Mapping[str, Any]) -> Columns:
    settings: dict[str, Any] = {}
    split = given.get("train_split")
    splits = Path(path) / "dataset_dict.json"
    if split is None and splits.is_file():
        names = json.loads(splits.read_text(encoding="utf-8")).get("splits", [])
        if "train" in names:
            settings["train_split"] = split = "train"
        if "validation" in names and not (given.get("dev") or given.get("dev_share")):
            settings |= {"dev": path, "dev_split": "validation"}
    elif split is None and path.startswith("hub:"):
        settings["train_split"] = split = "train"
    data = load_dataset(path, split, [])
    declared = {n: getattr(f, "names", None) for n, f in data.features.items()}
    class_names = {name: len(names) for name, names in declared.items() if names}
    return Columns(path, data.with_format(None)[:], class_names, settings)


def _read_objects(path: str) -> list[dict[str, Any]]:
    read_jsonl(path, [])  # tells of lines that are no objects
    return [parse_json(line) for line in split_lines(read_utf8(path))]


def names_of(path: str, given: Mapping[str, Any]) -> list[str]:
    """The names of a file's columns: its first line, the keys of all objects, or features."""
    form = format_of(path, given.get("format", "auto"))
    if form in ("hub", "datasets"):
        return list(load_dataset(path, given.get("train_split"), []).features)
    if form == "jsonl":
        return list(dict.fromkeys(key for row in _read_objects(path) for key in row))
    rows = read_rows(path, form).fields
    return rows[0] if rows else []
