"""What a stage minimises: losses put together, as pure functions of parameters and a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.models import SOLE
from tinybert_jax.losses import attention as attention_losses
from tinybert_jax.models.inputs import Text

Metrics = dict[str, jax.Array]


class Counts(NamedTuple):
    """Units of the whole global batch, fp32 scalars: the denominators of the losses."""

    examples: jax.Array
    units: jax.Array  # of the task: examples, or tokens that have a label
    tokens: jax.Array
    pairs: jax.Array  # token pairs of the same example
    predictions: jax.Array  # masked tokens
    labelled_rows: jax.Array  # rows whose two parts have a label
    share: jax.Array  # how far the stage is, 0 to 1: not a count, but what a ramp reads


def _no_targets(batch: Batch, frozen: Any) -> tuple[()]:
    return ()


class Objective(NamedTuple):
    """`prepare(batch, key, share)` sees the whole batch: corruption and unit counts.

    `share` says how far the stage is, 0 at its first step and 1 at its last. `targets(batch,
    frozen)` is what a teacher says of a batch: made once, however many students read it; `frozen`
    are its parameters, read and never trained. `loss(params, batch, counts, key, targets)` is one
    student's, or the sum over a family's `members`. Both may see a microbatch; the losses over all
    microbatches add up. A metric `loss` is told in place of the loss.
    """

    prepare: Callable[[Batch, jax.Array, jax.Array], tuple[Batch, Counts]]
    loss: Callable[[Any, Batch, Counts, jax.Array, Any], tuple[jax.Array, Metrics]]
    targets: Callable[[Batch, Any], Any] = _no_targets
    members: tuple[str, ...] = (SOLE,)


def count_units(batch: Batch, normalisation: str = "valid_only") -> Counts:
    if normalisation == "paper_code":  # padding counts
        num_rows, width = batch.shape
        tokens, pairs = num_rows * width, num_rows * width**2
    else:
        tokens = jnp.sum(batch.real, dtype=jnp.float32)
        pairs = attention_losses.num_pairs(batch.attention_mask)
    return Counts(
        examples=batch.weights.sum(),
        units=batch.targets.get("units", batch.weights).sum(),
        tokens=jnp.asarray(tokens, jnp.float32),
        pairs=jnp.asarray(pairs, jnp.float32),
        predictions=jnp.zeros(()),
        labelled_rows=jnp.zeros(()),
        share=jnp.zeros(()),
    )


def units(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The task's labels [units, …] and the weights [units]: 0 for filler, padding, other tokens."""
    labels, weights = batch.targets["labels"], batch.targets.get("units", batch.weights)
    return labels.reshape(-1, *labels.shape[weights.ndim :]), weights.reshape(-1)


def encoder_inputs(batch: Batch) -> tuple[Text, jax.Array]:
    return batch.inputs, batch.attention_mask
