"""From text to batches: ragged token rows, a plan of batches per epoch, arrays of static shapes.

The order of examples is a pure function of (seed, step): nothing has to be replayed to resume.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tinybert_jax.data.sources import LabelledText

MIN_TOKENS = 4  # a corpus chunk shorter than this teaches nothing: [CLS] one word [SEP]


class TokenRows(NamedTuple):
    """Examples of any length, end to end: row i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: np.ndarray  # int32 [tokens], special tokens included
    offsets: np.ndarray  # int64 [rows + 1]
    second: np.ndarray  # int32 [rows]; where segment B begins within the row; its length if none
    labels: np.ndarray | None  # [rows] int32 classes or fp32 values
    num_truncated: int  # rows cut at max_length

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def fingerprint(self) -> str:
        """SHA-256 of all content: what a resumed run compares."""
        digest = hashlib.sha256()
        for array in (self.ids, self.offsets, self.second, self.labels):
            digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class Batch(NamedTuple):
    """One step's examples, padded to one width. A row of weight 0 only fills the last batch.

    The fields are NumPy arrays until the batch is placed on devices.
    """

    input_ids: jax.Array  # int32 [batch, seq]
    attention_mask: jax.Array  # bool [batch, seq]
    token_type_ids: jax.Array  # int32 [batch, seq]
    labels: jax.Array  # int32 or fp32 [batch]
    weights: jax.Array  # fp32 [batch], 1 or 0


class Plan(NamedTuple):
    """Which rows make a batch (−1: filler) and how wide it is padded."""

    rows: np.ndarray  # int64 [batch]
    width: int


def tokenize_task(tokenizer: Any, text: LabelledText, max_length: int) -> TokenRows:
    """[CLS] text [SEP], or [CLS] text [SEP] text_pair [SEP]; the longer part is cut first."""
    backend = _backend(tokenizer)
    backend.enable_truncation(max_length, strategy="longest_first")
    pairs = (
        text.text if text.text_pair is None else list(zip(text.text, text.text_pair, strict=True))
    )
    encoded = backend.encode_batch(pairs)
    second = [len(e.ids) if 1 not in e.type_ids else e.type_ids.index(1) for e in encoded]
    num_truncated = sum(bool(e.overflowing) for e in encoded)
    return _rows([e.ids for e in encoded], second, text.labels, num_truncated)


def tokenize_corpus(tokenizer: Any, documents: Sequence[str], max_length: int) -> TokenRows:
    """Each document cut into full rows [CLS] … [SEP] of `max_length`; its rest is a shorter row."""
    backend = _backend(tokenizer)
    cls_id, sep_id, room = tokenizer.cls_token_id, tokenizer.sep_token_id, max_length - 2
    rows = []
    for start in range(0, len(documents), 4096):
        encoded = backend.encode_batch(
            list(documents[start : start + 4096]), add_special_tokens=False
        )
        for document in encoded:
            ids = document.ids
            for begin in range(0, len(ids), room):
                rows.append([cls_id, *ids[begin : begin + room], sep_id])
    rows = [row for row in rows if len(row) >= MIN_TOKENS]
    if not rows:
        raise ValueError(f"corpus: expected text, got none in {len(documents)} documents")
    return _rows(rows, [len(row) for row in rows], None, 0)


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


def make_batch(rows: TokenRows, plan: Plan, pad_token_id: int) -> Batch:
    """Gathers a plan's rows into padded arrays."""
    real = plan.rows >= 0
    chosen = np.where(real, plan.rows, 0)
    lengths = np.where(real, rows.lengths[chosen], 0)[:, None]
    columns = np.arange(plan.width)[None]
    mask = columns < lengths
    source = np.minimum(rows.offsets[chosen][:, None] + columns, len(rows.ids) - 1)
    labels = np.zeros(len(chosen), np.int32) if rows.labels is None else rows.labels[chosen]
    fields: dict[str, Any] = dict(
        input_ids=np.where(mask, rows.ids[source], pad_token_id).astype(np.int32),
        attention_mask=mask,
        token_type_ids=(mask & (columns >= rows.second[chosen][:, None])).astype(np.int32),
        labels=labels,
        weights=real.astype(np.float32),
    )
    return Batch(**fields)


def train_batches(
    rows: TokenRows,
    *,
    buckets: Sequence[int],
    global_batch_size: int,
    seed: int | Sequence[int],
    start_step: int,
    pad_token_id: int,
) -> Iterator[Batch]:
    """Batches from `start_step` on, for ever; batch n is the same whatever the start."""
    per_epoch = num_batches(len(rows.lengths), global_batch_size)
    epoch, index = divmod(start_step, per_epoch)
    while True:
        plans = plan_epoch(
            rows.lengths,
            buckets=buckets,
            global_batch_size=global_batch_size,
            seed=seed,
            epoch=epoch,
        )
        for plan in plans[index:]:
            yield make_batch(rows, plan, pad_token_id)
        epoch, index = epoch + 1, 0


def _plan(
    rows: np.ndarray, bucket_of: np.ndarray, buckets: Sequence[int], global_batch_size: int
) -> Plan:
    filled = np.full(global_batch_size, -1, np.int64)
    filled[: len(rows)] = rows
    return Plan(filled, buckets[bucket_of[rows].max()])


def _rows(ids, second, labels, num_truncated: int) -> TokenRows:
    lengths = np.fromiter((len(row) for row in ids), np.int64, len(ids))
    return TokenRows(
        ids=np.concatenate([np.asarray(row, np.int32) for row in ids]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second=np.asarray(second, np.int32),
        labels=labels,
        num_truncated=num_truncated,
    )


def _backend(tokenizer: Any) -> Any:
    """A copy of the Rust tokenizer, so that our truncation setting never leaks into a saved one."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend
