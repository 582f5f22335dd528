"""The order of training, and batches of examples of similar length (bucketing)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tinybert_jax.batches.batch import Plan


class Epochs(NamedTuple):
    """The batches of every epoch in order: a pure function of (seed, epoch)."""

    num_batches: int  # per epoch
    plan: Callable[[int], list[Plan]]  # epoch -> batches


def bucketed_epochs(
    lengths: np.ndarray, *, buckets: Sequence[int], global_batch_size: int, seed: Sequence[int]
) -> Epochs:
    """Batches with one example per row, padded to the bucket of the longest row."""
    return Epochs(
        num_batches(len(lengths), global_batch_size),
        lambda epoch: plan_epoch(
            lengths, buckets=buckets, global_batch_size=global_batch_size, seed=seed, epoch=epoch
        ),
    )


def num_batches(num_rows: int, global_batch_size: int) -> int:
    """Batches per epoch: every row once; filler rows complete the last batch."""
    return -(-num_rows // global_batch_size)


def plan_epoch(
    lengths: np.ndarray,
    *,
    buckets: Sequence[int],
    global_batch_size: int,
    seed: int | Sequence[int] | None,
    epoch: int = 0,
) -> list[Plan]:
    """Groups rows of similar length into batches; every row once, shuffled by (seed, epoch).

    A batch holds rows of one bucket; the remaining rows of all buckets form mixed batches.
    `seed=None` keeps the given order within a bucket, for evaluation.
    """
    rng = None if seed is None else np.random.default_rng([*np.atleast_1d(seed), epoch])
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    bucket_of = np.searchsorted(buckets, lengths)
    assert bucket_of.max(initial=0) < len(buckets), "a row is longer than the widest bucket"
    groups, remainders = [], []
    for bucket in range(len(buckets)):
        rows = order[bucket_of[order] == bucket]
        full = len(rows) // global_batch_size * global_batch_size
        groups.extend(np.split(rows[:full], full // global_batch_size) if full else [])
        remainders.append(rows[full:])
    mixed = np.concatenate(remainders)
    groups.extend(mixed[i : i + global_batch_size] for i in range(0, len(mixed), global_batch_size))
    plans = [_plan_batch(rows, bucket_of, buckets, global_batch_size) for rows in groups]
    return plans if rng is None else [plans[i] for i in rng.permutation(len(plans))]


def _plan_batch(
    rows: np.ndarray, bucket_of: np.ndarray, buckets: Sequence[int], global_batch_size: int
) -> Plan:
    filled = np.full(global_batch_size, -1, np.int64)
    filled[: len(rows)] = rows
    return Plan(filled, buckets[bucket_of[rows].max()])


def spread_texts(epochs: Epochs, num_texts: int) -> Epochs:
    """Plans of rows, of plans of examples whose `num_texts` rows come one after the other."""
    if num_texts == 1:
        return epochs

    def spread(plan: Plan) -> Plan:
        rows = plan.rows[..., None] * num_texts + np.arange(num_texts)
        rows = np.where(plan.rows[..., None] < 0, -1, rows)
        return Plan(rows.reshape(*plan.rows.shape[:-1], -1), plan.width)

    return Epochs(epochs.num_batches, lambda epoch: [spread(plan) for plan in epochs.plan(epoch)])
