"""Reads and writes the task head in config.json: its kind, labels and problem type."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import category

from tinybert_jax.huggingface.untrusted import CONFIG, shorten

# Heads that are a linear map, of the pooled token or of every token.
_KINDS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
_PARTS = {"classifier": "classifier", "spans": "qa_outputs"}  # our name -> that in transformers
_SETTINGS = "tinybert_answers"  # the key of config.json for a head's settings
_TASK = "tinybert_task"  # the key of config.json for the kind of task
_COLUMNS = "tinybert_columns"  # the key of config.json for the columns that were read
_READ = ("text", "text_pair")
_PAIRS = "tinybert_pairs"  # the key of config.json of a model for pairs of texts


class Head(NamedTuple):
    """A task head."""

    kind: str  # end of the class name in transformers, such as SequenceClassification
    problem_type: str | None  # as in transformers' config.json
    label_names: tuple[str, ...]  # one per output, in id order; LABEL_0 … for unnamed outputs
    settings: Mapping[str, float] = {}  # for predictions, such as a threshold
    task: str | None = None  # the kind of task; None in folders of other programs
    reads_pairs: bool = False  # trained on pairs of texts; False where the folder does not say
    columns: Mapping[str, str] = {}  # those of the training file: text, text_pair


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
    """The label names in id order; None without names.

    Raises ValueError for ids with a gap, and for names that are missing, twice there or not text.
    """
    names = raw.get("id2label")
    if not names:
        return None
    place = f"{folder}: expected id2label with"
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise ValueError(f"{place} the ids from 0 on, got {shorten(names)}; correct {CONFIG}")
    by_id = [names[str(i)] for i in range(len(names))]
    wrong = [i for i, name in enumerate(by_id) if not is_name(name)]
    if wrong:
        raise ValueError(
            f"{place} a name for each id, got {shorten(by_id[wrong[0]])} for {wrong[0]}; "
            f"correct {CONFIG}"
        )
    found = tuple(str(name) for name in by_id)
    twice = [name for name, count in Counter(found).items() if count > 1]
    if twice:
        raise ValueError(
            f"{place} another name for each id, got {shorten(twice)} for several; correct {CONFIG}"
        )
    return found


def is_name(value: Any) -> bool:
    """Whether a value can name a label: text that UTF-8 can encode and a screen show, or a number.

    Surrogates and control characters are in the Unicode categories Cs and Cc.
    """
    if not isinstance(value, str):
        return isinstance(value, int | float)
    return value != "" and not {category(char) for char in value} & {"Cs", "Cc"}


def read_head(raw: Mapping[str, Any], folder: Path, shape: tuple[int, ...]) -> Head:
    """The head of the classifier weights in a folder; `shape`: [num_outputs, dim].

    Old folders without `architectures` have a SequenceClassification head. Raises ValueError for
    other kinds of heads, and where the numbers of names and outputs differ.
    """
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"{folder}: expected classifier.weight, or qa_outputs.weight, of the shape [outputs, "
            f"hidden_size], got {list(shape)}; use another model"
        )
    num_outputs = shape[0]
    architectures = raw.get("architectures") or [f"For{_KINDS[0]}"]
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise ValueError(
            f"{folder}: expected a list of class names as architectures, got "
            f"{shorten(architectures)}; correct {CONFIG}"
        )
    kinds = [kind for kind in _KINDS if any(kind in name for name in architectures)]
    if not kinds:
        raise ValueError(
            f"{folder}: expected a head of one of the kinds {list(_KINDS)}, got one of "
            f"{shorten(architectures)}; use another model"
        )
    if kinds[0] == "QuestionAnswering" and num_outputs != 2:
        raise ValueError(
            f"{folder}: expected qa_outputs of two outputs, start and end, got {num_outputs}; use "
            "another model"
        )
    names = read_label_names(raw, folder) or _placeholders(num_outputs)
    if len(names) != num_outputs:
        raise ValueError(
            f"{folder}: expected {num_outputs} label names, one per output of the head, got "
            f"{len(names)} in config.json: {shorten(list(names))}; correct config.json"
        )
    problem_type = raw.get("problem_type") or inferred_problem_type(kinds[0], num_outputs)
    if not isinstance(problem_type, str | None):
        raise ValueError(
            f"{folder}: expected text as problem_type, got {shorten(problem_type)}; correct "
            f"{CONFIG}"
        )
    task = raw.get(_TASK)
    if not isinstance(task, str | None):
        raise ValueError(
            f"{folder}: expected the name of a kind of task as {_TASK}, got {shorten(task)}; "
            "remove that key from config.json"
        )
    reads_pairs = raw.get(_PAIRS, False)
    if not isinstance(reads_pairs, bool):
        raise ValueError(
            f"{folder}: expected true or false as {_PAIRS}, got {shorten(reads_pairs)}; remove "
            "that key from config.json"
        )
    settings, columns = _read_settings(raw, folder), _read_columns(raw, folder)
    return Head(kinds[0], problem_type, names, settings, task, reads_pairs, columns)


def _read_columns(raw: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The columns of the training file; raises ValueError where they are not names."""
    columns = raw.get(_COLUMNS) or {}
    named = columns.items() if isinstance(columns, dict) else [("", None)]
    if not all(key in _READ and isinstance(own, str) and is_name(own) for key, own in named):
        raise ValueError(
            f"{folder}: expected names of columns for {' and '.join(_READ)} as {_COLUMNS}, got "
            f"{shorten(columns)}; remove that key from {CONFIG}"
        )
    return dict(columns)


def _read_settings(raw: Mapping[str, Any], folder: Path) -> Mapping[str, float]:
    """The settings of the head; raises ValueError where they are not finite numbers by name."""
    settings = raw.get(_SETTINGS) or {}
    if not isinstance(settings, dict) or not all(map(_is_number, settings.values())):
        raise ValueError(
            f"{folder}: expected finite numbers by name as {_SETTINGS}, got {shorten(settings)}; "
            "remove that key from config.json"
        )
    return {name: float(value) for name, value in settings.items()}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


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
    fields |= {_PAIRS: True} if head.reads_pairs else {}
    fields |= {_COLUMNS: dict(head.columns)} if head.columns else {}
    return fields | ({_SETTINGS: dict(head.settings)} if head.settings else {})


def _placeholders(num_outputs: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(num_outputs))
