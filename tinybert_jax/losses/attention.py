"""Losses between the attentions of two models: of one layer, from queries, keys and values.

Conventions as in `losses`: fp32, the mask inside, `total / number of valid units`. No loss keeps a
[seq, seq] map for its gradient, except the score loss where a map is cheaper (`builds_maps`) or
there already (`reads_scores`).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinybert_jax.losses.pointwise import Normalisation, mean_over, unknown_normalisation


def builds_maps(seq: int, student_head_dim: int, teacher_head_dim: int, *, packed: bool) -> bool:
    """Whether the score loss builds its maps.

    For short rows they cost less than the Gram matrices of a head, as measured on a CPU with 12
    heads of (16, 32), (26, 64), (32, 32) and (64, 64); in packed rows always, where each segment
    would need Gram matrices of its own.
    """
    return packed or seq <= student_head_dim + teacher_head_dim


def attention_mse(
    student_query: Float[Array, "batch seq heads student_head_dim"],
    student_key: Float[Array, "batch seq heads student_head_dim"],
    teacher_query: Float[Array, "batch seq heads teacher_head_dim"],
    teacher_key: Float[Array, "batch seq heads teacher_head_dim"],
    mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"],
    *,
    normalisation: Normalisation,
    count: Float[Array, ""] | None = None,
    maps: bool | None = None,
) -> Float[Array, ""]:
    """MSE between the score maps QKᵀ/√head_dim of one layer (unit: pair).

    An integer mask holds segment ids of packed rows (0: padding): pairs within a segment count,
    "valid_only". `maps`: whether to build the maps; default: as `builds_maps` says.

    "valid_only" leaves padded rows and columns out and averages over valid pairs and heads;
    "paper_code" zeroes padded key columns, keeps padded query rows and averages over (batch, heads,
    seq, seq), so that its unit count is batch·seq². Source: TinyBERT equation 7; but for short or
    packed rows (`builds_maps`) in Gram form, which builds no map: O(seq·head_dim²) time and
    O(head_dim²) memory per head, the same number.

    Numerics of the Gram form: its terms cancel where the maps agree. With unequal head dims the
    value's relative error is about 1e-7·‖A‖²/‖A_S − A_T‖² (A: a score map) and the gradient's
    1e-7·‖A‖/‖A_S − A_T‖, so a value many orders below the maps' own size may come out slightly
    negative; it is returned as it is, because clamping would also zero the gradient. Equal head
    dims avoid this. Of bfloat16 queries and keys the products have 11 bits or more, so that on an
    accelerator 1e-3 stands for 1e-7; what those have lost before is as much.
    """
    is_real, is_packed = mask.astype(bool), mask.dtype != bool
    is_query, pairs = _valid_pairs(mask, normalisation)
    sq, tq = masked_by_head(student_query, is_query), masked_by_head(teacher_query, is_query)
    sk, tk = masked_by_head(student_key, is_real), masked_by_head(teacher_key, is_real)
    student_dim, teacher_dim = sq.shape[-1], tq.shape[-1]
    if student_dim == teacher_dim:
        # A_S − A_T = (Q−Q')Kᵀ + Q'(K−K')ᵀ: both products are small when the models are close.
        factors = (sq - tq) * student_dim**-0.5, sk, tq * student_dim**-0.5, sk - tk
    else:
        factors = sq * student_dim**-0.5, sk, tq * -(teacher_dim**-0.5), tk
    precision = _precision(student_query, student_key, teacher_query, teacher_key)
    if maps is None:
        maps = builds_maps(mask.shape[1], student_dim, teacher_dim, packed=is_packed)
    if maps:
        counted = _same_segment(mask) if is_packed else None
        total = _squared_norm_of_map(precision, *factors, counted)
    else:
        assert not is_packed, "the Gram matrices would be each segment's own"
        total = _squared_norm_of_sum(precision, *factors)
    return mean_over(total / student_query.shape[2], pairs, count)


def reads_scores(seq: int, student_head_dim: int, teacher_head_dim: int, *, packed: bool) -> bool:
    """Whether the score loss reads maps that both models' attention has built (`score_mse`).

    As measured on a CPU with heads of (16, 32): a tenth of a step less than Gram matrices at 64
    tokens, the same at 128, more memory from there. Of equal head dims never: `attention_mse`
    loses nothing to cancellation there.
    """
    is_short = seq <= 2 * (student_head_dim + teacher_head_dim)
    return student_head_dim != teacher_head_dim and (packed or is_short)


def score_mse(
    student: Float[Array, "batch heads seq seq"],
    teacher: Float[Array, "batch heads seq seq"],
    mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"],
    *,
    normalisation: Normalisation,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """`attention_mse` of scores that both models' attention has built: no further product.

    Unit, mask and normalisation as there (TinyBERT equation 7). The scores have the precision of
    the models' own products; in fp32 on a CPU the relative error of the value and of the gradient
    is about 1e-7·‖A‖/‖A_S − A_T‖.
    """
    is_query, pairs = _valid_pairs(mask, normalisation)
    if mask.dtype == bool:
        counted = is_query[:, :, None] & mask[:, None, :]
    else:
        counted = _same_segment(mask)
    wide = student.astype(jnp.float32), teacher.astype(jnp.float32)
    difference = jnp.where(counted[:, None], wide[0] - wide[1], 0)
    return mean_over(jnp.square(difference).sum() / student.shape[1], pairs, count)


def regroup(
    x: Float[Array, "batch seq heads head_dim"], num_heads: int
) -> Float[Array, "batch seq relation_heads relation_dim"]:
    """The same features as `num_heads` heads: MiniLMv2's relation heads.

    Raises ValueError where the width is no multiple of them.
    """
    width = x.shape[2] * x.shape[3]
    if width % num_heads:
        raise ValueError(
            f"relation heads: expected a divisor of the width {width}, got {num_heads}; choose one "
            "that divides both models' widths"
        )
    return x.reshape(*x.shape[:2], num_heads, width // num_heads)


def num_pairs(mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"]) -> Float[Array, ""]:
    """Token pairs of the same example, over the batch."""
    if mask.dtype == bool:
        return jnp.square(mask.sum(-1, dtype=jnp.float32)).sum()
    return _same_segment(mask).sum(dtype=jnp.float32)


def _valid_pairs(mask: Array, normalisation: str) -> tuple[Array, Array]:
    """Which tokens' rows of the maps count, [batch, seq], and how many pairs there are."""
    if normalisation == "valid_only":
        return mask.astype(bool), num_pairs(mask)
    if normalisation == "paper_code":
        assert mask.dtype == bool, "the config refuses paper_code for packed rows"
        return jnp.ones_like(mask), jnp.float32(mask.size * mask.shape[1])
    raise ValueError(unknown_normalisation(normalisation))


