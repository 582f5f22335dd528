"""The order of training, and batches of rows of like length."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tinybert_jax.batches.batch import Plan


class Epochs(NamedTuple):
    """The order of training: a pure function of (seed, step)."""

    num_batches: int  # of every epoch
    plan: Callable[[int], list[Plan]]  # epoch -> its batches


def bucketed_epochs(
    lengths: np.ndarray, *, buckets: Sequence[int], global_batch_size: int, seed: Sequence[int]
) -> Epochs:
    """A row an example; a batch is padded to the bucket of its longest row."""
    return Epochs(
        num_batches(len(lengths), global_batch_size),
        lambda epoch: plan_epoch(
            lengths, buckets=buckets, global_batch_size=global_batch_size, seed=seed, epoch=epoch
        ),
    )


def num_batches(num_rows: int, global_batch_size: int) -> int:
    """Steps of one epoch: every row once; the last batch may hold filler."""
    return -(-num_rows // global_batch_size)


def plan_epoch(
    lengths: np.ndarray,
    *,
    buckets: Sequence[int],
    global_batch_size: int,
    seed: int | Sequence[int] | None,
    epoch: int = 0,
) -> list[Plan]:
    """Groups rows of like length into batches; each row exactly once, shuffled by (seed, epoch).

    A batch holds rows of one bucket; what is left of all buckets makes the last, mixed batches.
    `seed=None` keeps the given order within each bucket, for evaluation.
    """
    rng = None if seed is None else np.random.default_rng([*np.atleast_1d(seed), epoch])
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    bucket_of = np.searchsorted(buckets, lengths)
    assert bucket_of.max(initial=0) < len(buckets), "a row is longer than the widest bucket"
    groups, rest = [], []
    for bucket in range(len(buckets)):
        rows = order[bucket_of[order] == bucket]
        full = len(rows) // global_batch_size * global_batch_size
        groups.extend(np.split(rows[:full], full // global_batch_size) if full else [])
        rest.append(rows[full:])
    left = np.concatenate(rest)
    groups.extend(left[i : i + global_batch_size] for i in range(0, len(left), global_batch_size))
    plans = [_plan(rows, bucket_of, buckets, global_batch_size) for rows in groups]
    return plans if rng is None else [plans[i] for i in rng.permutation(len(plans))]


def _plan(
    rows: np.ndarray, bucket_of: np.ndarray, buckets: Sequence[int], global_batch_size: int
) -> Plan:
    filled = np.full(global_batch_size, -1, np.int64)
    filled[: len(rows)] = rows
    return Plan(filled, buckets[bucket_of[rows].max()])
