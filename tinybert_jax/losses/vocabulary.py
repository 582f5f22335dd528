"""Losses of words predicted over the whole vocabulary, whose logits never all exist.

Conventions as in `losses`: fp32, `total / number of valid units`. Logits are hidden·tableᵀ + bias,
made for a chunk of rows at a time; the gradients are made with the loss.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinybert_jax.losses.pointwise import IGNORED_LABEL, mean_over


def masked_lm(
    hidden: Float[Array, "n dim"],
    table: Float[Array, "vocab dim"],
    bias: Float[Array, " vocab"],
    labels: Int[Array, " n"],
    *,
    chunk_size: int,
    num_shards: int = 1,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """`losses.masked_lm` of the logits, of which only `chunk_size` rows ever exist.

    The gradients are made with the loss, chunk by chunk, so nothing is kept or computed twice.
    Ignored rows go last, and chunks of nothing else are left out: room for predictions that no
    label fills is free. `num_shards` equal runs of rows (a divisor of n) are chunked side by side,
    so that none has to leave its device.
    """
    hidden, labels = _split((hidden, labels), num_shards)
    size = min(chunk_size, hidden.shape[1])
    total = _summed_loss(size, hidden, table, bias, labels, None)
    return mean_over(total, jnp.sum(labels != IGNORED_LABEL, dtype=jnp.float32), count)


def kl(
    student: tuple[Float[Array, "n dim"], Float[Array, "vocab dim"], Float[Array, " vocab"]],
    teacher: tuple[Float[Array, "n dim_t"], Float[Array, "vocab dim_t"], Float[Array, " vocab"]],
    mask: Bool[Array, " n"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    chunk_size: int,
    num_shards: int = 1,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """`losses.kl` of the logits of both, mean over the rows of `mask` (unit: row).

    Each model is its (hidden, table, bias). Logits exist and gradients are made as in
    `masked_lm`; the teacher gets none.
    """
    labels = jnp.where(mask, 0, IGNORED_LABEL)
    (hidden, theirs), labels = _split(((student[0], teacher[0]), labels), num_shards)
    size = min(chunk_size, hidden.shape[1])
    goal = _Goal(theirs, *teacher[1:], jnp.asarray(temperature, jnp.float32))
    total = _summed_loss(size, hidden, *student[1:], labels, goal)
    return mean_over(total, mask.sum(dtype=jnp.float32), count)


def masked_lm_sums(
    hidden: Float[Array, "n dim"],
    table: Float[Array, "vocab dim"],
    bias: Float[Array, " vocab"],
    labels: Int[Array, " n"],
    *,
    chunk_size: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Σ −log p(label), and how many labels have the largest logit; ignored ones count nothing."""
    size = min(chunk_size, hidden.shape[0])
    given = (hidden[None], table, bias, labels[None], None)
    return _over_chunks(size, *given, with_gradients=False)


