"""The loader: global batch n is a pure function of (seed, n), and Grain's threads fetch it ahead.

One Grain element is one whole batch, asked for by its step number: any step is reached at once,
and neither the number of threads nor that of processes changes what a step sees. Each process
gathers its own slice of the global batch. Masking is not here: it runs on the device.
"""

import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np

from tinybert_jax.batches.batch import Batch, Plan, TokenRows, make_batch
from tinybert_jax.batches.bucketing import Epochs
from tinybert_jax.models.inputs import Text

BatchAt = Callable[[int], Batch]  # step -> this process's slice of its global batch

_ROUNDS = 6  # of the permutation; from 4 on neighbours were seen to stay neighbours by chance only
_CYCLE = 2**16  # rows after which the corpora of a mixture come in the same order again


@runtime_checkable
class RowSource(Protocol):
    """Rows of one width that can be gathered by their numbers."""

    @property
    def width(self) -> int: ...

    @property
    def num_rows(self) -> int: ...

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """int64 [n] -> int32 ids, segment ids (0: padding), token types [n, width], labels [n]."""
        ...


def prefetched(
    batch_at: BatchAt,
    *,
    start_step: int,
    placement: jax.sharding.Sharding | None = None,
    num_threads: int = 4,
    num_ahead: int = 8,
) -> Iterator[Batch]:
    """Batches from `start_step` on, for ever; `num_ahead` of them are made in advance.

    With a `placement` they are on their devices too, as one global batch of all processes.
    """

    def placed(step: int) -> Batch:
        batch = batch_at(step)
        if placement is None:
            return batch
        put = functools.partial(jax.make_array_from_process_local_data, placement)
        return jax.tree.map(put, batch)

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(placed)
    ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_ahead)
    return iter(steps.to_iter_dataset(ahead))


