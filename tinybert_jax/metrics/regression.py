"""Scores of predicted numbers: correlations and squared error."""

import numpy as np
from jaxtyping import Real

from tinybert_jax.metrics.classification import require_aligned, require_finite


def regression_metrics(
    predictions: Real[np.ndarray, " n"], labels: Real[np.ndarray, " n"]
) -> dict[str, float]:
    """Pearson and Spearman correlation and mean squared error.

    The correlation with a constant is undefined and reported as 0.0 (nothing learnt), so that the
    best checkpoint can still be chosen. Raises ValueError for an empty set, NaN or Inf.
    """
    require_aligned(predictions, labels)
    require_finite("predictions", predictions)
    require_finite("labels", labels)
    predictions, labels = predictions.astype(np.float64), labels.astype(np.float64)
    return {
        "pearson": _pearson(predictions, labels),
        "spearman": _pearson(_average_ranks(predictions), _average_ranks(labels)),
        "mse": float(np.mean(np.square(predictions - labels))),
    }


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    # Tests the range, not the variance: the mean of equal floats may round to another float.
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    # Scaled first, so that squaring neither overflows nor underflows.
    x, y = ((v - v.mean()) / np.ptp(v) for v in (x, y))
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def _average_ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of the ranks they span."""
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]
