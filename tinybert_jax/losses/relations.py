"""Loss between the self-attention relations of two models (MiniLMv2), computed block by block.

fp32, mask and `total / number of valid units` as in `losses.pointwise`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinybert_jax.losses.attention import mask_heads
from tinybert_jax.losses.pointwise import divide_by_count

RELATION_BLOCK = 128  # left tokens (queries) of a row whose relations are in memory at one time


def relation_kl(
    student_left: Float[Array, "batch seq heads student_head_dim"],
    student_right: Float[Array, "batch seq heads student_head_dim"],
    teacher_left: Float[Array, "batch seq heads teacher_head_dim"],
    teacher_right: Float[Array, "batch seq heads teacher_head_dim"],
    mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"],
    *,
    block_size: int = RELATION_BLOCK,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """KL(p_T ‖ p_S) of the relations p = softmax(left·rightᵀ/√head_dim) of one layer (unit: token).

    Mean over heads and real tokens. The softmax runs over the real tokens of the row, or over the
    same segment of a packed row (an integer mask of segment ids, 0: padding). Left and right are
    queries and keys, or one array twice: MiniLMv2's Q/Q, K/K and V/V (arXiv 2012.15828, equation
    4), regrouped into relation heads.

    The relations of only `block_size` left tokens of a row are in memory at one time, forward and
    backward: the gradients are computed with the loss, block by block, so that nothing is kept or
    computed twice. The teacher gets no gradient.
    """
    is_real, segment_ids = mask.astype(bool), mask.astype(jnp.int32)
    s_left, s_right, t_left, t_right = (
        mask_heads(x, is_real) for x in (student_left, student_right, teacher_left, teacher_right)
    )
    teacher = jax.lax.stop_gradient((t_left, t_right))
    total = _total_kl(block_size, s_left, s_right, *teacher, segment_ids)
    return divide_by_count(total / s_left.shape[1], is_real.sum(dtype=jnp.float32), count)


def _sum_over_blocks(
    block_size: int,
    s_left: Array,
    s_right: Array,
    t_left: Array,
    t_right: Array,
    segment_ids: Array,
    *,
    with_gradients: bool,
) -> tuple[Array, Any]:
    """Σ KL over batch, heads and real tokens; its gradients with respect to s_left and s_right."""
    student_scale, teacher_scale = s_left.shape[-1] ** -0.5, t_left.shape[-1] ** -0.5
    seq = segment_ids.shape[1]
    size = min(block_size, seq)
    padding = -seq % size
    s_left, t_left = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (s_left, t_left))
    left_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    matmul = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def block(sums: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], Array | None]:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
        student, teacher, ids = cut(s_left, axis=2), cut(t_left, axis=2), cut(left_ids, axis=1)
        is_pair = (ids[:, :, None] == segment_ids[:, None, :]) & (ids[:, :, None] > 0)
        is_pair = is_pair[:, None]

        teacher_scores = matmul("bhtk,bhsk->bhts", teacher * teacher_scale, t_right)
        if s_left.shape == t_left.shape:
            # As in `attention_mse`: both products are small where the models are close.
            left = jnp.concatenate([student - teacher, teacher], axis=-1) * student_scale
            right = jnp.concatenate([s_right, s_right - t_right], axis=-1)
            difference = matmul("bhtk,bhsk->bhts", left, right)
        else:
            student_scores = matmul("bhtk,bhsk->bhts", student * student_scale, s_right)
            difference = student_scores - teacher_scores
        divergence, score_gradient = _kl_and_gradient(teacher_scores, difference, is_pair)
        total = sums[0] + divergence
        if not with_gradients:
            return (total,), None
        score_gradient = score_gradient * student_scale
        right_gradient = sums[1] + matmul("bhts,bhtk->bhsk", score_gradient, student)
        return (total, right_gradient), matmul("bhts,bhsk->bhtk", score_gradient, s_right)

    start = (jnp.zeros(()), jnp.zeros_like(s_right)) if with_gradients else (jnp.zeros(()),)
    sums, left_gradient = jax.lax.scan(block, start, jnp.arange((seq + padding) // size))
    if left_gradient is None:
        return sums[0], None
    left_gradient = jnp.moveaxis(left_gradient, 0, 2).reshape(s_left.shape)[:, :, :seq]
    return sums[0], (left_gradient, sums[1])


def _kl_and_gradient(
    teacher_scores: Array, difference: Array, is_pair: Array
) -> tuple[Array, Array]:
    """Σ KL(p_T ‖ p_S) and its gradient p_S − p_T with respect to the student's scores.

    p_T = softmax(teacher_scores), p_S = softmax(teacher_scores + difference). With r = log p_S −
    log p_T a term is p_T·(exp(r) − 1 − r): Σ p_S − Σ p_T = 0 is added, so that no term is negative.
    For small r a series computes the term, which is of order r², to 1e-7 without cancellation.
    """
    teacher_scores = jnp.where(is_pair, teacher_scores, _MASKED_SCORE)
    log_teacher = jax.nn.log_softmax(teacher_scores, axis=-1)
    teacher = jnp.where(is_pair, jnp.exp(log_teacher), 0)
    difference = jnp.where(is_pair, difference, 0)

    # log of the student's softmax denominator divided by the teacher's.
    is_close = jnp.abs(difference).max(axis=-1, keepdims=True) < 0.5
    growth = teacher * jnp.expm1(jnp.where(is_close, difference, 0))
    near = jnp.log1p(growth.sum(axis=-1, keepdims=True))
    far = jax.nn.logsumexp(log_teacher + difference, axis=-1, keepdims=True)
    log_ratio = jnp.where(is_pair, difference - jnp.where(is_close, near, far), 0)

    is_small = jnp.abs(log_ratio) < 0.25
    small = jnp.where(is_small, log_ratio, 0)
    large_gradient = jnp.where(is_pair, jnp.exp(log_teacher + log_ratio), 0) - teacher
    gradient = jnp.where(is_small, teacher * jnp.expm1(small), large_gradient)
    series = 1 / 2 + small * (1 / 6 + small * (1 / 24 + small * (1 / 120 + small / 720)))
    terms = jnp.where(is_small, teacher * small**2 * series, gradient - teacher * log_ratio)
    return terms.sum(), gradient


def _kl_without_gradients(block_size: int, *inputs: Array) -> Array:
    return _sum_over_blocks(block_size, *inputs, with_gradients=False)[0]


def _scale_gradients(
    block_size: int, gradients: tuple[Array, Array], cotangent: Array
) -> tuple[Array | None, ...]:
    return *(cotangent * gradient for gradient in gradients), None, None, None


_total_kl = jax.custom_vjp(_kl_without_gradients, nondiff_argnums=(0,))


_total_kl.defvjp(functools.partial(_sum_over_blocks, with_gradients=True), _scale_gradients)


_MASKED_SCORE = -1e30  # finite: a row without a pair gives uniform probabilities, never NaN
