"""Classification: one of several classes per text or pair of texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinybert_jax.batches.tokenize import tokenize_texts
from tinybert_jax.config.tasks import ClassificationTask
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import Reading
from tinybert_jax.data.tables import read_labelled
from tinybert_jax.metrics.calibration import calibration
from tinybert_jax.metrics.classification import (
    classification_metrics,
    confusion_matrix,
    f1_per_class,
    frequent_mistakes,
    predicted_classes,
)
from tinybert_jax.metrics.intervals import Metrics
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.tasks.task import Scored, Settings, Task, softmax


def read(path: str, section: Any, how: Reading) -> Examples:
    """Reads one table; raises ValueError for training labels that cannot be classes."""
    columns = columns_of(section, how.is_dev, how.is_labelled)
    labels = section.labels or how.label_names
    labels = labels if how.is_labelled else None
    options = {"split": how.split, "labels": labels, "keep_blank": how.keep_blank}
    examples = read_labelled(path, **columns, **options)
    if how.is_labelled and not how.is_dev:
        _check_classes(path, section, examples)
    return examples


def columns_of(section: Any, is_dev: bool, is_labelled: bool) -> dict[str, Any]:
    """The names of the columns and the format, as keyword arguments of `read_labelled`."""
    columns = {"text": section.text, "text_pair": section.text_pair, "label": section.label}
    columns |= dict(section.dev_columns) if is_dev else {}
    return columns | {"format": section.format, **({} if is_labelled else {"label": None})}


def _check_classes(path: str, section: Any, examples: Examples) -> None:
    """Raises ValueError where all rows have the same label or nearly all have different labels."""
    names, labels = examples.label_names or (), examples.labels
    if len(names) < 2:
        raise ValueError(
            f"{path}: expected at least 2 labels in column '{section.label}', got {list(names)}; "
            "for numbers set task.kind=regression"
        )
    num_labels, num_rows = len(np.unique(labels)), len(labels)
    if section.labels is None and num_rows >= 20 and num_labels > 0.9 * num_rows:
        raise ValueError(
            f"{path}: expected labels that rows share, got {num_labels} in the {num_rows} rows of "
            f"column '{section.label}'; set task.label to the column of the classes, or list all "
            "classes in task.labels; for numbers set task.kind=regression"
        )


def count_labels(examples: Examples) -> np.ndarray:
    """Number of examples per class, [classes]."""
    return np.bincount(examples.labels, minlength=examples.num_outputs)


def majority_share(examples: Examples) -> float:
    """The accuracy of always predicting the most frequent class."""
    return float(np.bincount(examples.labels).max() / len(examples.labels))


def outcomes(scored: Scored, settings: Settings) -> np.ndarray:
    """[n, 2]: the true and the predicted class of each example."""
    return np.stack([scored.examples.labels, predicted_classes(scored.logits)], axis=1)


def metrics(found: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation; see `classification_metrics`."""
    return classification_metrics(found[:, 1], found[:, 0], len(names))


def resample_metrics(whole: np.ndarray, names: Sequence[str]) -> Metrics:
    """As `metrics`, but a class that a resample lacks keeps the F1 that it has on all examples.

    Else the mean would be over fewer classes there, and its interval beside the score: a class with
    one row is missing in a third of the resamples.
    """
    absent = f1_per_class(whole[:, 1], whole[:, 0], len(names))
    return lambda rows: classification_metrics(rows[:, 1], rows[:, 0], len(names), absent)


def answers(scored: Scored, settings: Settings) -> list[dict[str, Any]]:
    """Per example the class with the highest logit, its probability, and the logits by class."""
    predicted, probabilities = scored.logits.argmax(-1), softmax(scored.logits)
    return [
        {
            "label": scored.label_names[label],
            "probability": float(row[label]),
            "logits": dict(zip(scored.label_names, logits.tolist(), strict=True)),
        }
        for label, row, logits in zip(predicted, probabilities, scored.logits, strict=True)
    ]


MAX_CONFUSION = 200  # classes: a matrix of 10,000 would have 100 million counts
_NUM_MISTAKES = 15


def details(scored: Scored, settings: Settings) -> dict[str, Any]:
    """The confusion matrix, true class by predicted class, and the calibration.

    Of more than `MAX_CONFUSION` classes the most frequent `mistakes` take the place of the matrix.
    """
    labels, predicted = outcomes(scored, settings).T
    num_classes = scored.examples.num_outputs
    if num_classes <= MAX_CONFUSION:
        shown = {"confusion": confusion_matrix(predicted, labels, num_classes).tolist()}
    else:
        support = np.bincount(labels, minlength=num_classes)
        found = frequent_mistakes(predicted, labels, _NUM_MISTAKES)
        pairs = [(true, guess, count, int(support[true])) for true, guess, count in found]
        names = ("true", "predicted", "count", "support")
        shown = {"mistakes": [dict(zip(names, pair, strict=True)) for pair in pairs]}
    confidence = softmax(scored.logits.astype(np.float64)).max(-1)
    return {**shown, "calibration": calibration(confidence, predicted == labels)._asdict()}


def truth(examples: Examples) -> list[str]:
    """The name of each example's class."""
    names = examples.label_names or ()
    return [names[label] for label in examples.labels]


CLASSIFICATION = Task(
    section=ClassificationTask,
    form=ClassificationTask.form,
    make_head=make_classifier,
    unit="row",
    read=read,
    encode=tokenize_texts,
    count_labels=count_labels,
    floor=majority_share,
    floor_metric="accuracy",
    outcomes=outcomes,
    metrics=metrics,
    resample_metrics=resample_metrics,
    answers=answers,
    details=details,
    in_words=lambda answer: answer["label"],
    truth=truth,
    hf_head="SequenceClassification",
    problem_type="single_label_classification",
)
