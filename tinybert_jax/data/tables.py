"""Owns reading raw text from disk or the hub: labelled tables and plain corpora. No tokens.

A source is read whole or not at all: what is wrong with it becomes one ValueError that says what
was expected, what was got and where (file, line, the first five places) and how to fix it.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinybert_jax.data.csv_rows import Rows, read_csv_rows
from tinybert_jax.data.encoding import check_utf16, conversion_of_bytes
from tinybert_jax.data.errors import (
    fail,
    fail_column,
    fail_missing,
    listed,
    nearest,
    short,
)
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.json_text import is_utf8, parse_json


def read_labelled(
    path: str | os.PathLike[str],
    *,
    text: str,
    text_pair: str | None = None,
    label: str | None,
    labels: Mapping[str, str] | Sequence[str] | None = None,
    numbers: bool = False,
    format: str = "auto",
    split: str | None = None,
    max_rows: int | None = None,
    keep_blank: bool = False,
) -> Examples:
    """Reads one table of texts and, unless `label` is None, their labels.

    `path`: .tsv (no quoting), .csv (standard quoting; semicolons between columns where the first
    line has no comma), .jsonl, a folder saved by `datasets`, or
    `hub:owner/name[:config]`; `split` belongs to the last two. `text`, `text_pair` and `label` name
    columns. In a TSV or CSV without header all of them are positions ("0", "3"), and a row may have
    further columns to their right.

    `labels`: raw values in id order, or raw value -> class name in id order (raw values of one name
    share its id); None: the classes that a data set declares, else the sorted raw values. Raw
    values compare as `str(value)`. `max_rows` keeps the first rows; all rows are checked and
    counted all the same, so that class ids do not depend on it. `keep_blank` reads a blank or
    missing text as "", which is refused otherwise.

    Raises ValueError for all that is wrong with the source or the arguments.
    """
    path, known = os.path.expanduser(os.fspath(path)), _known_labels(labels)
    if numbers and known is not None:
        fail("labels", "none for labels that are numbers", repr(labels), "drop one")
    if max_rows is not None and max_rows < 1:
        fail("max_rows", "1 or more", str(max_rows), "leave it out to read all rows")
    wanted = [column for column in (text, text_pair, label) if column is not None]
    table = read_table(path, format_of(path, format), split, wanted)

    read_texts = texts_or_blank if keep_blank else texts_in
    texts = read_texts(table, text)
    pairs = None if text_pair is None else read_texts(table, text_pair)
    values, names = None, None if known is None else tuple(dict.fromkeys(known.values()))
    if label is not None and numbers:
        values = _numbers(table, label)
    elif label is not None:
        values, names = _class_ids(table, label, known)
    return Examples(
        text=texts[:max_rows],
        text_pair=None if pairs is None else pairs[:max_rows],
        labels=None if values is None else values[:max_rows],
        label_names=names,
    )


_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a character, as JSON may escape it


class Table(NamedTuple):
    """Columns of raw values, and where each row is in the source."""

    path: str
    columns: dict[str, list[Any]]  # raw values of the wanted columns, None where missing
    numbers: Sequence[int]  # each row's line in the file, or row in the data set, from 1
    unit: str = "line"
    class_names: Sequence[str] | None = None  # as declared by a data set, in id order


def _known_labels(labels: Mapping[str, str] | Sequence[str] | None) -> dict[str, str] | None:
    """Raw value -> class name."""
    if labels is None:
        return None
    if isinstance(labels, str) or not labels:
        fail("labels", "a list or a mapping of raw values", repr(labels), "as in ['no', 'yes']")
    pairs = labels.items() if isinstance(labels, Mapping) else zip(labels, labels, strict=True)
    known = {str(raw): str(name) for raw, name in pairs}
    if len(known) < len(labels):
        fail("labels", "every raw value once", repr(labels), "drop the repeated ones")
    return known


def format_of(path: str, format: str) -> str:
    formats = ["tsv", "csv", "jsonl", "datasets"]
    if format not in ("auto", *formats):
        fail(path, f"format auto, {', '.join(formats)}", repr(format), nearest(format, formats))
    if path.startswith("hub:"):
        if format not in ("auto", "datasets"):
            fail(path, "format auto for a hub id", repr(format), "leave format out")
        return "hub"
    if not os.path.exists(path):
        fail_missing(path)
    is_folder, suffix = os.path.isdir(path), Path(path).suffix
    if format == "auto":
        format = "datasets" if is_folder else suffix.lower().removeprefix(".")
    if format not in formats:
        got = f"the suffix {suffix!r}" if suffix else "no suffix"
        fix = "name it .tsv, .csv or .jsonl by what it holds, or in a config set task.format"
        if suffix.lower() in (".json", ".parquet", ".xlsx"):
            fix = "convert it, as pandas does by to_json(PATH, orient='records', lines=True)"
        fail(path, "a .tsv, .csv or .jsonl file or a folder saved by datasets", got, fix)
    if is_folder != (format == "datasets"):
        expected = "a folder saved by datasets" if format == "datasets" else f"a {format} file"
        fail(path, expected, "a folder" if is_folder else "a file", "correct path or format")
    return format


def format_by_suffix(path: str, format: str, suffixes: Mapping[str, str]) -> str:
    """The format of a single file: the one given, or with `auto` the one of its suffix.

    `suffixes`: suffix -> format. Raises ValueError for another format or suffix, or no file.
    """
    formats = sorted(set(suffixes.values()))
    if format not in ("auto", *formats):
        fail(path, f"format auto, {', '.join(formats)}", repr(format), nearest(format, formats))
    if not os.path.exists(path):
        fail_missing(path)
    if os.path.isdir(path):
        fail(path, "a file", "a folder", "name one of the files in it")
    suffix = Path(path).suffix
    if format == "auto" and suffix.lower() not in suffixes:
        got = f"the suffix {suffix!r}" if suffix else "no suffix"
        fail(path, f"a suffix of {', '.join(suffixes)}", got, "rename the file or give format")
    return suffixes[suffix.lower()] if format == "auto" else format


def read_table(path: str, format: str, split: str | None, wanted: list[str]) -> Table:
    """The wanted columns of a file of one of the formats that `format_of` tells."""
    if format in ("hub", "datasets"):
        return _read_dataset(path, split, wanted)
    if split is not None:
        fail(path, f"no split: a {format} file has none", repr(split), "leave split out")
    if format == "jsonl":
        return read_jsonl(path, wanted)
    return _by_column(path, read_rows(path, format, wanted), wanted)


def read_rows(path: str, format: str, wanted: Sequence[str] = ()) -> Rows:
    """The rows of a .csv or .tsv file; `wanted`: see `column_separator`."""
    if format == "csv":
        return read_csv_rows(path, read_utf8(path), wanted)
    rows = [line.split("\t") for line in split_lines(read_utf8(path))]
    return Rows(rows, range(1, len(rows) + 1), "\t")


def _by_column(path: str, read: Rows, wanted: list[str]) -> Table:
    """Splits off the header, unless columns are positions, and checks every row's width."""
    rows, numbers = read.fields, read.numbers
    num_positions = sum(column.isdecimal() for column in wanted)
    if 0 < num_positions < len(wanted):
        fix = "without a header give every column as a position; with one, every name"
        fail(path, "columns all named or all positions", ", ".join(wanted), fix)
    if num_positions:
        places = [int(column) for column in wanted]
        amount, allowed = f"at least {max(places) + 1}", range(max(places) + 1, sys.maxsize)
    else:
        header, rows, numbers = rows[0], rows[1:], numbers[1:]
        counts = Counter(header)
        for column in wanted:
            if counts[column] != 1:
                fail_column(path, column, header, "; without a header give '0', '1' …")
        place_of = {column: place for place, column in enumerate(header)}
        places = [place_of[column] for column in wanted]
        amount, allowed = f"{len(header)}", range(len(header), len(header) + 1)
    if not rows:
        fail(path, "rows", "no rows, only a header", "check how the file was written")
    table = Table(path, {}, numbers)
    ragged = [(n, f"{len(r)}") for n, r in zip(numbers, rows, strict=True) if len(r) not in allowed]
    fix = "look for stray tabs, line breaks or missing fields; is the separator right?"
    fail_rows(table, f"{amount} columns in every row", ragged, fix)
    for column, place in zip(wanted, places, strict=True):
        table.columns[column] = [row[place] for row in rows]
    return table


