"""Which of the models that are trained side by side keep their new parameters, and when to stop."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Standing(NamedTuple):
    """After an evaluation, by member."""

    is_better: dict[str, np.ndarray]  # bool [seeds]: the parameters to keep
    best_scores: dict[str, list[float]]  # of each seed
    evals_since_best: dict[str, int]  # of any seed
    is_over: bool


def compare_with_best(
    scores: Mapping[str, Sequence[float]],
    best_scores: Mapping[str, Sequence[float]] | None,
    evals_since_best: Mapping[str, int] | None,
    patience: int | None,
) -> Standing:
    """Compares each member's scores [seeds] with its best ones; higher is better.

    A member none of whose seeds got better in `patience` evaluations is done: its best stays as it
    is, whatever it scores later. All is over when every member is done.
    """
    limit = np.inf if patience is None else patience
    before = best_scores or {name: [-np.inf] * len(own) for name, own in scores.items()}
    waited = evals_since_best or dict.fromkeys(scores, 0)
    is_better = {
        name: np.greater(own, before[name]) & (waited[name] < limit) for name, own in scores.items()
    }
    best = {
        name: np.where(flags, scores[name], before[name]).tolist()
        for name, flags in is_better.items()
    }
    now = {name: 0 if flags.any() else waited[name] + 1 for name, flags in is_better.items()}
    return Standing(is_better, best, now, min(now.values()) >= limit)
