"""Several examples in one row: which go together. Knows lengths only.

The bins are packed once, from the seed; an epoch shuffles whole bins. So every epoch has the same
number of batches and any step is reached without replay.
"""

import bisect
from collections.abc import Sequence

import numpy as np

from tinybert_jax.batches.batch import Plan
from tinybert_jax.batches.bucketing import Epochs, num_batches


def pack(lengths: np.ndarray, width: int, *, seed: int | tuple[int, ...]) -> np.ndarray:
    """Example numbers [bins, segments], −1 where a bin holds fewer; each example exactly once.

    Best fit, longest first: an example goes to the fullest bin that has room. Examples of one
    length are taken in an order drawn from `seed`.
    """
    assert lengths.max(initial=0) <= width, "an example is longer than a row"
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(width + 1)]  # free slots -> bins
    rooms: list[int] = []  # the free slots that some bin has, rising
    for example in order.tolist():
        length = int(lengths[example])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            bins.append([])
            chosen, room = len(bins) - 1, width
        else:
            room = rooms[place]
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(place)
        bins[chosen].append(example)
        left = room - length
        if not by_room[left]:
            bisect.insort(rooms, left)
        by_room[left].append(chosen)
    packed = np.full((len(bins), max(map(len, bins), default=0)), -1, np.int64)
    for row, examples in enumerate(bins):
        packed[row, : len(examples)] = rng.permutation(examples)
    return packed


def rows_per_batch(num_bins: int, num_examples: int, global_batch_size: int, multiple: int) -> int:
    """Rows that hold `global_batch_size` examples on average, rounded to a multiple."""
    rows = global_batch_size * num_bins / max(num_examples, 1)
    return max(1, round(rows / multiple)) * multiple


def packed_epochs(
    lengths: np.ndarray,
    *,
    width: int,
    global_batch_size: int,
    seed: Sequence[int],
    multiple: int = 1,
) -> Epochs:
    """Rows of several examples; `global_batch_size` examples a batch on average.

    The number of rows in a batch is the same for all, and a multiple of `multiple`.
    """
    bins = pack(lengths, width, seed=tuple(seed))
    size = rows_per_batch(len(bins), len(lengths), global_batch_size, multiple)
    num = num_batches(len(bins), size)

    def plan(epoch: int) -> list[Plan]:
        order = np.random.default_rng([*seed, epoch]).permutation(len(bins))
        filled = np.full((num * size, bins.shape[1]), -1, np.int64)
        filled[: len(bins)] = bins[order]
        return [Plan(rows, width) for rows in np.split(filled, num)]

    return Epochs(num, plan)
