"""The objective of training on the labels of a task."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.tasks import Form
from tinybert_jax.losses.pointwise import kl
from tinybert_jax.models.params import Apply, copy_table_per_shard
from tinybert_jax.objectives.factored import form_of
from tinybert_jax.objectives.objective import (
    Counts,
    Objective,
    count_units,
    decoder_inputs,
    encoder_inputs,
    unit_scores,
    units,
)


def make_supervised(
    apply: Apply,
    *,
    form: Form = "softmax",
    label_smoothing: float = 0.0,
    class_weights: np.ndarray | None = None,
    r_drop: float = 0.0,
    num_shards: int = 1,
) -> Objective:
    """The loss of `form` between a model's logits and the labels of the batch.

    `class_weights` [classes]: weights of the units by their class; the loss is then the weighted
    mean, as in `torch.nn.CrossEntropyLoss(weight=…)`. `r_drop` > 0: two passes with different
    dropout, the mean of their losses, and `r_drop` times the mean of the two Kullback-Leibler
    divergences between them (Wu et al. 2021, arXiv 2106.14448). `num_shards`: see `form_of`.
    """
    losses = form_of(form, num_shards)

    def prepare(batch: Batch, key, share) -> tuple[Batch, Counts]:
        if class_weights is not None:
            batch = _weighted(batch, jnp.asarray(class_weights, jnp.float32))
        return batch, count_units(batch)

    def run(params, batch: Batch, key) -> Any:
        options = {"num_segments": batch.num_segments, **decoder_inputs(batch)}
        if decoder_inputs(batch):
            params = copy_table_per_shard(params, num_shards)
        return unit_scores(apply(params, *encoder_inputs(batch), key, **options), batch)

    def label_loss(logits, batch: Batch, counts: Counts) -> jax.Array:
        with jax.named_scope("~loss label"):
            return losses.label_loss(
                logits, *units(batch), label_smoothing=label_smoothing, count=counts.units
            )

    def loss(params, batch: Batch, counts, key, targets):
        if not r_drop:
            value = label_loss(run(params, batch, key), batch, counts)
            return value, {"loss/label": value}
        one, two = (run(params, batch, own) for own in jax.random.split(key))
        value = (label_loss(one, batch, counts) + label_loss(two, batch, counts)) / 2
        weights = units(batch)[1]
        distance = (
            kl(one, two, weights, reduction="sum", count=counts.units)
            + kl(two, one, weights, reduction="sum", count=counts.units)
        ) / 2
        parts = {"loss/label": value, "loss/r_drop": r_drop * distance}
        return value + r_drop * distance, parts

    return Objective(prepare, loss)


def _weighted(batch: Batch, class_weights: jax.Array) -> Batch:
    """The batch with the weight of every unit times that of its class."""
    weights = class_weights[jnp.maximum(batch.targets["labels"], 0)]  # -1: no unit, of weight 0
    if "units" in batch.targets:
        return batch._replace(targets={**batch.targets, "units": batch.targets["units"] * weights})
    return batch._replace(weights=batch.weights * weights)
