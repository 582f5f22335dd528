"""Regression: a number for each text or pair of texts."""

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
    columns = columns_of(section, how.is_dev, how.is_labelled)
    options = {"split": how.split, "numbers": how.is_labelled, "keep_blank": how.keep_blank}
    return read_labelled(path, **columns, **options)


def count_labels(examples: Examples) -> np.ndarray:
    return np.zeros(0, np.int64)  # there are no classes


def measure(scored: Scored, settings: Settings) -> dict[str, float]:
    return regression_metrics(scored.logits[:, 0], scored.examples.labels)


def answers(scored: Scored, settings: Settings) -> list[dict[str, Any]]:
    return [{"value": float(row[0])} for row in scored.logits]


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
    measure=measure,
    answers=answers,
    details=lambda scored, settings: {},
    hf_head="SequenceClassification",
    problem_type="regression",
)
