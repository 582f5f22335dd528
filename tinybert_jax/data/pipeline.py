"""From text to batches: ragged token rows, a plan of batches per epoch, arrays of static shapes.

The order of examples is a pure function of (seed, step): nothing has to be replayed to resume.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tinybert_jax.data import packing
from tinybert_jax.data.tables import LabelledText
from tinybert_jax.data.wordpiece import plain_backend

MIN_TOKENS = 4  # a corpus chunk shorter than this teaches nothing: [CLS] one word [SEP]


class TokenRows(NamedTuple):
    """Examples of any length, end to end: row i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: np.ndarray  # int32 [tokens], special tokens included
    offsets: np.ndarray  # int64 [rows + 1]
    second: np.ndarray  # int32 [rows]; where segment B begins within the row; its length if none
    labels: np.ndarray | None  # [rows] int32 classes or fp32 values
    num_truncated: int  # rows cut at max_length
    teacher_logits: np.ndarray | None = None  # fp32 [rows, outputs], where they are known

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def part(self, start: int, stop: int) -> "TokenRows":
        """Rows `start` to `stop`, as rows of their own."""
        begin, end = self.offsets[start], self.offsets[stop]
        labels, logits = self.labels, self.teacher_logits
        return TokenRows(
            self.ids[begin:end],
            self.offsets[start : stop + 1] - begin,
            self.second[start:stop],
            None if labels is None else labels[start:stop],
            0,
            None if logits is None else logits[start:stop],
        )

    def fingerprint(self) -> str:
        """SHA-256 of the text and its labels: what a resumed run compares."""
        digest = hashlib.sha256()
        for array in (self.ids, self.offsets, self.second, self.labels):
            digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class Batch(NamedTuple):
    """One step's examples, padded to one width. An example of weight 0 is only filler.

    Packed rows hold several examples: their `attention_mask` is the segment ids 1, 2, … (0:
    padding), labels and weights have a second axis. Rows of a token store have segment ids too,
    but one label and one weight a row. The fields are NumPy arrays until the batch is
    placed on devices.
    """

    input_ids: jax.Array  # int32 [batch, seq]
    attention_mask: jax.Array  # bool [batch, seq]; packed: int32, segment ids
    token_type_ids: jax.Array  # int32 [batch, seq]
    labels: Any  # int32 or fp32 [batch]; packed: [batch, segments]; -1 where there are none. Once
    # an objective has masked a batch: its MaskedLabels
    weights: jax.Array  # fp32 [batch], 1 or 0; packed: [batch, segments]
    teacher_logits: jax.Array | None = None  # fp32 [batch, outputs]; packed: [batch, segments, …]

    @property
    def real(self) -> jax.Array:
        """bool [batch, seq]: no padding."""
        return self.attention_mask.astype(bool)

    @property
    def num_segments(self) -> int | None:
        """Examples that a packed row has room for; None for a row an example."""
        return self.weights.shape[1] if self.weights.ndim == 2 else None


class Plan(NamedTuple):
    """Which examples make a batch (−1: filler) and how wide it is padded."""

    rows: np.ndarray  # int64 [batch]; packed: [batch, segments]
    width: int


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
    bins = packing.pack(lengths, width, seed=tuple(seed))
    size = packing.rows_per_batch(len(bins), len(lengths), global_batch_size, multiple)
    num = num_batches(len(bins), size)

    def plan(epoch: int) -> list[Plan]:
        order = np.random.default_rng([*seed, epoch]).permutation(len(bins))
        filled = np.full((num * size, bins.shape[1]), -1, np.int64)
        filled[: len(bins)] = bins[order]
        return [Plan(rows, width) for rows in np.split(filled, num)]

    return Epochs(num, plan)


def tokenize_task(tokenizer: Any, text: LabelledText, max_length: int) -> TokenRows:
    """[CLS] text [SEP], or [CLS] text [SEP] text_pair [SEP]; the longer part is cut first."""
    backend = plain_backend(tokenizer)
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
    backend = plain_backend(tokenizer)
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
    """Gathers a plan's examples into padded arrays, those of a packed row end to end."""
    is_packed = plan.rows.ndim == 2
    examples = plan.rows if is_packed else plan.rows[:, None]
    real = examples >= 0
    chosen = np.where(real, examples, 0)
    lengths = np.where(real, np.diff(rows.offsets)[chosen], 0)
    starts = np.cumsum(lengths, axis=1) - lengths

    # One entry a token: its row, its column, its place in `rows.ids`.
    per_example = lengths.ravel()
    within = np.arange(per_example.sum()) - np.repeat(
        np.cumsum(per_example) - per_example, per_example
    )
    row = np.repeat(np.repeat(np.arange(len(examples)), examples.shape[1]), per_example)
    column = within + np.repeat(starts.ravel(), per_example)
    source = within + np.repeat(rows.offsets[chosen].ravel(), per_example)

    shape = (len(examples), plan.width)
    ids = np.full(shape, pad_token_id, np.int32)
    segments, types = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    ids[row, column] = rows.ids[source]
    segments[row, column] = np.repeat(
        np.tile(np.arange(1, examples.shape[1] + 1), len(examples)), per_example
    )
    types[row, column] = within >= np.repeat(rows.second[chosen].ravel(), per_example)
    labels = np.full(chosen.shape, -1, np.int32) if rows.labels is None else rows.labels[chosen]
    weights = real.astype(np.float32)
    logits = None if rows.teacher_logits is None else rows.teacher_logits[chosen]
    fields: dict[str, Any] = dict(
        input_ids=ids,
        attention_mask=segments if is_packed else segments > 0,
        token_type_ids=types,
        labels=labels if is_packed else labels[:, 0],
        weights=weights if is_packed else weights[:, 0],
        teacher_logits=logits if is_packed or logits is None else logits[:, 0],
    )
    return Batch(**fields)


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
