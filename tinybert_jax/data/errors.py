"""How the readers of text say what is wrong: expected, got, and the fix, in one ValueError."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


def fail(where: str, expected: str, got: str, fix: str) -> NoReturn:
    raise ValueError(f"{where}: expected {expected}; got {got}; fix: {fix}")


def fail_column(path: str, column: str, available: list[str], hint: str = "") -> NoReturn:
    if column in available:
        fail(path, f"one column {column!r}", f"{available.count(column)}", "rename the others")
    columns = ", ".join(map(short, available))
    where = " (--text, --text-pair or --label; in a config text, text_pair or label)"
    fix = nearest(column, available) + where + _parted_otherwise(available) + hint
    fail(path, f"a column {column!r}", f"columns {columns}", fix)


def fail_missing(path: str) -> NoReturn:
    parent = Path(path).parent
    siblings = os.listdir(parent) if parent.is_dir() else []
    fail(path, "a file or folder", "nothing", nearest(Path(path).name, siblings))


def _parted_otherwise(names: Sequence[str]) -> str:
    """A hint, where the only column's name holds the sign that seems to part several."""
    found = next((sign for sign in "\t;|," if len(names) == 1 and sign in names[0]), None)
    fixes = {
        "\t": "set task.format=tsv, or name it .tsv",
        ",": "set task.format=csv, or name it .csv",
    }
    if found is None:
        return ""
    return f"; columns seem to be parted by {found!r}: {fixes.get(found, 'write commas or tabs')}"


def nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, 1, 0.7)  # a shared suffix is not enough
    return f"did you mean {close[0]!r}?" if close else "check the name"


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
