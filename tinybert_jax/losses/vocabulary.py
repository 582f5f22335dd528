"""Losses over the whole vocabulary that never hold all logits in memory at one time.

fp32 and `total / number of valid units` as in `losses.pointwise`. Logits are hidden·tableᵀ + bias,
computed for one chunk of rows at a time; the gradients are computed with the loss.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinybert_jax.losses.pointwise import IGNORED_LABEL, divide_by_count


def masked_lm(
    hidden: Float[Array, "n dim"],
    table: Float[Array, "vocab dim"] | Float[Array, "shards vocab dim"],
    bias: Float[Array, " vocab"],
    labels: Int[Array, " n"],
    *,
    chunk_size: int,
    num_shards: int = 1,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """`pointwise.masked_lm` of the logits, with only `chunk_size` rows of logits in memory.

    The gradients are computed with the loss, chunk by chunk, so nothing is kept or computed twice.
    Ignored rows are sorted to the end and chunks of ignored rows are skipped, so that rows without
    a label cost nothing. The rows are split into `num_shards` (a divisor of n) equal runs, chunked
    side by side, so that no row has to leave its device. With equal tables [shards, vocab, dim],
    each gets the gradient of its shard alone.
    """
    hidden, labels = _split_shards((hidden, labels), num_shards)
    size = min(chunk_size, hidden.shape[1])
    total = _total_loss(size, hidden, table, bias, labels, None)
    return divide_by_count(total, jnp.sum(labels != IGNORED_LABEL, dtype=jnp.float32), count)


def kl(
    student: tuple[Float[Array, "n dim"], Float[Array, "*_ vocab dim"], Float[Array, " vocab"]],
    teacher: tuple[Float[Array, "n dim_t"], Float[Array, "vocab dim_t"], Float[Array, " vocab"]],
    mask: Bool[Array, " n"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    chunk_size: int,
    num_shards: int = 1,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """`pointwise.kl` of the logits of two models, mean over the rows of `mask` (unit: row).

    `student` and `teacher` are (hidden, table, bias). Logits and gradients are computed in chunks
    as in `masked_lm`, also those of tables [shards, vocab, dim]; the teacher gets no gradient.
    """
    labels = jnp.where(mask, 0, IGNORED_LABEL)
    (hidden, teacher_hidden), labels = _split_shards(((student[0], teacher[0]), labels), num_shards)
    size = min(chunk_size, hidden.shape[1])
    target = _Teacher(teacher_hidden, *teacher[1:], jnp.asarray(temperature, jnp.float32))
    total = _total_loss(size, hidden, *student[1:], labels, target)
    return divide_by_count(total, mask.sum(dtype=jnp.float32), count)


def masked_lm_sums(
    hidden: Float[Array, "n dim"],
    table: Float[Array, "vocab dim"],
    bias: Float[Array, " vocab"],
    labels: Int[Array, " n"],
    *,
    chunk_size: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Σ −log p(label), and the number of labels with the largest logit; ignored rows left out."""
    size = min(chunk_size, hidden.shape[0])
    inputs = (hidden[None], table, bias, labels[None], None)
    return _sum_over_chunks(size, *inputs, with_gradients=False)


