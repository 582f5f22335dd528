"""Owns the rows of a .csv file: standard quoting, and commas or semicolons between columns."""

import csv
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from tinybert_jax.data.errors import fail, fix_of_csv

_HEADER = re.compile(r'(?:"(?:[^"]|"")*"|[^"\n])*')  # up to a line break outside of quotes
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


class Rows(NamedTuple):
    """The fields of every row, header included."""

    fields: list[list[str]]
    numbers: Sequence[int]  # each row's line in the file, from 1
    separator: str


def read_csv_rows(path: str, text: str, wanted: Sequence[str] = ()) -> Rows:
    """The rows of the text of `path`; see `column_separator` for what is between columns.

    Without a header and with the first column alone `wanted`, each row has to have as many
    semicolons, or they are part of the text. Raises ValueError with the line of a broken row.
    """
    rows = _read(path, text, column_separator(text, wanted))
    if rows.separator == ";" and set(wanted) == {"0"}:
        widths = [len(fields) for fields in rows.fields]
        if len(widths) == 1 or len(set(widths)) > 1:
            return _read(path, text, ",")
    return rows


def column_separator(text: str, wanted: Sequence[str] = ()) -> str:
    """';' where the first line of a .csv file has one and no comma, both outside quotes; else ','.

    A first line that is one of the columns that are `wanted` is the name of a single column.
    """
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
