"""The columns of a file that `tinybert predict` reads, and those that it copies."""

from collections.abc import Callable, Mapping, Sequence
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
    columns: Mapping[str, str | None],
    task: Task,
    head: Head,
    say: Callable[[str], None],
) -> dict[str, str]:
    """The given columns, with those of text that the model was trained on or the file suggests.

    `say` is told a line where a column is chosen. Raises ValueError where several may be the text.
    """
    given = {name: column for name, column in columns.items() if column is not None}
    is_table = Path(data).suffix.lower() in (".csv", ".tsv", ".jsonl") and Path(data).is_file()
    if "text" in given or not is_table or not issubclass(task.section, TextTask):
        return given
    guess = guess_text(data, given, head.columns, reads_pairs=head.reads_pairs)
    if guess.told:
        say(f"{data}: {guess.told}; if not: --text or --text-pair")
    return {**given, **guess.settings}


def kept_columns(
    data: str | Sequence[str],
    split: str | None,
    keep: Sequence[str],
    names: Sequence[str],
    num_rows: int,
) -> dict[str, list[Any]]:
    """The values of the columns `keep`, for each of the `num_rows` texts.

    `names`: those of the output. Raises ValueError for a column that has one of them or is not
    there, and for a file with another number of rows.
    """
    if not isinstance(data, str):
        raise ValueError(f"--keep: expected a data file, got texts and {list(keep)}; remove --keep")
    with columns_named_by("--keep"):
        table = read_table(data, format_of(data, "auto"), split, list(dict.fromkeys(keep)))
    taken = [column for column in keep if column in names]
    if taken:
        raise ValueError(
            f"--keep: expected other columns than those of the output, {list(names)}, got {taken}; "
            "rename them in the file"
        )
    if len(table.numbers) != num_rows:
        raise ValueError(
            f"--keep: expected a row for each of the {num_rows} texts, got {len(table.numbers)}; "
            "give a file with one text a row"
        )
    return table.columns
