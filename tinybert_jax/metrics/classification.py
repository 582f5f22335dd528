"""Scores of predicted classes: accuracy, F1, Matthews correlation, confusion matrix."""

import numpy as np
from jaxtyping import Float, Int


def classification_metrics(
    predictions: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], num_classes: int
) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation of predicted classes, as fractions.

    With two classes `f1` is the F1 of class 1 (GLUE's MRPC and QQP), with more the unweighted mean
    over the classes that occur in labels or predictions. A score with denominator 0 is 0.0, as in
    scikit-learn. Raises ValueError for an empty set or a class outside of `num_classes`.
    """
    counts = confusion_matrix(predictions, labels, num_classes)
    f1 = _f1_per_class(counts)
    occurs = counts.sum(0) + counts.sum(1) > 0
    return {
        "accuracy": float(np.trace(counts) / counts.sum()),
        "f1": float(f1[1] if len(f1) == 2 else f1[occurs].mean()),
        "matthews": _matthews(counts),
    }


def predicted_classes(logits: Float[np.ndarray, "n classes"]) -> Int[np.ndarray, " n"]:
    """The class with the highest logit; ValueError for a single class or NaN."""
    if logits.shape[1] < 2:
        raise ValueError(
            f"expected logits of at least 2 classes, got {logits.shape[1]}; for a single output "
            "use regression_metrics"
        )
    require_no_nan("logits", logits)
    return logits.argmax(-1)


def confusion_matrix(
    predictions: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], num_labels: int
) -> Int[np.ndarray, "num_labels num_labels"]:
    """Number of examples by [true class, predicted class].

    Raises ValueError for an empty set or a class outside 0..num_labels-1.
    """
    require_aligned(predictions, labels)
    for name, classes in (("labels", labels), ("predictions", predictions)):
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= num_labels:
            raise ValueError(
                f"expected {name} in 0..{num_labels - 1}, got {low}..{high}; "
                "check num_labels and that the split has labels"
            )
    cell = labels.astype(np.int64) * num_labels + predictions
    return np.bincount(cell, minlength=num_labels**2).reshape(num_labels, num_labels)


def _f1_per_class(counts: np.ndarray) -> np.ndarray:
    """2·tp / (2·tp + fp + fn); the denominator is the row sum plus the column sum of a class."""
    return 2 * np.diag(counts) / np.maximum(counts.sum(0) + counts.sum(1), 1)


def _matthews(counts: np.ndarray) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004); 0.0 where undefined."""
    true, predicted = counts.sum(1).astype(np.float64), counts.sum(0).astype(np.float64)
    total = true.sum()
    covariance = np.trace(counts) * total - true @ predicted
    spread = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def require_aligned(predictions: np.ndarray, labels: np.ndarray) -> None:
    """Raises ValueError for an empty set; the shapes of predictions and labels must be equal."""
    # [n, 1] against [n] would broadcast to n² pairs without an error.
    assert predictions.shape == labels.shape == (len(labels),), (predictions.shape, labels.shape)
    if len(labels) == 0:
        raise ValueError("expected at least one example, got none; check the evaluation split")


def require_no_nan(name: str, values: np.ndarray) -> None:
    """Raises ValueError, with `name` in the message, where a value is NaN."""
    num_bad = int(np.isnan(values).sum())
    if num_bad:
        raise ValueError(
            f"expected finite {name}, got {num_bad} NaN of {values.size}; the model has diverged"
        )
