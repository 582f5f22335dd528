"""Errors of the text readers: one ValueError that says what was expected, what was got, the fix."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn


class LostWorkerError(RuntimeError):
    """A worker process has ended or stopped; the command line exits with status 4."""


class GateError(ValueError):
    """A gate refuses a model; the command line exits with status 3."""


def fail(where: str, expected: str, got: str, fix: str) -> NoReturn:
    """Raises ValueError; `where` is the file, option or setting at fault."""
    raise ValueError(f"{where}: expected {expected}; got {got}; fix: {fix}")


class ColumnError(ValueError):
    """A column that is not there; the message names all options and settings of columns."""

    def __init__(self, before: str, after: str):
        self.before, self.after = before, after  # the message around the options
        options = "--text, --text-pair or --label; in a config text, text_pair or label"
        super().__init__(f"{before} ({options}){after}")


def fail_column(path: str, column: str, available: list[str], hint: str = "") -> NoReturn:
    if column in available:
        fail(path, f"one column {column!r}", f"{available.count(column)}", "rename the others")
    told = f"{path}: expected a column {column!r}; got columns {listed(available)}; fix: "
    raise ColumnError(told + nearest(column, available), separator_hint(available) + hint)


@contextlib.contextmanager
def columns_named_by(options: str) -> Iterator[None]:
    """Errors about a column name these options of a command alone."""
    try:
        yield
    except ColumnError as error:
        raise ValueError(f"{error.before} ({options}){error.after}") from None


def fail_missing(path: str) -> NoReturn:
    parent = Path(path).parent
    siblings = os.listdir(parent) if parent.is_dir() else []
    fail(path, "a file or folder", "nothing", nearest(Path(path).name, siblings))


def separator_hint(names: Sequence[str]) -> str:
    """A hint if the header is a single column whose name contains another separator."""
    found = next((sep for sep in "\t;|," if len(names) == 1 and sep in names[0]), None)
    fixes = {
        "\t": "set task.format=tsv, or name it .tsv",
        ",": "set task.format=csv, or name it .csv",
        ";": "set task.format=csv, or name it .csv",
    }
    if found is None:
        return ""
    fix = fixes.get(found, "separate them by commas or tabs")
    return f"; columns seem to be separated by {found!r}: {fix}"


def fix_of_csv(first_line: str) -> str:
    """A fix for a .csv file with broken rows: another separator, or quotes inside of fields."""
    if re.fullmatch(r'"[^",]*"(?:[|\t]"[^",]*")+', first_line):
        return separator_hint([first_line]).removeprefix("; ")
    return 'double every quote inside a quoted field (""), close the field; or format="tsv"'


def nearest(name: str, names: Sequence[str]) -> str:
    """A fix for a misspelt name."""
    # 0.7: more than a shared suffix. Among many names the search would take minutes.
    close = difflib.get_close_matches(name, names[:_MOST_COMPARED], 1, 0.7)
    return f"did you mean {close[0]!r}?" if close else "check the name"


_MOST_COMPARED = 1000


def listed(names: Sequence[str]) -> str:
    """The names, or of many the first 20."""
    return ", ".join(map(short, names[:20])) + ", …" * (len(names) > 20)


def short(value: Any) -> str:
    """`repr` of a value, cut at 60 characters."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} that is nested too deeply"
    return text if len(text) <= 60 else text[:59] + "…"


@contextlib.contextmanager
def prefix_errors(origin: str) -> Iterator[None]:
    """Prefixes the message of a ValueError with `origin`, such as a place in the config."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
