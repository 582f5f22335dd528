"""The interface of an objective, and the unit counts that its losses are divided by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.models import SOLE
from tinybert_jax.losses import attention as attention_losses
from tinybert_jax.models.inputs import Text
from tinybert_jax.objectives.factored import Factors
from tinybert_jax.settings.sizes import Side

Metrics = dict[str, jax.Array]


class Counts(NamedTuple):
    """Numbers of units in the whole global batch, fp32 scalars: the denominators of the losses."""

    examples: jax.Array
    units: jax.Array  # units of the task: examples, or tokens that have a label
    tokens: jax.Array
    pairs: jax.Array  # token pairs of the same example
    target_pairs: jax.Array  # of a translation: a token and one before it, or itself
    cross_pairs: jax.Array  # of a translation: a token of the target and one of the source
    predictions: jax.Array  # masked tokens
    labelled_rows: jax.Array  # rows whose pair of texts has a label
    share: jax.Array  # share of the stage that is done, 0 to 1; schedules of weights read it


def _no_targets(batch: Batch, frozen: Any) -> tuple[()]:
    return ()


class Objective(NamedTuple):
    """The functions that make up the objective of a stage.

    `prepare(batch, key, share)` reads the whole batch; it masks tokens and counts units. `share` is
    0 at the first step of the stage and 1 at the last.

    `targets(batch, frozen)` returns the teacher's outputs for a batch. It runs once per batch, for
    all students; `frozen` holds the teacher's parameters, which are not trained.

    `loss(params, batch, counts, key, targets)` returns (loss, metrics) of one model, or the sum of
    losses over the named `members`. A metric named `loss` is logged instead of the loss.

    `targets` and `loss` may read a microbatch: the losses of all microbatches add up to the loss of
    the batch.
    """

    prepare: Callable[[Batch, jax.Array, jax.Array], tuple[Batch, Counts]]
    loss: Callable[[Any, Batch, Counts, jax.Array, Any], tuple[jax.Array, Metrics]]
    targets: Callable[[Batch, Any], Any] = _no_targets
    members: tuple[str, ...] = (SOLE,)


def count_units(batch: Batch, normalisation: str = "valid_only") -> Counts:
    """The counts of a whole batch; "paper_code" counts padding as tokens and pairs."""
    if normalisation == "paper_code":
        num_rows, width = batch.shape
        tokens, pairs = num_rows * width, num_rows * width**2
    else:
        tokens = jnp.sum(batch.real, dtype=jnp.float32)
        pairs = attention_losses.num_pairs(batch.attention_mask)
    seen = {side: jnp.sum(own, dtype=jnp.float32) for side, own in decoder_pairs(batch).items()}
    return Counts(
        examples=batch.weights.sum(),
        units=_num_units(batch),
        tokens=jnp.asarray(tokens, jnp.float32),
        pairs=jnp.asarray(pairs, jnp.float32),
        target_pairs=seen.get("decoder", jnp.zeros(())),
        cross_pairs=seen.get("cross", jnp.zeros(())),
        predictions=jnp.zeros(()),
        labelled_rows=jnp.zeros(()),
        share=jnp.zeros(()),
    )


def _num_units(batch: Batch) -> jax.Array:
    if "answerable" in batch.targets:
        return 2 * batch.weights.sum()
    return batch.targets.get("units", batch.weights).sum()


def units(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(labels [units, …], weights [units]); the weight is 0 for filler, padding, other tokens."""
    if "answerable" in batch.targets:
        marks = _by_window(batch.targets["labels"], batch, 0.0)
        weights = jnp.repeat(batch.weights.reshape(-1), 2)
        return jnp.argmax(marks, axis=-1), weights
    labels, weights = batch.targets["labels"], batch.targets.get("units", batch.weights)
    return labels.reshape(-1, *labels.shape[weights.ndim :]), weights.reshape(-1)


def unit_scores(output: Any, batch: Batch) -> jax.Array | Factors:
    """The logits [units, classes] in the output of a model of the task, or their factors."""
    if "decoder_input_ids" in batch.targets:
        return Factors(
            output.hidden.reshape(-1, output.hidden.shape[-1]), output.table, output.bias
        )
    return unit_logits(output.logits, batch)


def unit_logits(logits: jax.Array, batch: Batch) -> jax.Array:
    """Logits [units, classes] of all units of a batch: rows, segments, tokens, starts and ends."""
    if "answerable" in batch.targets:
        return _by_window(logits, batch, _IMPOSSIBLE)
    return logits.reshape(-1, logits.shape[-1])


_IMPOSSIBLE = -1e9  # the logit of a token that cannot be where an answer starts or ends


def _by_window(values: jax.Array, batch: Batch, fill: float) -> jax.Array:
    """[windows · 2, seq]: values [batch, seq, 2] of starts and ends; `fill` at other tokens."""
    segments = batch.attention_mask.astype(jnp.int32)
    numbers = jnp.arange(1, (batch.num_segments or 1) + 1)
    is_own = segments[:, None] == numbers[None, :, None]  # [batch, segments, seq]
    is_own &= batch.targets["answerable"][:, None]
    by_side = jnp.moveaxis(values, -1, 1)[:, None]  # [batch, 1, 2, seq]
    return jnp.where(is_own[:, :, None], by_side, fill).reshape(-1, values.shape[1])


def decoder_pairs(batch: Batch) -> dict[Side, jax.Array]:
    """bool [batch, query, key]: the pairs that a decoder's attention is over; {} without one."""
    if "decoder_mask" not in batch.targets:
        return {}
    mask, source = batch.targets["decoder_mask"], batch.attention_mask
    place = jnp.arange(mask.shape[1])
    is_before = place[:, None] >= place[None, :]

    def same(keys: jax.Array) -> jax.Array:
        return (mask[:, :, None] == keys[:, None, :]) & mask.astype(bool)[:, :, None]

    return {"decoder": same(mask) & is_before[None], "cross": same(source)}


def encoder_inputs(batch: Batch) -> tuple[Text, jax.Array]:
    """(text, attention mask): the inputs of an encoder."""
    return batch.inputs, batch.attention_mask


def decoder_inputs(batch: Batch) -> dict[str, jax.Array]:
    """The inputs of a decoder, by the names of the arguments of `Seq2Seq`; {} without one."""
    if "decoder_input_ids" not in batch.targets:
        return {}
    return {
        "decoder_input_ids": batch.targets["decoder_input_ids"],
        "decoder_attention_mask": batch.targets["decoder_mask"],
    }
