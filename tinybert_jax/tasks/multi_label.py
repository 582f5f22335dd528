"""Multi-label classification: any number of labels per text or pair of texts.

A label is predicted where its probability reaches a threshold, which is the same for all labels.
The threshold is the one with the best micro F1 on dev, or on `task.select_share`; config.json of
the model holds it.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinybert_jax.batches.tokenize import tokenize_texts
from tinybert_jax.config.tasks import MultiLabelTask
from tinybert_jax.data.errors import fail, listed, short
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import Reading
from tinybert_jax.data.tables import (
    Table,
    fail_rows,
    format_of,
    read_table,
    texts_in,
    texts_or_blank,
)
from tinybert_jax.metrics.intervals import Metrics
from tinybert_jax.metrics.multi_label import (
    best_threshold,
    f1_per_label,
    multilabel_metrics,
    scores_per_label,
)
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.tasks.task import Scored, Settings, Task

_THRESHOLD = "threshold"


def read(path: str, section: MultiLabelTask, how: Reading) -> Examples:
    """Reads one table with a column of lists of labels, or with a column of 0 and 1 per label."""
    path = os.path.expanduser(path)
    renamed = dict(section.dev_columns) if how.is_dev else {}
    text = renamed.get("text", section.text)
    pair = renamed.get("text_pair", section.text_pair)
    lists = [] if section.label_columns else [renamed.get("label", section.label)]
    wanted = [column for column in (text, pair) if column is not None]
    wanted += [*lists, *section.label_columns] if how.is_labelled else []
    table = read_table(path, format_of(path, section.format), how.split, wanted)
    read_texts = texts_or_blank if how.keep_blank else texts_in
    texts, pairs = read_texts(table, text), read_texts(table, pair) if pair else None
    if not how.is_labelled:
        return Examples(texts, pairs, None, None)
    if section.label_columns:
        names = tuple(how.label_names or section.label_columns)
        if set(names) != set(section.label_columns):
            expected = f"label_columns for the labels {listed(names)}"
            fail(
                path,
                expected,
                listed(section.label_columns),
                "name the columns of these labels, in any order",
            )
        columns = [_indicators(table, column) for column in names]
        return Examples(texts, pairs, np.stack(columns, axis=1), names)
    sets = _label_lists(table, lists[0], section.separator)
    labels, names = _known(table, lists[0], sets, section.labels or how.label_names)
    places = {name: place for place, name in enumerate(names)}
    indicators = np.zeros((len(sets), len(names)), np.int32)
    for row, found in enumerate(sets):
        indicators[row, [places[labels[value]] for value in found]] = 1
    return Examples(texts, pairs, indicators, names)


def _indicators(table: Table, column: str) -> np.ndarray:
    """int32 [rows] of 0 and 1; raises ValueError for any other value."""
    values = ["" if value is None else str(value) for value in table.columns[column]]
    meaning = {"0": 0, "1": 1, "False": 0, "True": 1, "0.0": 0, "1.0": 1}
    wrong = [(n, short(v)) for n, v in zip(table.numbers, values, strict=True) if v not in meaning]
    fix = "write 1 for texts that have the label, 0 for others"
    fail_rows(table, f"0 or 1 in label column {column!r}", wrong, fix)
    return np.array([meaning[value] for value in values], np.int32)


def _label_lists(table: Table, column: str, separator: str) -> list[list[str]]:
    """The raw labels of each row; raises ValueError for an empty or a repeated label."""
    found: list[list[str]] = []
    wrong, empty, twice = [], [], []
    for number, value in zip(table.numbers, table.columns[column], strict=True):
        if isinstance(value, str):
            value = [part.strip() for part in value.split(separator)] if value.strip() else []
        if not isinstance(value, list | tuple) or any(isinstance(v, list | dict) for v in value):
            wrong.append((number, short(value)))
            continue
        labels = ["" if label is None else str(label).strip() for label in value]
        if "" in labels:
            empty.append((number, short(value)))
        if len(set(labels)) < len(labels):
            twice.append((number, short(value)))
        found.append(labels)
    expected = f"a list of labels in column {column!r}"
    fix = 'write lists as in ["sports", "money"], or in .tsv and .csv with task.separator'
    fail_rows(table, expected, wrong, fix)
    fix = "leave the empty labels out; a text without labels has an empty list"
    fail_rows(table, f"{expected} without an empty one", empty, fix)
    fail_rows(table, f"{expected}, each once", twice, "leave the repeated labels out")
    return found


def _known(
    table: Table, column: str, sets: Sequence[Sequence[str]], given: Any
) -> tuple[dict[str, str], tuple[str, ...]]:
    """(raw label -> name, names in id order); raises ValueError for labels that are not `given`."""
    if given is None:
        given = sorted({label for labels in sets for label in labels})
    known = dict(given) if isinstance(given, dict) else {name: name for name in given}
    unknown = [
        (number, ", ".join(short(label) for label in labels if label not in known))
        for number, labels in zip(table.numbers, sets, strict=True)
        if not set(labels) <= set(known)
    ]
    fix = "correct these rows, leave out what a model cannot answer, or complete `labels`"
    expected = f"some of the labels {listed(list(known))} in column {column!r}"
    fail_rows(table, expected, unknown, fix)
    if not known:
        fail_rows(table, f"labels in column {column!r}", [(table.numbers[0], "none")], "add them")
    return known, tuple(dict.fromkeys(known.values()))


def _probabilities(scored: Scored) -> np.ndarray:
    """fp64 [n, labels]."""
    return 1 / (1 + np.exp(-scored.logits.astype(np.float64)))


def _chosen(scored: Scored, settings: Settings) -> np.ndarray:
    """int32 [n, labels]: 1 for the predicted labels."""
    return (_probabilities(scored) >= settings.get(_THRESHOLD, 0.5)).astype(np.int32)


def tune(scored: Scored) -> Settings:
    """The threshold with the best micro F1."""
    return {_THRESHOLD: best_threshold(_probabilities(scored), scored.examples.labels)}


def outcomes(scored: Scored, settings: Settings) -> np.ndarray:
    """[n, 2, labels] of 0 and 1: the true and the predicted labels of each example."""
    return np.stack([scored.examples.labels, _chosen(scored, settings)], axis=1)


def metrics(found: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Micro F1, macro F1 and subset accuracy; see `multilabel_metrics`."""
    return multilabel_metrics(found[:, 1], found[:, 0])