def _same_segment(segment_ids: Int[Array, "batch seq"]) -> Bool[Array, "batch seq seq"]:
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & (segment_ids[:, None, :] > 0)


def _precision(*taps: Array) -> jax.lax.Precision:
    """Of products between taps: of bfloat16 ones TF32 on a GPU, three bfloat16 passes on a TPU."""
    is_rounded = all(x.dtype == jnp.bfloat16 for x in taps)
    return jax.lax.Precision.HIGH if is_rounded else jax.lax.Precision.HIGHEST


def masked_by_head(x: Array, mask: Array) -> Array:
    """[b, t, h, k] to fp32 [b, h, t, k], masked rows zero.

    One explicit transpose, fused with the mask and shared by all Gram products, where XLA:CPU would
    else insert a slower one into each of them.
    """
    masked = jnp.where(mask[:, :, None, None], x.astype(jnp.float32), 0)
    return masked.transpose(0, 2, 1, 3)


def _squared_norm_of_sum(
    precision: jax.lax.Precision, left: Array, right: Array, left2: Array, right2: Array
) -> Array:
    """Σ‖left·rightᵀ + left2·right2ᵀ‖² over b and h, each factor [b, h, t, k], by Gram matrices.

    The terms cancel within each head, before the sum over heads can round: 10× more accurate.
    """
    gram, cross_gram = (functools.partial(make, precision) for make in (_gram, _cross_gram))
    first = jnp.sum(gram(left) * gram(right), axis=(-2, -1))
    cross = jnp.sum(cross_gram(left, left2) * cross_gram(right, right2), axis=(-2, -1))
    second = jnp.sum(gram(left2) * gram(right2), axis=(-2, -1))
    return jnp.sum(first + 2 * cross + second)


def _squared_norm_of_map(
    precision: jax.lax.Precision,
    left: Array,
    right: Array,
    left2: Array,
    right2: Array,
    counted: Array | None,
) -> Array:
    """The same from the map itself, of pairs [b, query, key] that are counted; None: of all.

    Two products, that what has no gradient costs none on the way back.
    """
    product = functools.partial(jnp.einsum, "bhtk,bhsk->bhts", precision=precision)
    difference = product(left, right) + product(left2, right2)
    if counted is not None:
        difference = jnp.where(counted[:, None], difference, 0)
    return jnp.square(difference).sum()


def _cross_gram(precision: jax.lax.Precision, x: Array, y: Array) -> Array:
    return jnp.einsum("bhtk,bhtl->bhkl", x, y, precision=precision)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gram(precision: jax.lax.Precision, x: Array) -> Array:
    return _cross_gram(precision, x, x)


@_gram.defjvp
def _gram_jvp(
    precision: jax.lax.Precision, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """Symmetry makes one product of the two that autodiff would compute."""
    (x,), (dx,) = primals, tangents
    half = _cross_gram(precision, dx, x)
    return _gram(precision, x), half + half.mT
