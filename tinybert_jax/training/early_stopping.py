"""Decides which models of a stage keep their new parameters, and when training stops."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Standing(NamedTuple):
    """Best scores after an evaluation, by member."""

    is_better: dict[str, np.ndarray]  # bool [seeds]: the new parameters are the best so far
    best_scores: dict[str, list[float]]  # [seeds]
    evals_since_best: dict[str, int]  # evaluations since a seed of the member improved
    is_over: bool  # every member is done


def compare_with_best(
    scores: Mapping[str, Sequence[float]],
    best_scores: Mapping[str, Sequence[float]] | None,
    evals_since_best: Mapping[str, int] | None,
    patience: int | None,
) -> Standing:
    """Compares the new scores [seeds] of every member with the best scores; higher is better.

    A member is done after `patience` evaluations in which no seed improved; later scores do not
    change its best scores. Training is over when every member is done.
    """
    limit = np.inf if patience is None else patience
    before = best_scores or {name: [-np.inf] * len(new) for name, new in scores.items()}
    num_evals = evals_since_best or dict.fromkeys(scores, 0)
    is_better = {
        name: np.greater(new, before[name]) & (num_evals[name] < limit)
        for name, new in scores.items()
    }
    best = {
        name: np.where(flags, scores[name], before[name]).tolist()
        for name, flags in is_better.items()
    }
    num_evals = {name: 0 if f.any() else num_evals[name] + 1 for name, f in is_better.items()}
    return Standing(is_better, best, num_evals, min(num_evals.values()) >= limit)
