"""From text to batches: ragged token rows, a plan of batches per epoch, arrays of static shapes.

The order of examples is a pure function of (seed, step): nothing has to be replayed to resume.
"""

import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np

from tinybert_jax.models.inputs import Text


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
    """The examples of one step, padded to one width. An example of weight 0 is only filler.

    Packed rows hold several examples: their `attention_mask` is the segment ids 1, 2, … (0:
    padding), and `weights` and the targets of examples have a second axis. Rows of a token store
    have segment ids too, but one label and one weight a row. The fields are NumPy arrays until the
    batch is placed on devices.
    """

    inputs: Text
    attention_mask: jax.Array  # bool [batch, seq]; packed: int32, segment ids
    targets: dict[str, jax.Array]  # what the task or the objective predicts; see `tasks`, `masking`
    weights: jax.Array  # fp32 [batch], 1 or 0; packed: [batch, segments]
    teacher_logits: jax.Array | None = None  # fp32 [batch, outputs]; packed: [batch, segments, …]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, width)."""
        num_rows, width = self.attention_mask.shape
        return num_rows, width

    @property
    def num_slots(self) -> int:
        """Tokens and padding."""
        return self.attention_mask.size

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
    read: Any = (ids, types)  # NumPy, where the fields of a placed batch are arrays of JAX
    fields: dict[str, Any] = dict(
        inputs=Text(*read),
        attention_mask=segments if is_packed else segments > 0,
        targets={"labels": labels if is_packed else labels[:, 0]},
        weights=weights if is_packed else weights[:, 0],
        teacher_logits=logits if is_packed or logits is None else logits[:, 0],
    )
    return Batch(**fields)
