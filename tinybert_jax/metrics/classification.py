"""Scores of predicted classes: accuracy, F1, Matthews correlation, confusion counts."""

import numpy as np
from jaxtyping import Float, Int


def classification_metrics(
    logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation of the arg-max class, each as a fraction.

    `f1` is that of class 1 for two classes (GLUE's MRPC and QQP), else the plain mean over the
    classes that occur in labels or predictions. Whatever would divide by zero is 0.0, as in
    scikit-learn. Raises ValueError for an empty set, NaN logits or labels outside the classes.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"expected logits [n, classes] with at least 2 classes, got {logits.shape}; "
            "a single output is a regression: use regression_metrics"
        )
    require_no_nan("logits", logits)
    counts = confusion_matrix(logits.argmax(-1), labels, logits.shape[1])
    f1 = _f1_per_class(counts)
    occurs = counts.sum(0) + counts.sum(1) > 0
    return {
        "accuracy": float(np.trace(counts) / counts.sum()),
        "f1": float(f1[1] if len(f1) == 2 else f1[occurs].mean()),
        "matthews": _matthews(counts),
    }


def confusion_matrix(
    predictions: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], num_labels: int
) -> Int[np.ndarray, "num_labels num_labels"]:
    """Counts [true class, predicted class]; ValueError for an empty set or a class out of range."""
    require_pairs(predictions, labels)
    for name, classes in (("labels", labels), ("predictions", predictions)):
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= num_labels:
            raise ValueError(
                f"expected {name} in 0..{num_labels - 1}, got {low}..{high}; "
                "check num_labels, and that the split is a labelled one"
            )
    cell = labels.astype(np.int64) * num_labels + predictions
    return np.bincount(cell, minlength=num_labels**2).reshape(num_labels, num_labels)


def _f1_per_class(counts: np.ndarray) -> np.ndarray:
    """2·tp / (2·tp + fp + fn): the row and column sums together are that denominator."""
    return 2 * np.diag(counts) / np.maximum(counts.sum(0) + counts.sum(1), 1)


def _matthews(counts: np.ndarray) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004); 0.0 where undefined."""
    true, predicted = counts.sum(1).astype(np.float64), counts.sum(0).astype(np.float64)
    total = true.sum()
    covariance = np.trace(counts) * total - true @ predicted
    spread = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def require_pairs(predictions: np.ndarray, labels: np.ndarray) -> None:
    # [n, 1] against [n] would broadcast to n² pairs without a word.
    assert predictions.shape == labels.shape == (len(labels),), (predictions.shape, labels.shape)
    if len(labels) == 0:
        raise ValueError("expected at least one example, got none; check the evaluation split")


def require_no_nan(name: str, values: np.ndarray) -> None:
    num_bad = int(np.isnan(values).sum())
    if num_bad:
        raise ValueError(
            f"expected finite {name}, got {num_bad} NaN of {values.size}; the model has diverged"
        )