def even_chunk_size(num_expected: int, largest: int) -> int:
    """Of the fewest chunks for so many rows, none above `largest`, all of one size.

    The least such, made a multiple of 8 where `largest` allows it.
    """
    num_chunks = -(-num_expected // largest)
    return min(largest, 8 * -(-num_expected // (8 * num_chunks)))


class _Goal(NamedTuple):
    """Instead of a label of each row the distribution that a teacher gives it."""

    hidden: Array  # [shards, n, dim]
    table: Array  # [vocab, dim]
    bias: Array  # [vocab]
    temperature: Array  # of both distributions


def _split(rows: Any, num_shards: int) -> Any:
    """[n, …] to [shards, n / shards, …]."""
    return jax.tree.map(lambda x: x.reshape(num_shards, -1, *x.shape[1:]), rows)


def _in_order(order: Array, size: int, x: Array, fill: int = 0) -> Array:
    """[s, n, d] sorted, and filled up to whole chunks."""
    ordered = jnp.take_along_axis(x, order[:, :, None], axis=1)
    room = ((0, 0), (0, -x.shape[1] % size), (0, 0))
    return jnp.pad(ordered, room, constant_values=fill)


def _over_chunks(
    size: int,
    hidden: Array,
    table: Array,
    bias: Array,
    labels: Array,
    goal: _Goal | None,
    *,
    with_gradients: bool,
) -> tuple[Array, Any]:
    """Σ −log p(label), and its gradients by hidden [s, n, d], table and bias, or the hits.

    With a goal Σ KL(goal's ‖ p) of the rows that have a label, whatever the label. Each shard adds
    up a table gradient of its own; they meet once, after the last chunk.
    """
    num_shards, words = len(hidden), table.astype(hidden.dtype)
    order = jnp.argsort(labels == IGNORED_LABEL, axis=-1, stable=True)
    in_order = functools.partial(_in_order, order, size)
    rows, sorted_labels = in_order(hidden), in_order(labels[:, :, None], IGNORED_LABEL)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    goal_rows = rows if goal is None else in_order(goal.hidden)
    ones = jnp.ones((num_shards, size), hidden.dtype)  # a product: XLA:CPU adds up columns slowly

    def chunk(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        picked, label, theirs = (
            jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)
            for x in (rows, sorted_labels, goal_rows)
        )
        is_label = label != IGNORED_LABEL
        logits = einsum("snd,vd->snv", picked, words) + bias[None, None]
        if goal is None:
            lost, slope = _from_label(logits, jnp.where(is_label, label, 0))
        else:
            goal_logits = einsum("snd,vd->snv", theirs, goal.table.astype(theirs.dtype))
            lost, slope = _from_goal(logits, goal_logits + goal.bias[None, None], goal.temperature)
        total = sums[0] + jnp.sum(lost * is_label, axis=(1, 2))
        if not with_gradients:
            hits = jnp.argmax(logits, axis=-1, keepdims=True) == label
            return total, sums[1] + jnp.sum(hits, axis=(1, 2))
        slope = jnp.where(is_label, slope, 0).astype(hidden.dtype)
        by_row = einsum("snv,vd->snd", slope, words).astype(hidden.dtype)
        by_word = einsum("snv,snd->svd", slope, picked)
        return (
            total,
            jax.lax.dynamic_update_slice_in_dim(sums[1], by_row, i * size, axis=1),
            sums[2] + by_word,
            sums[3] + einsum("snv,sn->sv", slope, ones, precision=jax.lax.Precision.HIGHEST),
        )

    zeros = [jnp.zeros(num_shards)] * 2
    if with_gradients:
        tables = (jnp.zeros((num_shards, *a.shape)) for a in (table, bias))
        zeros = [zeros[0], jnp.zeros_like(rows), *tables]
    num_chunks = -(-jnp.sum(labels != IGNORED_LABEL, axis=-1).max() // size)
    total, *sums = jax.lax.fori_loop(0, num_chunks, chunk, tuple(zeros))
    if not with_gradients:
        return total.sum(), sums[0].sum()
    by_row = jnp.take_along_axis(sums[0], jnp.argsort(order, axis=-1)[:, :, None], axis=1)
    by_word, by_bias = sums[1].sum(0).astype(table.dtype), sums[2].sum(0).astype(bias.dtype)
    return total.sum(), (by_row, by_word, by_bias)


def _from_label(logits: Array, label: Array) -> tuple[Array, Array]:
    """−log p(label) [s, n, 1] and its slope by the logits."""
    log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    is_label = jnp.arange(logits.shape[-1])[None, None] == label
    lost = log_sum - jnp.take_along_axis(logits, label, axis=-1)
    return lost, jnp.exp(logits - log_sum) - is_label


def _from_goal(logits: Array, goal_logits: Array, temperature: Array) -> tuple[Array, Array]:
    """KL of the goal's distribution [s, n, 1], both at a temperature, and its slope."""
    ours = jax.nn.log_softmax(logits / temperature)
    theirs = jax.nn.log_softmax(goal_logits / temperature)
    goal = jnp.exp(theirs)
    lost = jax.lax.platform_dependent(goal, theirs - ours, cpu=_row_product, default=_row_sum)
    return lost, (jnp.exp(ours) - goal) / temperature


def _row_sum(x: Array, y: Array) -> Array:
    """Σ x·y over the words: [s, n, 1]."""
    return jnp.sum(x * y, axis=-1, keepdims=True)


def _row_product(x: Array, y: Array) -> Array:
    """`_row_sum` for XLA:CPU: of 256 x 30,522 it took 39 ms, and this 1.6 (2 cores, jax 0.10.2)."""
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("snv,snv->sn", x, y, precision=exact)[:, :, None]


def _loss_alone(
    size: int, hidden: Array, table: Array, bias: Array, labels: Array, goal: _Goal | None
) -> Array:
    return _over_chunks(size, hidden, table, bias, labels, goal, with_gradients=False)[0]


def _scaled(size: int, gradients: tuple[Array, ...], cotangent: Array) -> tuple[Array | None, ...]:
    return *((cotangent * g).astype(g.dtype) for g in gradients), None, None


_summed_loss = jax.custom_vjp(_loss_alone, nondiff_argnums=(0,))
_summed_loss.defvjp(functools.partial(_over_chunks, with_gradients=True), _scaled)
