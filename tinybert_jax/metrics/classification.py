"""Scores of predicted classes: accuracy, F1, Matthews correlation, confusion matrix."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


def classification_metrics(
    predictions: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    num_classes: int,
    absent_f1: Float[np.ndarray, " num_classes"] | None = None,
) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation of predicted classes, as fractions.

    With two classes `f1` is the F1 of class 1 (GLUE's MRPC and QQP), with more the unweighted mean
    over the classes of the labels: a class that is predicted alone counts as the errors that it is,
    so that models which know other classes have the mean of the same ones. A score with denominator
    0 is 0.0, as in scikit-learn. `absent_f1`: of classes that the labels lack, NaN for those that
    are not in the mean, which is the default. Raises ValueError for an empty set or a class outside
    of `num_classes`.
    """
    counts = _class_counts(predictions, labels, num_classes)
    absent = np.full(num_classes, np.nan) if absent_f1 is None else absent_f1
    f1 = np.where(counts.true > 0, _f1_per_class(counts), absent)[int(num_classes == 2) :]
    f1 = f1[~np.isnan(f1)]
    return {
        "accuracy": float(counts.right.sum() / counts.true.sum()),
        "f1": float(f1.mean()) if len(f1) else 0.0,
        "matthews": _matthews(counts),
    }


def f1_per_class(
    predictions: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], num_classes: int
) -> Float[np.ndarray, " num_classes"]:
    """The F1 of each class; NaN for a class that the labels lack."""
    counts = _class_counts(predictions, labels, num_classes)
    return np.where(counts.true > 0, _f1_per_class(counts), np.nan)


def predicted_classes(logits: Float[np.ndarray, "n classes"]) -> Int[np.ndarray, " n"]:
    """The class with the highest logit; ValueError for a single class, NaN or Inf."""
    if logits.shape[1] < 2:
        raise ValueError(
            f"expected logits of at least 2 classes, got {logits.shape[1]}; for a single output "
            "use regression_metrics"
        )
    require_finite("logits", logits)
    return logits.argmax(-1)


def confusion_matrix(
    predictions: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], num_labels: int
) -> Int[np.ndarray, "num_labels num_labels"]:
    """Number of examples by [true class, predicted class].

    Raises ValueError for an empty set or a class outside 0..num_labels-1.
    """
    _require_classes(predictions, labels, num_labels)
    cell = labels.astype(np.int64) * num_labels + predictions
    return np.bincount(cell, minlength=num_labels**2).reshape(num_labels, num_labels)


def frequent_mistakes(
    predictions: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], num_shown: int
) -> list[tuple[int, int, int]]:
    """The most frequent (true class, predicted class, examples) of wrong predictions, most first.

    Pairs of equal frequency come in the order of their classes. Needs no confusion matrix.
    """
    require_aligned(predictions, labels)
    wrong = labels != predictions
    pairs, counts = np.unique(
        np.stack([labels[wrong], predictions[wrong]], axis=1), axis=0, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")[:num_shown]
    return [(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order]


def _require_classes(predictions: np.ndarray, labels: np.ndarray, num_labels: int) -> None:
    require_aligned(predictions, labels)
    for name, classes in (("labels", labels), ("predictions", predictions)):
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= num_labels:
            raise ValueError(
                f"expected {name} in 0..{num_labels - 1}, got {low}..{high}; "
                "check num_labels and that the split has labels"
            )


class _ClassCounts(NamedTuple):
    """Numbers of examples by class, int64 [classes]; a matrix of classes² would fill memory."""

    right: np.ndarray
    true: np.ndarray
    predicted: np.ndarray


def _class_counts(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> _ClassCounts:
    _require_classes(predictions, labels, num_classes)
    parts = labels[labels == predictions], labels, predictions
    return _ClassCounts(*(np.bincount(part, minlength=num_classes) for part in parts))


def _f1_per_class(counts: _ClassCounts) -> np.ndarray:
    """2·tp / (2·tp + fp + fn); the denominator is the sum of true and predicted examples."""
    return 2 * counts.right / np.maximum(counts.true + counts.predicted, 1)


def _matthews(counts: _ClassCounts) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004); 0.0 where undefined."""
    true, predicted = counts.true.astype(np.float64), counts.predicted.astype(np.float64)
    total = true.sum()
    covariance = counts.right.sum() * total - true @ predicted
    spread = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def require_aligned(predictions: np.ndarray, labels: np.ndarray) -> None:
    """Raises ValueError for an empty set; the shapes of predictions and labels must be equal."""
    # [n, 1] against [n] would broadcast to n² pairs without an error.
    assert predictions.shape == labels.shape == (len(labels),), (predictions.shape, labels.shape)
    if len(labels) == 0:
        raise ValueError("expected at least one example, got none; check the evaluation split")


def require_finite(name: str, values: np.ndarray) -> None:
    """Raises ValueError, with `name` in the message, where a value is NaN or infinite."""
    num_bad, num_nan = int((~np.isfinite(values)).sum()), int(np.isnan(values).sum())
    if num_bad:
        raise ValueError(
            f"expected finite {name}, got {num_nan} NaN and {num_bad - num_nan} infinite of "
            f"{values.size}; the model has diverged"
        )
