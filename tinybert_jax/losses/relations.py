"""Losses of self-attention relations (MiniLMv2): KL divergences computed over blocks of keys."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinybert_jax.losses.attention import masked_by_head
from tinybert_jax.losses.pointwise import mean_over

RELATION_BLOCK = 128  # tokens of a row whose relations exist at one time


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

    Mean over heads and real tokens; a token relates to the real ones, of packed rows (an integer
    mask, 0: padding) to those of its segment. Left and right are queries and keys, or twice the
    same: MiniLMv2's Q/Q, K/K and V/V (arXiv 2012.15828, equation 4), regrouped into its heads.

    Maps exist for `block_size` tokens of a row at one time, forward and backward: the gradients
    are made with the loss, block by block, so that nothing is kept or computed twice. The teacher
    gets none.
    """
    is_real, segment_ids = mask.astype(bool), mask.astype(jnp.int32)
    sl, sr, tl, tr = (
        masked_by_head(x, is_real)
        for x in (student_left, student_right, teacher_left, teacher_right)
    )
    total = _summed_kl(block_size, sl, sr, *jax.lax.stop_gradient((tl, tr)), segment_ids)
    return mean_over(total / sl.shape[1], is_real.sum(dtype=jnp.float32), count)


def _over_blocks(
    block_size: int, sl: Array, sr: Array, tl: Array, tr: Array, ids: Array, *, with_gradients: bool
) -> tuple[Array, Any]:
    """Σ KL over batch, heads and real tokens, and its gradients by the student's two factors."""
    student_scale, teacher_scale = sl.shape[-1] ** -0.5, tl.shape[-1] ** -0.5
    seq = ids.shape[1]
    size = min(block_size, seq)
    room = -seq % size
    sl, tl = (jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0))) for x in (sl, tl))
    row_ids = jnp.pad(ids, ((0, 0), (0, room)))
    matmul = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def block(sums: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], Array | None]:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
        student, teacher, rows = cut(sl, axis=2), cut(tl, axis=2), cut(row_ids, axis=1)
        is_pair = (rows[:, :, None] == ids[:, None, :]) & (rows[:, :, None] > 0)
        is_pair = is_pair[:, None]

        goal = matmul("bhtk,bhsk->bhts", teacher * teacher_scale, tr)
        if sl.shape == tl.shape:
            # As in the score loss: each product is small where the models are close.
            left = jnp.concatenate([student - teacher, teacher], axis=-1) * student_scale
            difference = matmul("bhtk,bhsk->bhts", left, jnp.concatenate([sr, sr - tr], axis=-1))
        else:
            difference = matmul("bhtk,bhsk->bhts", student * student_scale, sr) - goal
        divergence, slope = _divergence(goal, difference, is_pair)
        total = sums[0] + divergence
        if not with_gradients:
            return (total,), None
        slope = slope * student_scale
        by_right = sums[1] + matmul("bhts,bhtk->bhsk", slope, student)
        return (total, by_right), matmul("bhts,bhsk->bhtk", slope, sr)

    start = (jnp.zeros(()), jnp.zeros_like(sr)) if with_gradients else (jnp.zeros(()),)
    sums, by_left = jax.lax.scan(block, start, jnp.arange((seq + room) // size))
    if by_left is None:
        return sums[0], None
    by_left = jnp.moveaxis(by_left, 0, 2).reshape(sl.shape)[:, :, :seq]
    return sums[0], (by_left, sums[1])


def _divergence(goal: Array, difference: Array, is_pair: Array) -> tuple[Array, Array]:
    """Σ KL(p_T ‖ p_S) and p_S − p_T, for p_T = softmax(goal), p_S = softmax(goal + difference).

    With r = log p_S − log p_T each term is p_T·(exp(r) − 1 − r): what is added, Σ p_S − Σ p_T, is
    zero, and all terms are positive. Where r is small nothing cancels: of order r², to 1e-7.
    """
    goal = jnp.where(is_pair, goal, _MASKED)
    log_teacher = jax.nn.log_softmax(goal, axis=-1)
    teacher = jnp.where(is_pair, jnp.exp(log_teacher), 0)
    difference = jnp.where(is_pair, difference, 0)

    # log of the student's normaliser by the teacher's.
    is_close = jnp.abs(difference).max(axis=-1, keepdims=True) < 0.5
    growth = teacher * jnp.expm1(jnp.where(is_close, difference, 0))
    near = jnp.log1p(growth.sum(axis=-1, keepdims=True))
    far = jax.nn.logsumexp(log_teacher + difference, axis=-1, keepdims=True)
    ratio = jnp.where(is_pair, difference - jnp.where(is_close, near, far), 0)

    is_small = jnp.abs(ratio) < 0.25
    small = jnp.where(is_small, ratio, 0)
    large_slope = jnp.where(is_pair, jnp.exp(log_teacher + ratio), 0) - teacher
    slope = jnp.where(is_small, teacher * jnp.expm1(small), large_slope)
    series = 1 / 2 + small * (1 / 6 + small * (1 / 24 + small * (1 / 120 + small / 720)))
    terms = jnp.where(is_small, teacher * small**2 * series, slope - teacher * ratio)
    return terms.sum(), slope


def _kl_alone(block_size: int, *factors: Array) -> Array:
    return _over_blocks(block_size, *factors, with_gradients=False)[0]


def _scaled(
    block_size: int, gradients: tuple[Array, Array], cotangent: Array
) -> tuple[Array | None, ...]:
    return *(cotangent * gradient for gradient in gradients), None, None, None


_summed_kl = jax.custom_vjp(_kl_alone, nondiff_argnums=(0,))


_summed_kl.defvjp(functools.partial(_over_blocks, with_gradients=True), _scaled)


_MASKED = -1e30  # finite: a row without a pair gives uniform probabilities, never NaN