def read_jsonl(path: str, wanted: list[str] | None) -> Table:
    """The wanted keys of a file with an object on each line; None: those that every row has."""
    lines = split_lines(read_utf8(path))
    rows, broken, halves = [], [], []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
        except ValueError as error:
            broken.append((number, f"{error} in {short(line[:99])}"))
            continue
        rows.append(row)
        if not isinstance(row, dict):
            broken.append((number, short(row)))
        elif _HALF.search(line) and not all(is_utf8(row.get(name)) for name in wanted or row):
            halves.append((number, short(line[:99])))
    table = Table(path, {}, range(1, len(lines) + 1))
    fix = "write one object a line, {...}; join an object that is spread over several lines"
    fail_rows(table, "one JSON object on every line", broken, fix)
    fix = "remove or replace the escapes from \\ud800 to \\udfff that do not stand in pairs"
    fail_rows(table, "text without halves of characters (lone surrogates)", halves, fix)
    if wanted is None:
        wanted = [key for key in rows[0] if all(key in row for row in rows)]
    for column in wanted:
        missing = [(n, short(list(row))) for n, row in enumerate(rows, 1) if column not in row]
        if len(missing) == len(rows):
            fail_column(path, column, list(rows[0]))
        fail_rows(table, f"a key {column!r}", missing, "complete or remove these rows")
        table.columns[column] = [row[column] for row in rows]
    return table


