"""The columns of a file that `tinybert predict` reads, and those that it copies."""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from tinybert_jax.config.tasks import TextTask
from tinybert_jax.data.errors import columns_named_by
from tinybert_jax.data.guess import guess_text
from tinybert_jax.data.tables import format_of, read_table
from tinybert_jax.huggingface.head import Head
from tinybert_jax.tasks.task import Task


def text_columns(
    data: str,
    columns: Mapping[str, Any],
    task: Task,
    head: Head,
    split: str | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The given settings, with the columns of text that the model was trained on or the file
    suggests.

    `say` is told a line where a column is chosen. Raises ValueError where several may be the text.
    """
    given = {name: column for name, column in columns.items() if column is not None}
    is_table = Path(data).suffix.lower() in (".csv", ".tsv", ".jsonl") or Path(data).is_dir()
    if "text" in given or not is_table or not issubclass(task.section, TextTask):
        return given
    file = {**given, "train_split": split}
    guess = guess_text(data, file, head.columns, reads_pairs=head.reads_pairs)
    if guess.told:
        say(f"{data}: {guess.told}; if not: --text or --text-pair")
    return {**given, **guess.settings}


def kept_columns(
    data: str | Sequence[str],
    split: str | None,
    keep: Sequence[str],
    names: Set[str],
    num_rows: int,
) -> dict[str, list[Any]]:
    """The values of the columns `keep`, for each of the `num_rows` texts.

    `names`: those of the output. Raises ValueError for a column that has one of them or is not
    there, for values that JSON does not have, and for a file with another number of rows.
    """
    if not isinstance(data, str):
        raise ValueError(f"--keep: expected a data file, got texts and {list(keep)}; remove --keep")
    with columns_named_by("--keep"):
        table = read_table(data, format_of(data, "auto"), split, list(dict.fromkeys(keep)))
    taken = [column for column in keep if column in names]
    if taken:
        raise ValueError(
            f"--keep: expected other columns than those of the output, {sorted(names)}, got "
            f"{taken}; rename them in the file"
        )
    if len(table.numbers) != num_rows:
        raise ValueError(
            f"--keep: expected a row for each of the {num_rows} texts, got {len(table.numbers)}; "
            "give a file with one text a row"
        )
    return {
        column: [_plain(value, f"{data}, row {i}, column {column!r}") for i, value in rows]
        for column, values in table.columns.items()
        for rows in [enumerate(values, 1)]
    }


def _plain(value: Any, where: str) -> Any:
    """The value as JSON has it; dates and times as text in the form of ISO 8601."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        told = f"{where}: --keep: expected a value that JSON has, got {value!r} ({error})"
        raise ValueError(f"{told}; leave the column out") from None
    return value
