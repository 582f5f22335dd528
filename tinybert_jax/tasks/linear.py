"""The linear model that a Transformer has to beat: TF-IDF of words with a linear classifier.

From scikit-learn, the `linear` extra. Words and pairs of words, sublinear term frequencies (Salton
and Buckley, 1988); logistic regression, one per label for several labels, or ridge regression. A
pair of texts is one text for the words, and the cosine of the two is a feature of its own.
"""

import importlib.util
import math
import re
import warnings
from typing import NamedTuple

import numpy as np

from tinybert_jax.data.examples import Examples
from tinybert_jax.tasks.task import Task

MAX_ROWS = 50_000  # of the training text, evenly spread; more take minutes for little
MAX_FEATURES = 100_000  # the most frequent words and pairs
_INVERSE_PENALTY = 10.0
_NEVER = -30.0  # the logit of a class that no training row has


class LinearScores(NamedTuple):
    """The logits of the linear model, in the layout of the task's head."""

    logits: list[np.ndarray]  # fp32 [examples, classes] of each data set
    num_parameters: int


def missing_requirement(train: Examples) -> str | None:
    """What the model needs and does not have; None: it can be fitted."""
    if importlib.util.find_spec("sklearn") is None:
        return "scikit-learn (pip install 'tinybert-jax[linear]')"
    if not any(re.search(r"\w", text) for text in train.text):
        return "texts with words"
    return None


def can_fit(task: Task) -> bool:
    """Whether a linear model of whole texts has the units of the task."""
    return task.unit == "row"


def fit(task: Task, train: Examples, *others: Examples) -> LinearScores:
    """Fits the model to `train`, or to every n-th row of it, and scores `others`."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    rows = train.take(slice(None, None, math.ceil(len(train.text) / MAX_ROWS)))
    words = TfidfVectorizer(
        sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"\w+", max_features=MAX_FEATURES
    )
    words.fit(_joined(rows))

    def features(examples: Examples):
        found = words.transform(_joined(examples))
        if examples.text_pair is None:
            return found
        first, second = words.transform(examples.text), words.transform(examples.text_pair)
        cosine = np.asarray(first.multiply(second).sum(axis=1))
        return csr_matrix(hstack([found, csr_matrix(cosine)]))

    inputs, scored = features(rows), [features(part) for part in others]
    num_features = inputs.shape[1]
    if task.form == "square":
        logits = _regression(inputs, rows.labels, scored)
    elif task.form == "sigmoid":
        columns = [_two_classes(inputs, column, scored) for column in rows.labels.T]
        logits = [np.stack(parts, axis=1) for parts in zip(*columns, strict=True)]
    else:
        logits = _classes(inputs, rows.labels, rows.num_outputs, scored)
    num_outputs = logits[0].shape[1]
    return LinearScores(
        [part.astype(np.float32) for part in logits], num_outputs * (num_features + 1)
    )


def _joined(examples: Examples) -> list[str]:
    pairs = examples.text_pair or [""] * len(examples.text)
    return [f"{one} {two}" for one, two in zip(examples.text, pairs, strict=True)]


def _logistic_regression():
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=_INVERSE_PENALTY, max_iter=2000)


def _classes(inputs, labels: np.ndarray, num_classes: int, scored: list) -> list[np.ndarray]:
    """Log-probabilities [examples, classes]; a class without training rows is never predicted."""
    known = np.unique(labels)
    found = [np.full((part.shape[0], num_classes), _NEVER) for part in scored]
    if len(known) == 1:
        for logits in found:
            logits[:, known] = 0.0
        return found
    with warnings.catch_warnings():  # nearly as many classes as rows are told by `data_notes`
        warnings.filterwarnings("ignore", message="The number of unique classes", module="sklearn")
        model = _logistic_regression().fit(inputs, labels)
    for logits, part in zip(found, scored, strict=True):
        logits[:, model.classes_] = model.predict_log_proba(part)
    return found


def _two_classes(inputs, labels: np.ndarray, scored: list) -> list[np.ndarray]:
    """The logit [examples] of one label; constant where all rows have the label, or none."""
    if len(np.unique(labels)) == 1:
        return [np.full(part.shape[0], _NEVER if labels[0] == 0 else -_NEVER) for part in scored]
    model = _logistic_regression().fit(inputs, labels)
    return [model.decision_function(part) for part in scored]


def _regression(inputs, labels: np.ndarray, scored: list) -> list[np.ndarray]:
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=1.0).fit(inputs, labels)
    return [model.predict(part)[:, None] for part in scored]
