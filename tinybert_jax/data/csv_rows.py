"""Owns the rows of a .csv file: standard quoting, and commas or semicolons between columns."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tinybert_jax.data.errors import fail, fix_of_csv

# Up to a line break outside of quotes. Possessive: a quote that is not closed costs no memory.
_HEADER = re.compile(r'(?:"(?:[^"]|"")*+"|[^"\n])*+')
_QUOTED = re.compile(r'"(?:[^"]|"")*+"')
_LONGEST = 1 << 20  # characters of a first line


class Rows(NamedTuple):
    """The fields of every row, header included."""

    fields: list[list[str]]
    numbers: Sequence[int]  # each row's line in the file, from 1
    separator: str


def read_csv_rows(path: str, text: str, wanted: Sequence[str] = ()) -> Rows:
    """The rows of the text of `path`; see `column_separator` for what is between columns.

    Raises ValueError with the line of a broken row.
    """
    return _read(path, text, column_separator(text[:_LONGEST], wanted))


def first_record(lines: Iterator[str]) -> list[str]:
    """The first line of a .csv file, and the lines that its quoted line breaks take along."""
    found = [next(lines, "")]
    num_quotes, length = found[0].count('"'), len(found[0])
    while num_quotes % 2 and length < _LONGEST and (more := next(lines, "")):
        found.append(more)
        num_quotes, length = num_quotes + more.count('"'), length + len(more)
    return found


def column_separator(text: str, wanted: Sequence[str] = ()) -> str:
    """';' where the first line of a .csv file has one and no comma, both outside quotes; else ','.

    Where the first column alone is `wanted` by its position, and where the first line is one of the
    columns that are `wanted`, the file has a single column, and semicolons are text.
    """
    if set(wanted) == {"0"}:
        return ","
    match = _HEADER.match(text)
    header = match[0].strip() if match else ""
    bare = _QUOTED.sub("", header)
    return ";" if ";" in bare and "," not in bare and header not in wanted else ","


def _read(path: str, text: str, separator: str) -> Rows:
    lines = io.StringIO(text.rstrip("\r\n"), newline="")
    reader = csv.reader(lines, delimiter=separator, strict=True)
    rows, numbers, start = [], [], 1
    limit = csv.field_size_limit(2**31 - 1)  # the default cuts off at 128 KiB
    try:
        for row in reader:
            rows.append(row)
            numbers.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        fix = fix_of_csv(text.split("\n", 1)[0].strip())
        fail(f"{path}, line {start}", "a CSV row", f"a broken one ({error})", fix)
    finally:
        csv.field_size_limit(limit)
    return Rows(rows, numbers, separator)
