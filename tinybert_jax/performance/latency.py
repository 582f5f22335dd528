"""Latency of several functions, measured in turn."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

NUM_ROUNDS, _NUM_WARM_UP = 50, 3


class Latency(NamedTuple):
    """Milliseconds of one call: the median, and the quartiles."""

    median: float
    low: float
    high: float


def measure_in_turn(
    calls: Sequence[Callable[[], Any]], num_rounds: int = NUM_ROUNDS
) -> list[Latency]:
    """The latency of each call; every round calls each once.

    Whatever else the machine does then slows all of them alike, and ratios of the medians hold.
    Each call returns arrays, whose results are waited for. The first rounds, which compile, are
    left out.
    """
    times = np.zeros((num_rounds + _NUM_WARM_UP, len(calls)))
    for row in times:
        for place, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            row[place] = 1000 * (time.perf_counter() - start)
    low, median, high = np.quantile(times[_NUM_WARM_UP:], [0.25, 0.5, 0.75], axis=0).tolist()
    return [Latency(*own) for own in zip(median, low, high, strict=True)]