def even_chunk_size(num_rows: int, largest: int) -> int:
    """Smallest equal chunk size that covers the rows in the fewest chunks of at most `largest`.

    Rounded up to a multiple of 8 where `largest` allows.
    """
    num_chunks = -(-num_rows // largest)
    return min(largest, 8 * -(-num_rows // (8 * num_chunks)))


class _Teacher(NamedTuple):
    """The teacher whose distributions replace the labels of the rows."""

    hidden: Array  # [shards, n, dim]
    table: Array  # [vocab, dim]
    bias: Array  # [vocab]
    temperature: Array  # of the student's and the teacher's distributions


def _split_shards(rows: Any, num_shards: int) -> Any:
    """[n, …] to [shards, n / shards, …]."""
    return jax.tree.map(lambda x: x.reshape(num_shards, -1, *x.shape[1:]), rows)


def _sort_and_pad(order: Array, size: int, x: Array, fill: int = 0) -> Array:
    """[s, n, d] with its rows in `order`, padded to a multiple of `size` rows."""
    ordered = jnp.take_along_axis(x, order[:, :, None], axis=1)
    padding = ((0, 0), (0, -x.shape[1] % size), (0, 0))
    return jnp.pad(ordered, padding, constant_values=fill)


def _sum_over_chunks(
    size: int,
    hidden: Array,
    table: Array,
    bias: Array,
    labels: Array,
    teacher: _Teacher | None,
    *,
    with_gradients: bool,
) -> tuple[Array, Any]:
    """Σ −log p(label), and its gradients with respect to hidden [s, n, d], table and bias.

    With a teacher: Σ KL(p_T ‖ p) over the rows that have a label, whatever the label. Without
    gradients: the number of labels with the largest logit. Shards accumulate separate table
    gradients, which are added once, after the last chunk, unless each shard has its own table.
    """
    has_copies, num_shards = table.ndim == 3, len(hidden)
    words = (table[0] if has_copies else table).astype(hidden.dtype)
    order = jnp.argsort(labels == IGNORED_LABEL, axis=-1, stable=True)
    in_order = functools.partial(_sort_and_pad, order, size)
    rows, sorted_labels = in_order(hidden), in_order(labels[:, :, None], IGNORED_LABEL)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    teacher_rows = rows if teacher is None else in_order(teacher.hidden)
    ones = jnp.ones((num_shards, size), hidden.dtype)  # XLA:CPU adds up columns slowly

    def chunk(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        row, label, teacher_row = (
            jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)
            for x in (rows, sorted_labels, teacher_rows)
        )
        is_label = label != IGNORED_LABEL
        logits = einsum("snd,vd->snv", row, words) + bias[None, None]
        if teacher is None:
            loss, logit_gradient = _label_loss(logits, jnp.where(is_label, label, 0))
        else:
            products = einsum("snd,vd->snv", teacher_row, teacher.table.astype(teacher_row.dtype))
            teacher_logits = products + teacher.bias[None, None]
            loss, logit_gradient = _teacher_kl(logits, teacher_logits, teacher.temperature)
        total = sums[0] + jnp.sum(loss * is_label, axis=(1, 2))
        if not with_gradients:
            hits = jnp.argmax(logits, axis=-1, keepdims=True) == label
            return total, sums[1] + jnp.sum(hits, axis=(1, 2))
        logit_gradient = jnp.where(is_label, logit_gradient, 0).astype(hidden.dtype)
        by_row = einsum("snv,vd->snd", logit_gradient, words).astype(hidden.dtype)
        by_table = einsum("snv,snd->svd", logit_gradient, row)
        by_rows = jax.lax.dynamic_update_slice_in_dim(sums[1], by_row, i * size, axis=1)
        by_bias = einsum("snv,sn->sv", logit_gradient, ones, precision=jax.lax.Precision.HIGHEST)
        return total, by_rows, sums[2] + by_table, sums[3] + by_bias

    zeros = [jnp.zeros(num_shards)] * 2
    if with_gradients:
        shapes = (num_shards, *table.shape[-2:]), (num_shards, *bias.shape)
        zeros = [zeros[0], jnp.zeros_like(rows), *map(jnp.zeros, shapes)]
    num_chunks = -(-jnp.sum(labels != IGNORED_LABEL, axis=-1).max() // size)
    total, *sums = jax.lax.fori_loop(0, num_chunks, chunk, tuple(zeros))
    if not with_gradients:
        return total.sum(), sums[0].sum()
    by_hidden = jnp.take_along_axis(sums[0], jnp.argsort(order, axis=-1)[:, :, None], axis=1)
    by_table, by_bias = sums[1] if has_copies else sums[1].sum(0), sums[2].sum(0)
    return total.sum(), (by_hidden, by_table.astype(table.dtype), by_bias.astype(bias.dtype))


def _label_loss(logits: Array, label: Array) -> tuple[Array, Array]:
    """−log p(label) [s, n, 1] and its gradient with respect to the logits."""
    log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    is_label = jnp.arange(logits.shape[-1])[None, None] == label
    loss = log_sum - jnp.take_along_axis(logits, label, axis=-1)
    return loss, jnp.exp(logits - log_sum) - is_label


def _teacher_kl(logits: Array, teacher_logits: Array, temperature: Array) -> tuple[Array, Array]:
    """KL(p_T ‖ p) [s, n, 1], both at `temperature`, and its gradient with respect to the logits."""
    log_probs = jax.nn.log_softmax(logits / temperature)
    teacher_log_probs = jax.nn.log_softmax(teacher_logits / temperature)
    teacher_probs = jnp.exp(teacher_log_probs)
    loss = jax.lax.platform_dependent(
        teacher_probs, teacher_log_probs - log_probs, cpu=_vocab_dot_on_cpu, default=_vocab_dot
    )
    return loss, (jnp.exp(log_probs) - teacher_probs) / temperature


def _vocab_dot(x: Array, y: Array) -> Array:
    """Σ x·y over the vocabulary: [s, n, 1]."""
    return jnp.sum(x * y, axis=-1, keepdims=True)


def _vocab_dot_on_cpu(x: Array, y: Array) -> Array:
    """`_vocab_dot` of 256 × 30,522 took XLA:CPU 39 ms, this 1.6 ms (2 cores, jax 0.10.2)."""
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("snv,snv->sn", x, y, precision=exact)[:, :, None]


def _loss_without_gradients(
    size: int, hidden: Array, table: Array, bias: Array, labels: Array, teacher: _Teacher | None
) -> Array:
    inputs = (hidden, table, bias, labels, teacher)
    return _sum_over_chunks(size, *inputs, with_gradients=False)[0]


def _scale_gradients(
    size: int, gradients: tuple[Array, ...], cotangent: Array
) -> tuple[Array | None, ...]:
    return *((cotangent * g).astype(g.dtype) for g in gradients), None, None


_total_loss = jax.custom_vjp(_loss_without_gradients, nondiff_argnums=(0,))
_total_loss.defvjp(functools.partial(_sum_over_chunks, with_gradients=True), _scale_gradients)
