"""Losses over the cosines between sentence vectors of one batch.

The cosines are computed in fp32, whatever the dtype of the vectors. Owns the formulas. A text of
weight 0 is filler: it is compared with nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinybert_jax.losses.pointwise import divide_by_count

_NEVER = -1e9  # a logit whose exp is 0


def unit_vectors(vectors: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
    """fp32 vectors divided by their length, or by 1e-8 where shorter."""
    vectors = vectors.astype(jnp.float32)
    squared_length = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squared_length, 1e-16))


def info_nce(
    vectors: Float[Array, "examples texts dim"],
    weights: Float[Array, " examples"],
    *,
    temperature: float | Float[Array, ""],
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """−log softmax(cos / t) of the partner among all partners of the batch (unit: example).

    The first text of an example is compared with the second texts of all examples, and with their
    further texts, which are nobody's partner (hard negatives). Source: arXiv 1807.03748, equation
    4, with the batch as negatives.
    """
    units = unit_vectors(vectors)
    num_examples, num_texts, dim = units.shape
    others = jnp.moveaxis(units[:, 1:], 1, 0).reshape(-1, dim)  # partners first
    is_there = jnp.tile(weights != 0, num_texts - 1)
    logits = jnp.where(is_there[None], _cosines(units[:, 0], others) / temperature, _NEVER)
    partners = jnp.diagonal(logits[:, :num_examples])
    per_example = jax.nn.logsumexp(logits, axis=-1) - partners
    return _mean(jnp.where(weights != 0, per_example, 0), weights, count)


def similarity_kl(
    student: Float[Array, "texts student_dim"],
    teacher: Float[Array, "texts teacher_dim"],
    weights: Float[Array, " texts"],
    *,
    temperature: float | Float[Array, ""],
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """KL(softmax(cos_T / t) ‖ softmax(cos_S / t)) over the other texts of the batch (unit: text).

    The widths may differ, because cosines alone are compared. Source: the relation between a text
    and the batch as in SEED (arXiv 2101.04731, equation 5), without its queue.
    """
    is_other = (weights != 0)[None] & ~jnp.eye(len(weights), dtype=bool)
    taught, learnt = (
        jax.nn.log_softmax(
            jnp.where(is_other, _cosines(units, units) / temperature, _NEVER), axis=-1
        )
        for units in map(unit_vectors, (teacher, student))
    )
    per_text = jnp.sum(jnp.where(is_other, jnp.exp(taught) * (taught - learnt), 0), axis=-1)
    return _mean(per_text, weights, count)


def cosent(
    vectors: Float[Array, "examples texts dim"],
    scores: Float[Array, " examples"],
    weights: Float[Array, " examples"],
    *,
    temperature: float | Float[Array, ""],
) -> Float[Array, ""]:
    """log(1 + Σ exp((cos_j − cos_i) / t)) over the pairs i, j of texts with score_i > score_j.

    It reads the order of the scores alone. The unit is the batch. Source: CoSENT, as in AnglE
    (arXiv 2309.12871, equation 1).
    """
    units = unit_vectors(vectors)
    cosines = jnp.sum(units[:, 0] * units[:, 1], axis=-1) / temperature
    is_there = weights != 0
    is_ordered = (scores[:, None] > scores[None]) & is_there[:, None] & is_there[None]
    differences = jnp.where(is_ordered, cosines[None] - cosines[:, None], _NEVER)
    return jax.nn.logsumexp(jnp.append(differences.ravel(), 0.0))


def _cosines(one: Array, other: Array) -> Array:
    """The cosines of unit vectors, in fp32 also where a device rounds the inputs of products."""
    return jnp.matmul(one, other.T, precision=jax.lax.Precision.HIGHEST)


def _mean(per_unit: Array, weights: Array, count: Array | None) -> Array:
    weights = weights.astype(jnp.float32)
    return divide_by_count(jnp.sum(per_unit * weights), weights.sum(), count)
