"""Packs several examples into one row: assigns examples to rows (bins) by length.

The bins are packed once, from the seed; an epoch shuffles whole bins. So every epoch has the same
number of batches, and a run resumes at any step without replaying the steps before.
"""

import bisect
from collections.abc import Sequence

import numpy as np

from tinybert_jax.batches.batch import Plan
from tinybert_jax.batches.bucketing import Epochs, num_batches


def pack(lengths: np.ndarray, width: int, *, seed: int | tuple[int, ...]) -> np.ndarray:
    """Example numbers int64 [bins, segments], every example once; −1 fills up bins with fewer.

    Best fit, longest first: an example goes into the fullest bin with enough room. `seed` shuffles
    examples of equal length, and the examples of a bin.
    """
    assert lengths.max(initial=0) <= width, "an example is longer than a row"
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    bins: list[list[int]] = []
    bins_by_room: list[list[int]] = [[] for _ in range(width + 1)]  # free tokens -> bins
    rooms: list[int] = []  # numbers of free tokens for which there are bins, ascending
    for example in order.tolist():
        length = int(lengths[example])
        index = bisect.bisect_left(rooms, length)
        if index == len(rooms):
            bins.append([])
            chosen, room = len(bins) - 1, width
        else:
            room = rooms[index]
            chosen = bins_by_room[room].pop()
            if not bins_by_room[room]:
                rooms.pop(index)
        bins[chosen].append(example)
        new_room = room - length
        if not bins_by_room[new_room]:
            bisect.insort(rooms, new_room)
        bins_by_room[new_room].append(chosen)
    packed = np.full((len(bins), max(map(len, bins), default=0)), -1, np.int64)
    for row, examples in enumerate(bins):
        packed[row, : len(examples)] = rng.permutation(examples)
    return packed


def rows_per_batch(num_bins: int, num_examples: int, global_batch_size: int, multiple: int) -> int:
    """Rows for `global_batch_size` examples on average, rounded to a multiple of `multiple`."""
    rows = global_batch_size * num_bins / max(num_examples, 1)
    return max(1, round(rows / multiple)) * multiple


def packed_epochs(
    lengths: np.ndarray,
    *,
    width: int,
    global_batch_size: int,
    seed: Sequence[int],
    multiple: int = 1,
    num_shards: int = 1,
) -> Epochs:
    """Batches of packed rows with `global_batch_size` examples on average.

    All batches have the same number of rows, a multiple of `multiple`. Rows without examples then
    fill each batch up to a multiple of `num_shards` × `multiple`, so that the examples of a batch
    do not depend on the number of devices.
    """
    bins = pack(lengths, width, seed=tuple(seed))
    size = rows_per_batch(len(bins), len(lengths), global_batch_size, multiple)
    num = num_batches(len(bins), size)

    def plan(epoch: int) -> list[Plan]:
        order = np.random.default_rng([*seed, epoch]).permutation(len(bins))
        filled = np.full((num * size, bins.shape[1]), -1, np.int64)
        filled[: len(bins)] = bins[order]
        filler = np.full((-size % (num_shards * multiple), bins.shape[1]), -1, np.int64)
        return [Plan(np.concatenate([rows, filler]), width) for rows in np.split(filled, num)]

    return Epochs(num, plan)
