"""Bootstrap intervals of scores (Efron, 1979): how far a score moves with the examples drawn.

Every model of a run is scored on the same resamples of the examples, so that the difference of two
models, or any other function of several scores, has an interval too: a narrower one than with
resamples of its own for each model. Seeds are not resampled: the noise of training is not in it.
"""

from collections.abc import Callable, Sequence

import numpy as np

NUM_RESAMPLES = 1000
_SEED = 0

Metrics = Callable[[np.ndarray], dict[str, float]]  # outcomes [examples, …] -> scores by name


def resampled_scores(
    metrics: Metrics, outcomes: np.ndarray, *, num_resamples: int = NUM_RESAMPLES
) -> dict[str, np.ndarray]:
    """Each score on `num_resamples` draws of the examples with replacement, by name.

    The draws depend on the number of examples alone: two models that were scored on the same
    examples have the same draws. A score that a draw has not is NaN there.
    """
    draws = np.random.default_rng(_SEED)
    num_examples = len(outcomes)
    scores = [
        metrics(outcomes[draws.integers(0, num_examples, num_examples)])
        for _ in range(num_resamples)
    ]
    names = metrics(outcomes)
    return {name: np.array([score.get(name, np.nan) for score in scores]) for name in names}


def mean_over_seeds(by_seed: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The mean of the seeds of a model on each resample; seeds are not drawn."""
    return {name: np.mean([seed[name] for seed in by_seed], axis=0) for name in by_seed[0]}


def interval(values: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """The percentile interval that holds `share` of the resampled values that are finite."""
    tail = (1 - share) / 2
    low, high = np.nanquantile(np.where(np.isfinite(values), values, np.nan), [tail, 1 - tail])
    return float(low), float(high)
