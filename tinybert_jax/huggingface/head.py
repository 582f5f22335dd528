"""Reads and writes the task head in config.json: its kind, labels and problem type."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Heads that are a linear map, of the pooled token or of every token.
_KINDS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
_PARTS = {"classifier": "classifier", "spans": "qa_outputs"}  # our name -> that in transformers
_SETTINGS = "tinybert_answers"  # the key of config.json for a head's settings
_TASK = "tinybert_task"  # the key of config.json for the kind of task


class Head(NamedTuple):
    """A task head."""

    kind: str  # end of the class name in transformers, such as SequenceClassification
    problem_type: str | None  # as in transformers' config.json
    label_names: tuple[str, ...]  # one per output, in id order; LABEL_0 … for unnamed outputs
    settings: Mapping[str, float] = {}  # for predictions, such as a threshold
    task: str | None = None  # the kind of task; None in folders of other programs


def head_part(paths: Iterable[str]) -> str | None:
    """The name of the task head among parameters; None without one."""
    found = set(paths)
    return next((part for part in _PARTS if f"{part}/kernel" in found), None)


def head_tensor(names: Iterable[str]) -> str | None:
    """The name of the kernel of the task head among tensors of transformers; None without one."""
    found = set(names)
    return next((f"{part}.weight" for part in _PARTS.values() if f"{part}.weight" in found), None)


def is_unnamed(label_names: Sequence[str]) -> bool:
    """Whether the names are the placeholders of transformers, LABEL_0 and so on."""
    return all(name.startswith("LABEL_") for name in label_names)


def inferred_problem_type(head_kind: str, num_outputs: int) -> str | None:
    """The problem type where config.json has none: regression for one output, else one class."""
    if head_kind != "SequenceClassification":
        return None
    return "regression" if num_outputs == 1 else "single_label_classification"


def wanted_head(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The kind of head of parameters with these shapes; None without a task head.

    A head over tokens is the only `classifier` without a pooler.
    """
    if "spans/kernel" in shapes:
        return "QuestionAnswering"
    if "classifier/kernel" not in shapes:
        return None
    return "SequenceClassification" if "encoder/pooler/kernel" in shapes else "TokenClassification"


def read_label_names(raw: Mapping[str, Any], folder: Path) -> tuple[str, ...] | None:
    """The label names in id order; None without names; raises ValueError for ids with a gap."""
    names = raw.get("id2label")
    if not names:
        return None
    by_id = {str(key): str(name) for key, name in names.items()} if isinstance(names, dict) else {}
    ids = [str(i) for i in range(len(by_id))]
    if not ids or set(ids) != set(by_id):
        raise ValueError(
            f"{folder}: expected id2label with the ids from 0 on, got {names}; correct config.json"
        )
    return tuple(by_id[i] for i in ids)


def read_head(raw: Mapping[str, Any], folder: Path, num_outputs: int) -> Head:
    """The head of the classifier weights in a folder.

    Old folders without `architectures` have a SequenceClassification head. Raises ValueError for
    other kinds of heads, and where the numbers of names and outputs differ.
    """
    architectures = raw.get("architectures") or [f"For{_KINDS[0]}"]
    kinds = [kind for kind in _KINDS if any(kind in name for name in architectures)]
    if not kinds:
        raise ValueError(
            f"{folder}: expected a head of one of the kinds {list(_KINDS)}, got one of "
            f"{architectures}; use another model"
        )
    names = read_label_names(raw, folder) or _placeholders(num_outputs)
    if len(names) != num_outputs:
        raise ValueError(
            f"{folder}: expected {num_outputs} label names, one per output of the head, got "
            f"{len(names)} in config.json: {list(names)}; correct config.json"
        )
    problem_type = raw.get("problem_type") or inferred_problem_type(kinds[0], num_outputs)
    task = raw.get(_TASK)
    if not isinstance(task, str | None):
        raise ValueError(
            f"{folder}: expected the name of a kind of task as {_TASK}, got {task!r}; remove that "
            "key from config.json"
        )
    return Head(kinds[0], problem_type, names, _read_settings(raw, folder), task)


def _read_settings(raw: Mapping[str, Any], folder: Path) -> Mapping[str, float]:
    """The settings of the head; raises ValueError where they are not finite numbers by name."""
    settings = raw.get(_SETTINGS) or {}
    if not isinstance(settings, dict) or not all(map(_is_number, settings.values())):
        raise ValueError(
            f"{folder}: expected finite numbers by name as {_SETTINGS}, got {settings!r}; remove "
            "that key from config.json"
        )
    return settings


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def write_head(head: Head, num_outputs: int) -> dict[str, Any]:
    """The keys of config.json; raises ValueError if the numbers of names and outputs differ."""
    names = head.label_names or _placeholders(num_outputs)
    if len(names) != num_outputs:
        raise ValueError(
            f"label_names: expected {num_outputs}, one per output of the head, got {list(names)}; "
            "give as many names"
        )
    fields: dict[str, Any] = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    fields |= {"problem_type": head.problem_type} if head.problem_type else {}
    fields |= {_TASK: head.task} if head.task else {}
    return fields | ({_SETTINGS: dict(head.settings)} if head.settings else {})


def _placeholders(num_outputs: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(num_outputs))
