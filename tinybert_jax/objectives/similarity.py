"""The objective of training sentence vectors on pairs, triplets or scored pairs of texts."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tinybert_jax.batches.batch import Batch
from tinybert_jax.losses.similarity import cosent, info_nce
from tinybert_jax.models.params import Apply
from tinybert_jax.objectives.objective import (
    Counts,
    Objective,
    count_units,
    encoder_inputs,
    unit_logits,
)


def make_similarity(
    apply: Apply,
    *,
    num_texts: int,
    has_scores: bool,
    temperature: float,
    widths: Sequence[int] = (),
) -> Objective:
    """InfoNCE of the `num_texts` texts of an example, or with `has_scores` CoSENT.

    The loss is the mean over the whole vectors and their first columns, as many as `widths` say.
    """

    def prepare(batch: Batch, key, share) -> tuple[Batch, Counts]:
        return batch, count_units(batch)

    def one(vectors: jax.Array, batch: Batch, counts: Counts) -> jax.Array:
        texts = vectors.reshape(-1, num_texts, vectors.shape[-1])
        weights = batch.weights.reshape(-1, num_texts)[:, 0]
        if has_scores:
            scores = batch.targets["labels"].reshape(-1, num_texts)[:, 0]
            return cosent(texts, scores, weights, temperature=temperature)
        count = counts.examples / num_texts
        return info_nce(texts, weights, temperature=temperature, count=count)

    def loss(params, batch: Batch, counts, key, targets):
        output = apply(params, *encoder_inputs(batch), key, num_segments=batch.num_segments)
        vectors = unit_logits(output.logits, batch)
        whole = vectors.shape[-1]
        with jax.named_scope("~loss label"):
            parts = [one(vectors[:, :w], batch, counts) for w in (*widths, whole)]
            value = jnp.stack(parts).mean()
        return value, {"loss/label": value}

    return Objective(prepare, loss)
