"""Token rows of any length, plans of batches, and batches as arrays of static shapes.

The order of examples is a pure function of (seed, step), so that a run can resume at any step.
"""

import hashlib
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from tinybert_jax.models.inputs import Text


class Windows(NamedTuple):
    """Rows that are windows of longer texts, in which answers are looked for."""

    examples: np.ndarray  # int64 [rows]: the example that each row is a window of
    chars: np.ndarray  # int32 [tokens, 2]: start and end of each token in the text; (0, 0): none


class Targets(NamedTuple):
    """What the rows are translated to: row i is `[offsets[i]:offsets[i + 1]]` of both arrays."""

    inputs: np.ndarray  # int32 [tokens]: from the start token on, what a decoder reads
    labels: np.ndarray  # int32 [tokens]: the token after each, up to the end token
    offsets: np.ndarray  # int64 [rows + 1]


class TokenRows(NamedTuple):
    """Examples of any length in one array: row i is `ids[offsets[i]:offsets[i + 1]]`.

    A unit of a task is a row or, with `is_unit`, a token. `labels` and `teacher_logits` have one
    entry per row, or with `is_unit` one entry per token. With `windows` a unit is the start or the
    end of the answer in a row: its classes are the tokens of `is_unit`, and `labels` [tokens, 2]
    are 1 at the first and at the last token of the answer.
    """

    ids: np.ndarray  # int32 [tokens], special tokens included
    offsets: np.ndarray  # int64 [rows + 1]
    second: np.ndarray  # int32 [rows]; start of the second text in the row; the row length if none
    labels: np.ndarray | None  # int32 or fp32 [rows or tokens, …]
    num_truncated: int  # number of rows cut at max_length
    teacher_logits: np.ndarray | None = None  # fp32 [rows or tokens, outputs], if kept
    is_unit: np.ndarray | None = None  # bool [tokens]: tokens that have a label; None: rows have
    windows: Windows | None = None  # None: every row is an example
    targets: Targets | None = None  # of translation, whose units are the tokens of targets

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows]: number of tokens."""
        return np.diff(self.offsets)

    @property
    def widths(self) -> np.ndarray:
        """int64 [rows]: the tokens that a row needs room for, on its longer side."""
        if self.targets is None:
            return self.lengths
        return np.maximum(self.lengths, np.diff(self.targets.offsets))

    @property
    def num_scored(self) -> int:
        """The length of an array of logits: number of rows, or of tokens if `is_unit` is set."""
        return len(self.lengths) if self.is_unit is None else len(self.ids)

    def part(self, start: int, stop: int) -> "TokenRows":
        """The rows from `start` to `stop` (exclusive)."""
        begin, end = self.offsets[start], self.offsets[stop]
        windows = self.windows
        if windows is not None:
            windows = Windows(windows.examples[start:stop], windows.chars[begin:end])
        targets = self.targets
        if targets is not None:
            first, last = targets.offsets[start], targets.offsets[stop]
            offsets = targets.offsets[start : stop + 1] - first
            targets = Targets(targets.inputs[first:last], targets.labels[first:last], offsets)
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
            windows,
            targets,
        )

    def fingerprint(self) -> str:
        """SHA-256 of tokens and labels; a resumed run compares it."""
        digest = hashlib.sha256()
        more = () if self.is_unit is None else (self.is_unit,)
        more += () if self.targets is None else tuple(self.targets)
        for array in (self.ids, self.offsets, self.second, self.labels, *more):
            digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class Batch(NamedTuple):
    """The examples of one step, padded to one width. An example of weight 0 is filler.

    A packed row holds several examples. Its `attention_mask` is the segment ids 1, 2, … (0:
    padding), and `weights` and the targets of examples have a second axis [segments]. Rows of a
    token store have segment ids too, but one label and one weight per row. The fields are NumPy
    arrays until the batch is sent to devices.
    """

    inputs: Text
    attention_mask: jax.Array  # bool [batch, seq]; packed: int32, segment ids
    # `labels` [batch, …], packed [batch, segments, …]; if units are tokens, `labels` and `units`
    # (fp32, 1 for a unit) [batch, seq]; of windows, `labels` [batch, seq, 2] and `answerable`
    # (bool) [batch, seq]; after masking, the targets of `masked_lm.make_mask`; of translation
    # `decoder_input_ids`, `decoder_mask` (as `attention_mask`), `labels` and `units` [batch, seq].
    targets: dict[str, jax.Array]
    weights: jax.Array  # fp32 [batch], 1 or 0; packed: [batch, segments]
    teacher_logits: jax.Array | None = None  # fp32, the shape of labels with [outputs] added

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, width)."""
        num_rows, width = self.attention_mask.shape
        return num_rows, width

    @property
    def num_slots(self) -> int:
        """The number of tokens, padding included."""
        return self.attention_mask.size

    @property
    def real(self) -> jax.Array:
        """bool [batch, seq]: False for padding."""
        return self.attention_mask.astype(bool)

    @property
    def num_segments(self) -> int | None:
        """Most examples in a packed row; None: one example per row."""
        return self.weights.shape[1] if self.weights.ndim == 2 else None


