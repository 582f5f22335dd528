"""Loads batches: global batch n is a pure function of (seed, n), prefetched by Grain's threads.

One Grain element is one whole batch, addressed by step: any step is available at once, and the
numbers of threads and processes do not change a batch. Every process gathers one slice of the
global batch. Masking runs on the device, not here.
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

BatchAt = Callable[[int], Batch]  # step -> this process's slice of the global batch

_ROUNDS = 6  # of the Feistel network; from 4 on, neighbours stayed neighbours only by chance
_CYCLE = 2**16  # rows of a mixture after which the order of the corpora repeats


@runtime_checkable
class RowSource(Protocol):
    """Rows of one width, gathered by row number."""

    @property
    def width(self) -> int: ...

    @property
    def num_rows(self) -> int: ...

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Row numbers [n] -> int32 ids, segment ids (0: padding), types [n, width], labels [n]."""
        ...


def prefetched(
    batch_at: BatchAt,
    *,
    start_step: int,
    placement: jax.sharding.Sharding | None = None,
    num_threads: int = 4,
    num_ahead: int = 8,
) -> Iterator[Batch]:
    """Endless batches from `start_step` on, `num_ahead` of them made in advance.

    `placement` puts them on devices, as one global batch of all processes.
    """

    def placed_batch(step: int) -> Batch:
        batch = batch_at(step)
        if placement is None:
            return batch
        put = functools.partial(jax.make_array_from_process_local_data, placement)
        return jax.tree.map(put, batch)

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(placed_batch)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_ahead)
    return iter(steps.to_iter_dataset(options))


def planned_batches(
    rows: TokenRows,
    epochs: Epochs,
    *,
    pad_token_id: int,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchAt:
    """Batches of rows in memory in the order that `epochs` plans; filler completes the last batch.

    The first request for a batch of an epoch plans that epoch.
    """
    lock = threading.Lock()  # one thread plans an epoch while the others wait

    @functools.lru_cache(maxsize=2)  # threads prefetch across the end of an epoch
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
    """Batches that mix the rows of several corpora in proportion to `weights`.

    Every corpus is read epoch by epoch: all rows once, in a new random order per epoch. Raises
    ValueError as `check_mixture` does.
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
    """Unpacks rows for evaluation: one row per segment, in order, with the label of the old row."""
    ids, segment_ids, types, labels = source.gather(np.arange(source.num_rows))
    starts = np.diff(segment_ids, axis=1, prepend=0) > 0
    real = segment_ids > 0
    offsets = np.append(np.flatnonzero(starts[real]), real.sum())
    lengths = np.diff(offsets)
    num_second = np.add.reduceat(types[real], offsets[:-1])
    second = (lengths - num_second).astype(np.int32)
    return TokenRows(ids[real], offsets, second, np.repeat(labels, starts.sum(axis=1)), 0)


def process_slice(global_batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that one process loads for its devices, in mesh order."""
    size, remainder = divmod(global_batch_size, process_count)
    if remainder:
        raise ValueError(
            f"global_batch_size: expected a multiple of the {process_count} processes, got "
            f"{global_batch_size}; use {(size + 1) * process_count}"
        )
    return slice(process_index * size, (process_index + 1) * size)


def make_draws(
    sizes: Sequence[int], weights: Sequence[float], seed: Sequence[int]
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Makes a function: positions in the mixed stream [n] -> (corpus [n], row of the corpus [n]).

    The stream consists of cycles with one pattern of corpora, drawn once and with exact shares. So
    a position determines how many rows of the same corpus precede it, without replaying the stream.
    """
    quotas = _quotas(weights)
    pattern = np.repeat(np.arange(len(quotas)), quotas)
    pattern = np.random.default_rng(seed).permutation(pattern)
    rank = np.empty(_CYCLE, np.int64)  # rows of the same corpus that precede it in the cycle
    for corpus, quota in enumerate(quotas):
        rank[pattern == corpus] = np.arange(quota)

    def draw(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cycle, position = np.divmod(positions, _CYCLE)
        corpus = pattern[position]
        count = cycle * quotas[corpus] + rank[position]
        epoch, index = np.divmod(count, np.asarray(sizes)[corpus])
        row = np.empty(len(positions), np.int64)
        for number in np.unique(corpus).tolist():
            here = np.flatnonzero(corpus == number)
            row[here] = permute(index[here], epoch[here], sizes[number], (*seed, number))
        return corpus, row

    return draw


def permute(index: np.ndarray, epoch: np.ndarray, size: int, seed: Sequence[int]) -> np.ndarray:
    """The elements `index` of a random permutation of range(size) that depends on epoch and seed.

    Computes only these elements: a Feistel network on pairs below ⌈√size⌉, keyed by seed and epoch;
    a result of `size` or more passes through the network again.
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    keys = np.random.default_rng(seed).integers(0, 2**64, (_ROUNDS, 3), np.uint64)
    half = np.uint64(32)

    def feistel(values: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        left, right = np.divmod(values, side)
        for addend, factor, epoch_factor in keys | np.uint64(1):
            hashed = right * factor + (epoch * epoch_factor + addend)
            hashed = (hashed ^ hashed >> half) * factor >> half
            left, right = right, (left + hashed) % side
        return left * side + right

    epoch = epoch.astype(np.uint64)
    rows = feistel(index.astype(np.uint64), epoch)
    while (too_large := np.flatnonzero(rows >= size)).size:
        rows[too_large] = feistel(rows[too_large], epoch[too_large])
    return rows.astype(np.int64)


def _gather(sources: Sequence[RowSource], corpus: np.ndarray, row: np.ndarray) -> list[np.ndarray]:
    """The fields of rows `row` of the sources `corpus`, in this order."""
    fields: list[np.ndarray] = []
    for number, source in enumerate(sources):
        here = np.flatnonzero(corpus == number)
        if len(here) == len(row):
            return list(source.gather(row))
        part = source.gather(row[here])
        fields = fields or [np.empty((len(row), *v.shape[1:]), v.dtype) for v in part]
        for field, values in zip(fields, part, strict=True):
            field[here] = values
    return fields


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """Rows of every corpus in a cycle, rounded by largest remainders."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * _CYCLE
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: _CYCLE - quotas.sum()]] += 1
    return quotas


def check_mixture(sources: Sequence[RowSource], weights: Sequence[float]) -> None:
    """Raises ValueError for shares, widths or sizes of corpora from which no batch can be made."""
    if len(sources) != len(weights) or not sources:
        raise ValueError(
            f"shares of corpora: expected one share per corpus, got {len(weights)} shares for "
            f"{len(sources)} corpora; give every corpus a share"
        )
    smallest = np.sum(weights) / _CYCLE
    if not np.isfinite(weights).all() or not (np.asarray(weights) > smallest).all():
        raise ValueError(
            f"shares of corpora: expected shares above 1/{_CYCLE} of their sum, got "
            f"{list(weights)}; raise the smallest share or leave out that corpus"
        )
    widths = [source.width for source in sources]
    if len(set(widths)) > 1:
        raise ValueError(
            f"corpora: expected stores of one width, got {widths}; prepare them with the same width"
        )
    if not all(source.num_rows for source in sources):
        raise ValueError(
            f"corpora: expected rows in every corpus, got {[s.num_rows for s in sources]}; "
            "leave out corpora without rows"
        )
