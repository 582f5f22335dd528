"""Expected calibration error: how far probabilities are from the shares of right answers."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

NUM_BINS = 10


class Calibration(NamedTuple):
    """The error, and the examples of each bin that has any, by rising confidence."""

    error: float
    confidence: list[float]  # mean probability of the predicted class
    accuracy: list[float]  # share of right predictions
    count: list[int]


def calibration(
    confidence: Float[np.ndarray, " n"], is_right: Bool[np.ndarray, " n"]
) -> Calibration:
    """The mean of |accuracy - confidence| over bins of equal width, weighted by their examples.

    Guo et al. 2017 (arXiv 1706.04599), equation 3, with `NUM_BINS` bins; 0 is the best.
    """
    place = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    counts = np.bincount(place, minlength=NUM_BINS)
    there = np.flatnonzero(counts)
    means = np.bincount(place, weights=confidence, minlength=NUM_BINS)[there] / counts[there]
    shares = np.bincount(place, weights=is_right, minlength=NUM_BINS)[there] / counts[there]
    error = np.abs(shares - means) @ counts[there] / len(confidence)
    return Calibration(float(error), means.tolist(), shares.tolist(), counts[there].tolist())