class Plan(NamedTuple):
    """The examples of a batch (−1: filler) and the width that it is padded to."""

    rows: np.ndarray  # int64 [batch]; packed: [batch, segments]
    width: int


class Places(NamedTuple):
    """The place of every token of a planned batch; int64 [tokens] each."""

    row: np.ndarray  # row of the batch
    column: np.ndarray  # position in the row
    source: np.ndarray  # index in `TokenRows.ids`
    segment: np.ndarray  # number of the example in the row, from 1
    within: np.ndarray  # position in the example


def token_places(offsets: np.ndarray, plan: Plan) -> Places:
    """The places of all tokens of the examples in `plan`; example i is `offsets[i:i + 2]`."""
    examples = plan.rows if plan.rows.ndim == 2 else plan.rows[:, None]
    real = examples >= 0
    chosen = np.where(real, examples, 0)
    lengths = np.where(real, np.diff(offsets)[chosen], 0)
    starts = np.cumsum(lengths, axis=1) - lengths
    per_example = lengths.ravel()
    within = np.arange(per_example.sum()) - np.repeat(
        np.cumsum(per_example) - per_example, per_example
    )
    num_rows, num_segments = examples.shape
    return Places(
        row=np.repeat(np.repeat(np.arange(num_rows), num_segments), per_example),
        column=within + np.repeat(starts.ravel(), per_example),
        source=within + np.repeat(offsets[chosen].ravel(), per_example),
        segment=np.repeat(np.tile(np.arange(1, num_segments + 1), num_rows), per_example),
        within=within,
    )


def make_batch(rows: TokenRows, plan: Plan, pad_token_id: int) -> Batch:
    """Copies the examples of a plan into padded arrays; a packed row holds several in sequence."""
    is_packed = plan.rows.ndim == 2
    places = token_places(rows.offsets, plan)
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
    if rows.windows is not None:
        assert rows.is_unit is not None
        targets["answerable"] = of_tokens(rows.is_unit)
        if labels is None:
            targets["labels"] = np.zeros((*shape, 2), np.float32)
    elif rows.is_unit is not None:
        targets["units"] = of_tokens(rows.is_unit.astype(np.float32))
    if rows.targets is not None:
        targets |= _target_side(rows.targets, plan)
    fields: Any = {  # Any, because these are NumPy arrays and the annotations are of JAX arrays
        "inputs": Text(*cast(Any, (of_tokens(rows.ids, pad_token_id), types))),
        "attention_mask": segments if is_packed else segments > 0,
        "targets": targets,
        "weights": (plan.rows >= 0).astype(np.float32),
        "teacher_logits": of_units(rows.teacher_logits),
    }
    return Batch(**fields)


def _target_side(targets: Targets, plan: Plan) -> dict[str, np.ndarray]:
    """The entries of `Batch.targets` of translation; a target stands in the row of its source."""
    places, shape = token_places(targets.offsets, plan), (len(plan.rows), plan.width)
    at = places.row, places.column
    # Nothing attends to padding. Its id is 0, which every vocabulary has: that of the sources'
    # padding may lie beyond the targets' table, where JAX reads NaN.
    ids, labels, segments = (np.zeros(shape, np.int32) for _ in range(3))
    ids[at], labels[at] = targets.inputs[places.source], targets.labels[places.source]
    segments[at] = places.segment
    return {
        "decoder_input_ids": ids,
        "decoder_mask": segments if plan.rows.ndim == 2 else segments > 0,
        "labels": labels,
        "units": (segments > 0).astype(np.float32),
    }