def _read_dataset(path: str, split: str | None, wanted: list[str]) -> Table:
    data = load_dataset(path, split, wanted)
    class_names = getattr(data.features[wanted[-1]], "names", None)  # the label comes last
    try:
        columns = data.with_format(None).select_columns(list(dict.fromkeys(wanted)))[:]
    except UnicodeDecodeError as error:
        fail(path, "UTF-8", f"{error}", "save the data set again")
    return Table(path, columns, range(1, len(data) + 1), "row", class_names)


# What `datasets` raises for files of JSON with other values, or values nested too deeply.
_LIBRARY_ERRORS = (TypeError, KeyError, AttributeError, RecursionError)


def load_dataset(path: str, split: str | None, wanted: list[str]) -> Any:
    """A `datasets.Dataset` with the wanted columns, from a saved folder or `hub:owner/name`."""
    import datasets

    hub_id = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?::([^:]+))?", path)
    if path.startswith("hub:") and not hub_id:
        fail(path, "hub:owner/name or hub:owner/name:config", path, "as in hub:nyu-mll/glue:sst2")
    options: dict[str, Any] = {"split": split}
    data: Any
    try:
        if hub_id:
            data = datasets.load_dataset(*hub_id.groups(), **options)
        else:
            data = datasets.load_from_disk(path)
    except (OSError, ValueError, *_LIBRARY_ERRORS) as error:
        source = "a data set on the hub" if hub_id else "a folder written by save_to_disk"
        fix = "check name, split and connection" if hub_id else "save it with save_to_disk"
        fail(path, source, f"{type(error).__name__}: {error}", fix)
    if isinstance(data, dict):
        if split not in data:
            fail(path, f"one of the splits {', '.join(data)}", repr(split), "give split")
        data = data[split]
    elif not hub_id and split not in (None, str(data.split)):
        fail(path, f"split {data.split}, the only one here", repr(split), "leave split out")
    for column in wanted:
        if column not in data.column_names:
            fail_column(path, column, data.column_names)
    if not len(data):
        fail(path, "rows", "no rows", "check how the data set was saved")
    return data


def read_utf8(path: str) -> str:
    content = Path(path).read_bytes()
    check_utf16(path, content)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        _fail_bytes(path, content)
        raise
    text = text.removeprefix("\ufeff").removeprefix("\u00ef\u00bb\u00bf")  # the same, encoded twice
    if not text.strip():
        got = "nothing but white space" if text else "an empty file"
        fail(path, "text", got, "check how the file was written")
    return text


