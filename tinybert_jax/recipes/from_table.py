"""The config of a run on a table, without a YAML file: text, teacher, a guessed task, `by_rows`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinybert_jax.config import by_rows
from tinybert_jax.config import load as config_files
from tinybert_jax.data.errors import fail
from tinybert_jax.data.guess import guess_task

_ORIGIN = "command line"


def make_tree(
    *,
    data: str,
    teacher: str | None,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    task: str | None,
    overrides: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The tree of a config: what `configs/own-text.yaml` holds, for the file `data`.

    What is None is guessed, and `say` is told so. Raises ValueError for a file that cannot be read
    and for a setting that is given twice.
    """
    given = config_files.read_overrides(overrides)
    settings = given.get("task") or {}
    options = {"text": text, "text_pair": text_pair, "label": label, "kind": task}
    options = {name: value for name, value in options.items() if value is not None}
    if not isinstance(settings, dict):
        fail(_ORIGIN, "settings of the task as task.key=value", f"task={settings!r}", "add a key")
    twice = sorted(set(options) & set(settings))
    if twice:
        fail(_ORIGIN, f"{twice} once", "an option and task.key=value", "remove one of the two")
    if not teacher and not given.get("teacher"):
        example = "a folder, or sentence-transformers/all-MiniLM-L6-v2"
        fail("--teacher", "a BERT folder or hub id", "none", f"give one: {example}")
    if "\n" in data or not data.strip():
        fail("--data", "a file", repr(data), "give a .csv, .tsv or .jsonl file")
    options |= {"train": data, **settings}
    if not {"text", "label", "kind"} <= set(options):
        guess = guess_task(data, options)
        say(f"task: {guess.told}")
        options = {**guess.settings, **options}
    name = _name_of(data)
    tree = {
        "name": name,
        "run_dir": os.path.join("runs", name),
        "recipe": by_rows.NAME,
        "teacher": {"path": teacher} if teacher else {},
        "task": {"name": name, **options},
    }
    return config_files.with_overrides(tree, overrides, _ORIGIN)


def _name_of(data: str) -> str:
    """The name of a file without its suffix, of a folder, or of a data set of the hub."""
    if data.startswith("hub:"):
        return data.removeprefix("hub:").split("/")[-1].replace(":", "-")
    return Path(os.path.expanduser(data)).resolve().stem