def planned_batches(
    rows: TokenRows,
    epochs: Epochs,
    *,
    pad_token_id: int,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchAt:
    """Batches of rows in memory, epoch by epoch as planned: bucketed or packed, filler at the end.

    An epoch is planned when its first batch is asked for, whatever the step.
    """
    lock = threading.Lock()  # one thread plans while the others wait for it

    @functools.lru_cache(maxsize=2)  # threads stand on both sides of an epoch's end
    def plans(epoch: int) -> list[Plan]:
        return epochs.plan(epoch)

    def batch_at(step: int) -> Batch:
        epoch, index = divmod(step, epochs.num_batches)
        with lock:
            plan = plans(epoch)[index]
        part = process_slice(len(plan.rows), process_index, process_count)
        return make_batch(rows, Plan(plan.rows[part], plan.width), pad_token_id)

    return batch_at


def mixed_batches(
    sources: Sequence[RowSource],
    weights: Sequence[float],
    *,
    global_batch_size: int,
    seed: Sequence[int],
    process_index: int = 0,
    process_count: int = 1,
) -> BatchAt:
    """Batches whose rows come from several corpora, each with its share of `weights`.

    Every corpus is gone through epoch by epoch, each row once in each, in an order of its own.
    Raises ValueError for corpora of different widths and for shares that are no shares.
    """
    check_mixture(sources, weights)
    draw = make_draws([source.num_rows for source in sources], weights, seed)
    part = process_slice(global_batch_size, process_index, process_count)
    within = np.arange(part.start, part.stop)

    def batch_at(step: int) -> Batch:
        corpus, row = draw(step * global_batch_size + within)
        fields: Any = _gather(sources, corpus, row)
        ids, segments, types, labels = fields
        weights: Any = np.ones(len(row), np.float32)
        return Batch(Text(ids, types), segments, {"labels": labels}, weights)

    return batch_at


def segment_rows(source: RowSource) -> TokenRows:
    """Every segment of a source's rows as a row of its own, in order: for evaluation.

    It has the label of the row that it comes from.
    """
    ids, segment_ids, types, labels = source.gather(np.arange(source.num_rows))
    starts = np.diff(segment_ids, axis=1, prepend=0) > 0
    real = segment_ids > 0
    offsets = np.append(np.flatnonzero(starts[real]), real.sum())
    lengths = np.diff(offsets)
    num_second = np.add.reduceat(types[real], offsets[:-1])
    second = (lengths - num_second).astype(np.int32)
    return TokenRows(ids[real], offsets, second, np.repeat(labels, starts.sum(axis=1)), 0)


def process_slice(global_batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that one process loads: its devices' own, in mesh order."""
    size, left = divmod(global_batch_size, process_count)
    if left:
        raise ValueError(
            f"global_batch_size: expected a multiple of the {process_count} processes, got "
            f"{global_batch_size}; use {(size + 1) * process_count}"
        )
    return slice(process_index * size, (process_index + 1) * size)


def make_draws(
    sizes: Sequence[int], weights: Sequence[float], seed: Sequence[int]
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """places in the stream of all rows [n] -> (corpus [n], row in that corpus [n]).

    The stream is cut into cycles. All have the same pattern of corpora, drawn once and with exact
    shares, so that a place alone tells how often its corpus came before: nothing is replayed.
    """
    quotas = _quotas(weights)
    pattern = np.repeat(np.arange(len(quotas)), quotas)
    pattern = np.random.default_rng(seed).permutation(pattern)
    rank = np.empty(_CYCLE, np.int64)  # how often a place's corpus came before in its cycle
    for corpus, quota in enumerate(quotas):
        rank[pattern == corpus] = np.arange(quota)

    def draw(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cycle, place = np.divmod(places, _CYCLE)
        corpus = pattern[place]
        count = cycle * quotas[corpus] + rank[place]
        epoch, index = np.divmod(count, np.asarray(sizes)[corpus])
        row = np.empty(len(places), np.int64)
        for number in np.unique(corpus).tolist():
            here = np.flatnonzero(corpus == number)
            row[here] = shuffled(index[here], epoch[here], sizes[number], (*seed, number))
        return corpus, row

    return draw


def shuffled(index: np.ndarray, epoch: np.ndarray, size: int, seed: Sequence[int]) -> np.ndarray:
    """What an epoch's random order of range(size) has at places `index`, without the order itself.

    A Feistel network on pairs below ⌈√size⌉, the epoch a part of its key; a value that comes out
    beyond `size` goes through it again.
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    keys = np.random.default_rng(seed).integers(0, 2**64, (_ROUNDS, 3), np.uint64)
    half = np.uint64(32)

    def permuted(values: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        left, right = np.divmod(values, side)
        for addend, factor, epoch_factor in keys | np.uint64(1):
            hashed = right * factor + (epoch * epoch_factor + addend)
            hashed = (hashed ^ hashed >> half) * factor >> half
            left, right = right, (left + hashed) % side
        return left * side + right

    epoch = epoch.astype(np.uint64)
    rows = permuted(index.astype(np.uint64), epoch)
    while (beyond := np.flatnonzero(rows >= size)).size:
        rows[beyond] = permuted(rows[beyond], epoch[beyond])
    return rows.astype(np.int64)


def _gather(sources: Sequence[RowSource], corpus: np.ndarray, row: np.ndarray) -> list[np.ndarray]:
    """The fields of the rows, each row at its own place."""
    fields: list[np.ndarray] = []
    for number, source in enumerate(sources):
        places = np.flatnonzero(corpus == number)
        if len(places) == len(row):
            return list(source.gather(row))
        part = source.gather(row[places])
        fields = fields or [np.empty((len(row), *v.shape[1:]), v.dtype) for v in part]
        for field, values in zip(fields, part, strict=True):
            field[places] = values
    return fields


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """Rows of each corpus in a cycle: largest remainders."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * _CYCLE
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: _CYCLE - quotas.sum()]] += 1
    return quotas


def check_mixture(sources: Sequence[RowSource], weights: Sequence[float]) -> None:
    """Raises ValueError for shares, widths or sizes from which no batch can be made."""
    if len(sources) != len(weights) or not sources:
        raise ValueError(
            f"shares of corpora: expected one for each, got {len(weights)} for {len(sources)}"
        )
    least = np.sum(weights) / _CYCLE
    if not np.isfinite(weights).all() or not (np.asarray(weights) > least).all():
        raise ValueError(
            f"shares of corpora: expected each above 1/{_CYCLE} of their sum, got {list(weights)}; "
            "leave a corpus out instead of giving it next to nothing"
        )
    widths = [source.width for source in sources]
    if len(set(widths)) > 1:
        raise ValueError(
            f"corpora: expected one width for all, got {widths}; prepare them with one max_length"
        )
    if not all(source.num_rows for source in sources):
        raise ValueError(
            f"corpora: expected rows in each, got {[source.num_rows for source in sources]}; "
            "leave the empty ones out"
        )