def _fail_bytes(path: str, content: bytes) -> None:
    wrong, offset = [], 0
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            wrong.append((number, f"0x{line[error.start]:02x} at byte {offset + error.start}"))
        offset += len(line) + 1
    table = Table(path, {}, range(content.rstrip(b"\n").count(b"\n") + 1))
    fail_rows(table, "UTF-8", wrong, conversion_of_bytes(path, content))


def split_lines(text: str) -> list[str]:
    r"""By \n alone, since texts hold U+0085, U+2028 and the like; blank lines at the end go."""
    return [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]


def texts_in(table: Table, column: str) -> list[str]:
    values = table.columns[column]
    wrong = [
        (n, short(value))
        for n, value in zip(table.numbers, values, strict=True)
        if not isinstance(value, str) or not value.strip()
    ]
    fail_rows(table, f"text in column {column!r}", wrong, "fill in or remove these rows")
    return values


def texts_or_blank(table: Table, column: str) -> list[str]:
    values = [value if value is not None else "" for value in table.columns[column]]
    wrong = [
        (n, short(value))
        for n, value in zip(table.numbers, values, strict=True)
        if not isinstance(value, str)
    ]
    fail_rows(table, f"text in column {column!r}", wrong, "fill in or remove these rows")
    return [value if value.strip() else "" for value in values]


def _numbers(table: Table, column: str) -> np.ndarray:
    numbers, wrong, largest = [], [], float(np.finfo(np.float32).max)
    for n, value in zip(table.numbers, table.columns[column], strict=True):
        try:
            numbers.append(float("nan" if isinstance(value, bool) else value))
        except (TypeError, ValueError, OverflowError):
            numbers.append(float("nan"))
        if not abs(numbers[-1]) <= largest:
            wrong.append((n, short(value)))
    fix = "correct or remove these rows; for classes set task.kind=classification"
    if wrong and any("," in got for _, got in wrong):
        fix = f"write 3.5 for 3,5; or {fix}"
    fail_rows(table, f"a finite number in label column {column!r}", wrong, fix)
    return np.array(numbers, np.float32)


def _class_ids(
    table: Table, column: str, known: dict[str, str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    several = [
        (n, short(value))
        for n, value in zip(table.numbers, table.columns[column], strict=True)
        if isinstance(value, list | dict)
    ]
    fix = "write text or a number; for several labels a row set task.kind=multi_label"
    fail_rows(table, f"one label a row in column {column!r}", several, fix)
    raw = ["" if value is None else str(value) for value in table.columns[column]]
    missing = [(n, "none") for n, value in zip(table.numbers, raw, strict=True) if not value]
    fix = "fill in or remove these rows; give no label column to read unlabelled text"
    fail_rows(table, f"a label in column {column!r}", missing, fix)
    if table.class_names is not None:  # the column holds ids of classes
        named = {str(i): name for i, name in enumerate(table.class_names)}
        if known is None:
            known = named
        elif set(named.values()) <= known.keys() or not named.keys() & known.keys():
            raw = [named.get(value, value) for value in raw]
    if known is None:
        found = set(raw)
        integers = all(re.fullmatch(r"-?\d{1,999}", value) for value in found)
        known = {v: v for v in sorted(found, key=lambda v: (int(v) if integers else 0, v))}
    unknown = [(n, short(v)) for n, v in zip(table.numbers, raw, strict=True) if v not in known]
    fix = "correct these rows, leave out what a model cannot answer, or complete `labels`"
    expected = f"one of the labels {listed(list(known))} in column {column!r}"
    fail_rows(table, expected, unknown, fix)
    names = tuple(dict.fromkeys(known.values()))
    places = {name: place for place, name in enumerate(names)}
    return np.array([places[known[value]] for value in raw], np.int32), names


def fail_rows(table: Table, expected: str, wrong: list[tuple[int, str]], fix: str) -> None:
    """Fails if any row is wrong, naming the first five and the number of all."""
    if wrong:
        places = ", ".join(f"{table.unit} {number}: {got}" for number, got in wrong[:5])
        more = ", …" * (len(wrong) > 5)
        got = f"other in {len(wrong)} of {len(table.numbers)} {table.unit}s ({places}{more})"
        fail(table.path, expected, got, fix)
