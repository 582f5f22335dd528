"""Regression: one number per text or pair of texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinybert_jax.batches.tokenize import tokenize_texts
from tinybert_jax.config.tasks import RegressionTask
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import Reading
from tinybert_jax.data.tables import read_labelled
from tinybert_jax.metrics.regression import regression_metrics
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.tasks.classification import columns_of
from tinybert_jax.tasks.task import Scored, Settings, Task


def read(path: str, section: Any, how: Reading) -> Examples:
    """Reads one table whose labels are numbers."""
    columns = columns_of(section, how.is_dev, how.is_labelled)
    options = {"split": how.split, "numbers": how.is_labelled, "keep_blank": how.keep_blank}
    return read_labelled(path, **columns, **options)


def count_labels(examples: Examples) -> np.ndarray:
    """Empty, because a regression has no classes."""
    return np.zeros(0, np.int64)


def outcomes(scored: Scored, settings: Settings) -> np.ndarray:
    """[n, 2]: the true and the predicted number of each example."""
    return np.stack([scored.examples.labels, scored.logits[:, 0]], axis=1)


def metrics(found: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """See `regression_metrics`."""
    return regression_metrics(found[:, 1], found[:, 0])


def answers(scored: Scored, settings: Settings) -> list[dict[str, Any]]:
    """The predicted number per example."""
    return [{"value": float(row[0])} for row in scored.logits]


def rights(scored: Scored, settings: Settings) -> np.ndarray:
    """bool [n]: predictions within half a standard deviation of the labels of their label."""
    labels, predicted = outcomes(scored, settings).T
    return np.abs(labels - predicted) <= labels.std() / 2


REGRESSION = Task(
    section=RegressionTask,
    form=RegressionTask.form,
    make_head=make_classifier,
    unit="row",
    read=read,
    encode=tokenize_texts,
    count_labels=count_labels,
    floor=lambda examples: None,
    floor_metric="pearson",
    outcomes=outcomes,
    metrics=metrics,
    answers=answers,
    details=lambda scored, settings: {},
    in_words=lambda answer: f"{answer['value']:.3g}",
    truth=lambda examples: [f"{label:.3g}" for label in examples.labels],
    hf_head="SequenceClassification",
    problem_type="regression",
    rights=rights,
)
