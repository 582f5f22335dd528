"""From text to batches: ragged token rows, a plan of batches per epoch, arrays of static shapes.

The order of examples is a pure function of (seed, step): nothing has to be replayed to resume.
"""

import hashlib
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from tinybert_jax.models.inputs import Text


class TokenRows(NamedTuple):
    """Examples of any length, end to end: row i is `ids[offsets[i]:offsets[i + 1]]`.

    A task scores units: each row is one, or, with `is_unit`, each token that is marked there.
    `labels` and `teacher_logits` are of the rows then, or of the tokens.
    """

    ids: np.ndarray  # int32 [tokens], special tokens included
    offsets: np.ndarray  # int64 [rows + 1]
    second: np.ndarray  # int32 [rows]; where segment B begins within the row; its length if none
    labels: np.ndarray | None  # int32 or fp32 [rows or tokens, …]
    num_truncated: int  # rows cut at max_length
    teacher_logits: np.ndarray | None = None  # fp32 [rows or tokens, outputs], where known
    is_unit: np.ndarray | None = None  # bool [tokens]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def num_scored(self) -> int:
        """Rows, or tokens where units are tokens: the length of an array of logits."""
        return len(self.lengths) if self.is_unit is None else len(self.ids)

    def part(self, start: int, stop: int) -> "TokenRows":
        """Rows `start` to `stop`, as rows of their own."""
        begin, end = self.offsets[start], self.offsets[stop]
        scored = slice(start, stop) if self.is_unit is None else slice(begin, end)

        def cut(values: np.ndarray | None, part: slice) -> np.ndarray | None:
            return None if values is None else values[part]

        return TokenRows(
            self.ids[begin:end],
            self.offsets[start : stop + 1] - begin,
            self.second[start:stop],
            cut(self.labels, scored),
            0,
            cut(self.teacher_logits, scored),
            cut(self.is_unit, slice(begin, end)),
        )

    def fingerprint(self) -> str:
        """SHA-256 of the text and its labels: what a resumed run compares."""
        digest = hashlib.sha256()
        marks = () if self.is_unit is None else (self.is_unit,)
        for array in (self.ids, self.offsets, self.second, self.labels, *marks):
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
    targets: dict[str, jax.Array]  # `labels` [batch, …], packed [batch, segments, …]; where units
    # are tokens `labels` and `units` (fp32, 1 for a unit) [batch, seq]; those of masking.make_mask
    weights: jax.Array  # fp32 [batch], 1 or 0; packed: [batch, segments]
    teacher_logits: jax.Array | None = None  # fp32, shaped as labels of classes with [outputs]

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


class Places(NamedTuple):
    """Where each token of a planned batch goes: one entry a token."""

    row: np.ndarray
    column: np.ndarray
    source: np.ndarray  # its place in `TokenRows.ids`
    segment: np.ndarray  # its example within the row, from 1
    within: np.ndarray  # its place within the example


def token_places(rows: TokenRows, plan: Plan) -> Places:
    examples = plan.rows if plan.rows.ndim == 2 else plan.rows[:, None]
    real = examples >= 0
    chosen = np.where(real, examples, 0)
    lengths = np.where(real, np.diff(rows.offsets)[chosen], 0)
    starts = np.cumsum(lengths, axis=1) - lengths
    per_example = lengths.ravel()
    within = np.arange(per_example.sum()) - np.repeat(
        np.cumsum(per_example) - per_example, per_example
    )
    num_rows, num_segments = examples.shape
    return Places(
        row=np.repeat(np.repeat(np.arange(num_rows), num_segments), per_example),
        column=within + np.repeat(starts.ravel(), per_example),
        source=within + np.repeat(rows.offsets[chosen].ravel(), per_example),
        segment=np.repeat(np.tile(np.arange(1, num_segments + 1), num_rows), per_example),
        within=within,
    )


def make_batch(rows: TokenRows, plan: Plan, pad_token_id: int) -> Batch:
    """Gathers a plan's examples into padded arrays, those of a packed row end to end."""
    is_packed = plan.rows.ndim == 2
    places = token_places(rows, plan)
    row, column, source = places.row, places.column, places.source
    shape = (len(plan.rows), plan.width)
    chosen = np.where(plan.rows >= 0, plan.rows, 0)

    def of_tokens(values: np.ndarray, fill: Any = 0) -> np.ndarray:
        array = np.full((*shape, *values.shape[1:]), fill, values.dtype)
        array[row, column] = values[source]
        return array

    segments = np.zeros(shape, np.int32)
    segments[row, column] = places.segment
    types = np.zeros(shape, np.int32)
    second = np.where(plan.rows >= 0, rows.second[chosen], 0).ravel()
    index = row * (plan.rows.shape[1] if is_packed else 1) + places.segment - 1
    types[row, column] = places.within >= second[index]

    def of_units(values: np.ndarray | None) -> np.ndarray | None:
        if values is None:
            return None
        return values[chosen] if rows.is_unit is None else of_tokens(values)

    labels, targets = of_units(rows.labels), {}
    targets["labels"] = np.full(plan.rows.shape, -1, np.int32) if labels is None else labels
    if rows.is_unit is not None:
        targets["units"] = of_tokens(rows.is_unit.astype(np.float32))
    fields: Any = {  # of NumPy, where those of a placed batch are arrays of JAX
        "inputs": Text(*cast(Any, (of_tokens(rows.ids, pad_token_id), types))),
        "attention_mask": segments if is_packed else segments > 0,
        "targets": targets,
        "weights": (plan.rows >= 0).astype(np.float32),
        "teacher_logits": of_units(rows.teacher_logits),
    }
    return Batch(**fields)