def resample_metrics(whole: np.ndarray, names: Sequence[str]) -> Metrics:
    """As `metrics`, but a label that a resample lacks keeps the F1 that it has on all examples."""
    absent = f1_per_label(whole[:, 1], whole[:, 0])
    return lambda found: multilabel_metrics(found[:, 1], found[:, 0], absent)


def answers(scored: Scored, settings: Settings) -> list[dict[str, Any]]:
    """Per example the predicted labels, and the probability of every label."""
    names = scored.label_names
    return [
        {
            "labels": [names[i] for i in np.flatnonzero(chosen)],
            "probabilities": {name: float(p) for name, p in zip(names, row, strict=True)},
        }
        for chosen, row in zip(_chosen(scored, settings), _probabilities(scored), strict=True)
    ]


def details(scored: Scored, settings: Settings) -> dict[str, Any]:
    """Scores per label and the threshold."""
    rows = scores_per_label(_chosen(scored, settings), scored.examples.labels)
    named = [{"name": n, **row} for n, row in zip(scored.label_names, rows, strict=True)]
    return {"per_class_title": "Scores per label", "per_class": named, "settings": dict(settings)}


def truth(examples: Examples) -> list[str]:
    """The labels of each example."""
    names = examples.label_names or ()
    return [_joined([names[i] for i in np.flatnonzero(row)]) for row in examples.labels]


def _joined(labels: Sequence[str]) -> str:
    return ", ".join(labels) or "none"


def floor(examples: Examples) -> float:
    """The best micro F1 of predicting the same labels for every text: the most frequent ones."""
    num_texts, num_labels = examples.labels.shape
    counts = np.sort(examples.labels.sum(0))[::-1]
    num_predicted = num_texts * np.arange(1, num_labels + 1)
    return float(np.max(2 * np.cumsum(counts) / (num_predicted + counts.sum())))


MULTI_LABEL = Task(
    section=MultiLabelTask,
    form=MultiLabelTask.form,
    make_head=make_classifier,
    unit="row",
    read=read,
    encode=tokenize_texts,
    count_labels=lambda examples: examples.labels.sum(0),
    floor=floor,
    floor_metric="f1_micro",
    outcomes=outcomes,
    metrics=metrics,
    resample_metrics=resample_metrics,
    answers=answers,
    details=details,
    in_words=lambda answer: _joined(answer["labels"]),
    truth=truth,
    hf_head="SequenceClassification",
    problem_type="multi_label_classification",
    tune=tune,
)
