"""The head of a task as config.json tells of it: its kind, its labels and what it is for."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Heads that are a linear map named `classifier`, over pooled tokens or over all.
_KINDS = ("SequenceClassification", "TokenClassification")
_SETTINGS = "tinybert_answers"  # the key of config.json for a head's settings
_TASK = "tinybert_task"  # the key of config.json for the kind of task


class Head(NamedTuple):
    kind: str  # as in the names of transformers' classes, such as SequenceClassification
    problem_type: str | None
    label_names: tuple[str, ...]  # in id order, one for each output; LABEL_0 … where there are none
    settings: Mapping[str, float] = {}  # of the answers, such as a threshold
    task: str | None = None  # the kind of task; None in folders that others wrote


def is_unnamed(label_names: Sequence[str]) -> bool:
    """Whether these are transformers' placeholders, which say nothing of the task."""
    return all(name.startswith("LABEL_") for name in label_names)


def inferred_problem_type(head_kind: str, num_outputs: int) -> str | None:
    """What a head is for where config.json does not say: numbers for one output, else one class."""
    if head_kind != "SequenceClassification":
        return None
    return "regression" if num_outputs == 1 else "single_label_classification"


def wanted_head(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The kind of head that parameters of these shapes have: only a head over tokens has no pooler.

    None for parameters without a head of a task.
    """
    if "classifier/kernel" not in shapes:
        return None
    return "SequenceClassification" if "encoder/pooler/kernel" in shapes else "TokenClassification"


def read_label_names(raw: Mapping[str, Any], folder: Path) -> tuple[str, ...] | None:
    """The names in id order, None where config.json has none; ids with a gap raise ValueError."""
    names = raw.get("id2label")
    if not names:
        return None
    by_id = {str(key): str(name) for key, name in names.items()} if isinstance(names, dict) else {}
    ids = [str(i) for i in range(len(by_id))]
    if not ids or set(ids) != set(by_id):
        raise ValueError(f"{folder}: expected id2label with the ids from 0 on, got {names}")
    return tuple(by_id[i] for i in ids)


def read_head(raw: Mapping[str, Any], folder: Path, num_outputs: int) -> Head:
    """The head that classifier weights are for; of old folders without a class, of sequences.

    Raises ValueError for heads of other kinds, and where names and outputs differ in number.
    """
    architectures = raw.get("architectures") or [f"For{_KINDS[0]}"]
    kinds = [kind for kind in _KINDS if any(kind in name for name in architectures)]
    if not kinds:
        raise ValueError(
            f"{folder}: expected a head of one of the kinds {list(_KINDS)}, got one of "
            f"{architectures}"
        )
    names = read_label_names(raw, folder) or _placeholders(num_outputs)
    if len(names) != num_outputs:
        raise ValueError(
            f"{folder}: expected one label name for each of the head's {num_outputs} outputs, "
            f"config.json has {len(names)}: {list(names)}"
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
    """The fields of config.json; raises ValueError where names and outputs differ in number."""
    names = head.label_names or _placeholders(num_outputs)
    if len(names) != num_outputs:
        raise ValueError(
            f"label_names: expected one for each of the head's {num_outputs} outputs, got "
            f"{list(names)}"
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
