"""The configs of `tinybert run --data` and `tinybert update`, which need no YAML file."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinybert_jax.config import by_rows
from tinybert_jax.config import load as config_files
from tinybert_jax.data.errors import fail, listed
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.guess import guess_task
from tinybert_jax.data.splits import Reading
from tinybert_jax.huggingface.folder import HfModel, read_model
from tinybert_jax.tasks.classification import CLASSIFICATION
from tinybert_jax.tasks.multi_label import MULTI_LABEL
from tinybert_jax.tasks.table import task_of

_ORIGIN = "command line"
_NUM_SEEDS = 3  # whose weights an update averages
_SHARE = 0.1  # of the rows of an update that are dev, and of the others that choose
_MAX_LENGTH = 128
_READING = ("text", "text_pair", "label", "format", "train_split")
_OLD_FIX = "name the labels as the model does, or move these rows to the new ones"


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
    options, settings = _columns(given, text=text, text_pair=text_pair, label=label, kind=task)
    if not teacher and not given.get("teacher"):
        example = "a folder, or sentence-transformers/all-MiniLM-L6-v2"
        fail("--teacher", "a BERT folder or hub id", "none", f"give one: {example}")
    if "\n" in data or not data.strip():
        fail("--data", "a file", repr(data), "give a .csv, .tsv or .jsonl file")
    options |= {"train": data, **settings}
    is_told = {"text", "label", "kind"} <= set(options)
    if options.get("kind") == MULTI_LABEL.kind:
        is_told = is_told and "separator" in options
    if not is_told:
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


def _columns(given: dict[str, Any], **options: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the options that are given, the settings of the task); each name in one of them at most."""
    settings = given.get("task") or {}
    chosen = {name: value for name, value in options.items() if value is not None}
    if not isinstance(settings, dict):
        fail(_ORIGIN, "settings of the task as task.key=value", f"task={settings!r}", "add a key")
    twice = sorted(set(chosen) & set(settings))
    if twice:
        fail(_ORIGIN, f"{twice} once", "an option and task.key=value", "remove one of the two")
    return chosen, settings


def make_update_tree(
    *,
    model: str,
    data: str,
    old: str,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    max_regressions: float | None,
    overrides: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The tree of a config with the stage update: a model folder, new rows and old ones.

    The labels of the model come first, those that only the new rows have follow. Raises ValueError
    for files that cannot be read, and for old rows whose labels the model does not know.
    """
    given = config_files.read_overrides(overrides)
    options, settings = _columns(given, text=text, text_pair=text_pair, label=label)
    options |= {name: value for name, value in settings.items() if value is not None}
    source = _read_classifier(model)
    options["kind"] = CLASSIFICATION.kind
    if not {"text", "label"} <= set(options):
        guess = guess_task(data, options)
        say(f"task: {guess.told.removesuffix(' or --task')}")  # which an update does not take
        options = {**guess.settings, **options}
    rows = {path: _read_rows(path, options) for path in (data, old)}
    names = source.label_names or ()
    strange = sorted(set(rows[old].label_names or ()) - set(names))
    if strange:
        fail(old, f"labels of {model}: {listed(list(names))}", listed(strange), _OLD_FIX)
    new = sorted(set(rows[data].label_names or ()) - set(names))
    told = f"{len(new)} new labels, {listed(new)}," if new else "no new labels"
    say(f"task: {told} beside the {len(names)} of {model}")
    num_rows = sum(len(part.text) for part in rows.values())
    sizes, name = source.config, _name_of(data)
    update, line = by_rows.fill_update(num_rows, sizes.hidden_size, given.get("update"))
    say(f"recipe: {line}")
    update["max_length"] = min(_MAX_LENGTH, sizes.max_position_embeddings)
    shares = {"dev_share": _SHARE, "select_share": _SHARE}
    tree = {
        "name": name,
        "run_dir": os.path.join("runs", f"{name}-update"),
        "num_seeds": _NUM_SEEDS,
        "teacher": {"path": model},
        "student": {"path": model},
        "task": {"name": name, "train": data, "old": old, **shares, **options},
        "compute": {"unroll_layers": True},
        "update": {**update, "max_regressions": max_regressions},
    }
    tree["task"].setdefault("labels", [*names, *new])
    return config_files.with_overrides(tree, overrides, _ORIGIN)


def _read_classifier(model: str) -> HfModel:
    source = read_model(model)
    kind = task_of(source).kind
    if kind != CLASSIFICATION.kind:
        fail(model, f"a model for {CLASSIFICATION.kind}", f"one for {kind}", "train a new model")
    return source


def _read_rows(path: str, options: dict[str, Any]) -> Examples:
    columns = {name: options[name] for name in _READING if name in options}
    given = {**columns, "train": path, "dev_share": _SHARE}
    section = config_files.validate(CLASSIFICATION.section, given, _ORIGIN)
    return CLASSIFICATION.read(path, section, Reading(section.train_split, is_dev=True))


def _name_of(data: str) -> str:
    """The name of a file without its suffix, of a folder, or of a data set of the hub."""
    if data.startswith("hub:"):
        return data.removeprefix("hub:").split("/")[-1].replace(":", "-")
    return Path(os.path.expanduser(data)).resolve().stem
