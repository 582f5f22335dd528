"""Training on gold labels."""

from collections.abc import Callable

import jax

from tinybert_jax.batches.batch import Batch
from tinybert_jax.losses import pointwise
from tinybert_jax.objectives.objective import Counts, Objective, count_units, encoder_inputs


def make_supervised(
    apply: Callable, *, regression: bool = False, label_smoothing: float = 0.0
) -> Objective:
    """Gold labels: cross-entropy, or mean squared error of the single output."""

    def loss(params, batch, counts, key, targets):
        logits = example_logits(apply, params, batch, key)
        with jax.named_scope("~loss label"):
            value = gold_loss(logits, batch, counts, regression, label_smoothing)
        return value, {"loss/label": value}

    return Objective(lambda batch, key, share: (batch, count_units(batch)), loss)


def example_logits(apply, params, batch: Batch, key) -> jax.Array:
    """[examples, num_labels]: rows, or every segment of packed rows."""
    logits = apply(params, *encoder_inputs(batch), key, num_segments=batch.num_segments).logits
    return logits.reshape(-1, logits.shape[-1])


def gold_loss(logits, batch: Batch, counts: Counts, regression: bool, label_smoothing: float):
    labels, weights = batch.targets["labels"].reshape(-1), batch.weights.reshape(-1)
    if regression:
        return pointwise.logits_mse(logits, labels[:, None], weights, count=counts.examples)
    return pointwise.softmax_cross_entropy(
        logits,
        labels,
        weights,
        label_smoothing=label_smoothing,
        count=counts.examples,
    )
