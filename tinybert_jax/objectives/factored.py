"""The losses of a task whose classes are words: as in `losses.forms`, on factors of logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinybert_jax.losses import vocabulary
from tinybert_jax.losses.forms import FORMS, Divergence, Form
from tinybert_jax.losses.pointwise import IGNORED_LABEL, divide_by_count

_CHUNK_SIZE = 256  # units whose logits exist at one time on a batch shard


class Factors(NamedTuple):
    """Logits hidden·tableᵀ + bias that never exist whole."""

    hidden: jax.Array  # [units, dim]
    table: jax.Array  # [vocab, dim], or [shards, vocab, dim] of `copy_table_per_shard`
    bias: jax.Array  # [vocab]


def form_of(name: str, num_shards: int = 1) -> Form:
    """The losses of a form; those of "vocabulary" read `Factors` in the place of logits.

    `num_shards`: of the batch; the units of each are taken in chunks of their own.
    """
    if name != "vocabulary":
        return FORMS[name]

    def label_loss(
        logits: Factors,
        labels: Int[Array, " units"],
        weights: Float[Array, " units"],
        *,
        label_smoothing: float = 0.0,
        count: Float[Array, ""] | None = None,
    ) -> Float[Array, ""]:
        labels = jnp.where(weights > 0, labels, IGNORED_LABEL)
        options = {"chunk_size": _CHUNK_SIZE, "num_shards": num_shards}
        loss = vocabulary.masked_lm(*logits, labels, count=count, **options)
        if not label_smoothing:
            return loss
        return loss + label_smoothing * _lead_of_labels(logits, labels, weights, count)

    def teacher_loss(
        logits: Factors,
        teacher_logits: Factors,
        weights: Float[Array, " units"],
        *,
        divergence: Divergence = "kl",
        temperature: float | Float[Array, ""] = 1.0,
        reduction: str = "sum",
        count: Float[Array, ""] | None = None,
    ) -> Float[Array, ""]:
        assert divergence == "kl" and reduction == "sum", "the config check refuses others"
        return vocabulary.kl(
            (logits.hidden, logits.table, logits.bias),
            (teacher_logits.hidden, teacher_logits.table, teacher_logits.bias),
            weights > 0,
            temperature=temperature,
            chunk_size=_CHUNK_SIZE,
            num_shards=num_shards,
            count=count,
        )

    return Form(label_loss, teacher_loss)


def _lead_of_labels(
    logits: Factors,
    labels: Int[Array, " units"],
    weights: Float[Array, " units"],
    count: Float[Array, ""] | None,
) -> Float[Array, ""]:
    """Σ (logit of the label - mean logit) / count: what smoothing by 1 adds to −log p(label).

    (1 − ε)·nll + ε·mean over v of −log p(v) = nll + ε·(logit of the label − mean logit), as
    −log p(v) = log-sum − logit(v). The mean logit needs the mean row of the table alone.
    """
    hidden, table = logits.hidden.astype(jnp.float32), logits.table.astype(jnp.float32)
    read = jnp.maximum(labels, 0)
    if table.ndim == 2:
        rows = table[read] - table.mean(0)[None]
    else:  # each shard from its own copy
        by_shard = jax.vmap(lambda own, ids: own[ids] - own.mean(0)[None])
        rows = by_shard(table, read.reshape(len(table), -1)).reshape(hidden.shape)
    biases = logits.bias[read] - logits.bias.mean()[None]
    lead = jnp.sum(hidden * rows, axis=-1) + biases
    return divide_by_count(jnp.sum(lead * weights), weights.sum(), count)
