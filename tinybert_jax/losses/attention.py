"""Losses that compare the attention scores of one student layer and one teacher layer.

fp32, mask and `total / number of valid units` as in `losses.pointwise`. A score map is
QKᵀ/√head_dim, [seq, seq] per head. No loss keeps a map for its gradient, except `attention_mse`
where maps are cheaper (`builds_score_maps`) and `score_mse`, whose maps already exist
(`reads_attention_scores`).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinybert_jax.losses.pointwise import Normalisation, divide_by_count, unknown_normalisation


def builds_score_maps(
    seq: int, student_head_dim: int, teacher_head_dim: int, *, packed: bool
) -> bool:
    """Whether `attention_mse` builds score maps instead of Gram matrices.

    Maps cost less for short rows, as measured on a CPU with 12 heads of (student, teacher) head
    dims (16, 32), (26, 64), (32, 32) and (64, 64). Packed rows always build maps, because every
    segment would need separate Gram matrices.
    """
    return packed or seq <= student_head_dim + teacher_head_dim


# (student_query, student_key, teacher_query, teacher_key, query_ids, key_ids) -> [batch]: the sum
# of squared differences of scores over heads, and over pairs with the same id above 0.
Distance = Callable[..., Array]


def attention_mse(
    student_query: Float[Array, "batch seq heads student_head_dim"],
    student_key: Float[Array, "batch seq heads student_head_dim"],
    teacher_query: Float[Array, "batch seq heads teacher_head_dim"],
    teacher_key: Float[Array, "batch seq heads teacher_head_dim"],
    mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"],
    *,
    normalisation: Normalisation,
    count: Float[Array, ""] | None = None,
    build_maps: bool | None = None,
    distance: Distance | None = None,
) -> Float[Array, ""]:
    """MSE between the score maps of a student layer and a teacher layer (unit: pair).

    An integer mask holds the segment ids of packed rows (0: padding): pairs within a segment count,
    and `normalisation` must be "valid_only". `build_maps`: whether to build the maps; None:
    `builds_score_maps` decides. `distance`: a kernel that does neither, in place of both.

    "valid_only" leaves padded rows and columns out and averages over valid pairs and heads;
    "paper_code" zeroes padded key columns, keeps padded query rows and averages over (batch, heads,
    seq, seq), so that its unit count is batch·seq². Source: TinyBERT equation 7. Without maps, Gram
    matrices give the same number in O(seq·head_dim²) time and O(head_dim²) memory per head.

    Numerics of the Gram matrices: their terms cancel where the maps A_S and A_T agree. With unequal
    head dims the relative error is about 1e-7·‖A‖²/‖A_S − A_T‖² for the value and
    1e-7·‖A‖/‖A_S − A_T‖ for the gradient, so a value many orders of magnitude below ‖A‖² may come
    out slightly negative; it is not clamped, because clamping would also zero the gradient. Equal
    head dims avoid the cancellation. Products of bfloat16 queries and keys have 11 bits or more: on
    an accelerator read 1e-3 for 1e-7, no more than rounding to bfloat16 has already cost.
    """
    is_real, is_packed = mask.astype(bool), mask.dtype != bool
    is_query, num_valid = _query_rows_and_num_pairs(mask, normalisation)
    if distance is not None:
        key_ids = mask.astype(jnp.int32)
        query_ids = key_ids if is_packed else is_query.astype(jnp.int32)
        taps = student_query, student_key, teacher_query, teacher_key
        total = distance(*taps, query_ids, key_ids).sum()
        return divide_by_count(total / student_query.shape[2], num_valid, count)
    s_query, t_query = mask_heads(student_query, is_query), mask_heads(teacher_query, is_query)
    s_key, t_key = mask_heads(student_key, is_real), mask_heads(teacher_key, is_real)
    student_dim, teacher_dim = s_query.shape[-1], t_query.shape[-1]
    factors = _difference(s_query, s_key, t_query, t_key)
    precision = _product_precision(student_query, student_key, teacher_query, teacher_key)
    if build_maps is None:
        build_maps = builds_score_maps(mask.shape[1], student_dim, teacher_dim, packed=is_packed)
    if build_maps:
        is_pair = _same_segment(mask) if is_packed else None
        total = _squared_norm_by_map(precision, *factors, is_pair)
    else:
        assert not is_packed, "packed rows need maps: Gram matrices would mix their segments"
        total = _squared_norm_by_gram(precision, *factors)
    return divide_by_count(total / student_query.shape[2], num_valid, count)


def pair_mse(
    student_query: Float[Array, "batch queries heads student_head_dim"],
    student_key: Float[Array, "batch seq heads student_head_dim"],
    teacher_query: Float[Array, "batch queries heads teacher_head_dim"],
    teacher_key: Float[Array, "batch seq heads teacher_head_dim"],
    pairs: Bool[Array, "batch queries seq"],
    *,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """`attention_mse` over any (query, key) pairs: those of a decoder (unit: pair). Builds maps."""
    inputs = student_query, student_key, teacher_query, teacher_key
    by_head = (x.astype(jnp.float32).transpose(0, 2, 1, 3) for x in inputs)
    total = _squared_norm_by_map(_product_precision(*inputs), *_difference(*by_head), pairs)
    return divide_by_count(total / student_query.shape[2], pairs.sum(dtype=jnp.float32), count)


def reads_attention_scores(
    seq: int, student_head_dim: int, teacher_head_dim: int, *, packed: bool
) -> bool:
    """Whether `score_mse` of the maps that both models' attention builds replaces `attention_mse`.

    As measured on a CPU with head dims (16, 32), reading the maps takes a tenth of a step less than
    Gram matrices at 64 tokens, the same time at 128 and more memory beyond. With equal head dims
    never, because `attention_mse` has no cancellation there.
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
    """`attention_mse` of score maps that both models' attention has built; adds no product.

    Unit, mask and normalisation as in `attention_mse` (TinyBERT equation 7). The scores have the
    precision of the models' products; in fp32 on a CPU the relative error of the value and of the
    gradient is about 1e-7·‖A‖/‖A_S − A_T‖.
    """
    is_query, num_valid = _query_rows_and_num_pairs(mask, normalisation)
    if mask.dtype == bool:
        is_pair = is_query[:, :, None] & mask[:, None, :]
    else:
        is_pair = _same_segment(mask)
    in_float32 = student.astype(jnp.float32), teacher.astype(jnp.float32)
    difference = jnp.where(is_pair[:, None], in_float32[0] - in_float32[1], 0)
    return divide_by_count(jnp.square(difference).sum() / student.shape[1], num_valid, count)


def regroup_heads(
    x: Float[Array, "batch seq heads head_dim"], num_heads: int
) -> Float[Array, "batch seq relation_heads relation_dim"]:
    """Reshapes the features to `num_heads` heads: MiniLMv2's relation heads.

    Raises ValueError where `num_heads` does not divide the width, heads·head_dim.
    """
    width = x.shape[2] * x.shape[3]
    if width % num_heads:
        raise ValueError(
            f"relation heads: expected a divisor of the width {width}, got {num_heads}; choose one "
            "that divides both models' widths"
        )
    return x.reshape(*x.shape[:2], num_heads, width // num_heads)


def num_pairs(mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"]) -> Float[Array, ""]:
    """Number of (query, key) pairs of real tokens of the same example or segment in the batch."""
    if mask.dtype == bool:
        return jnp.square(mask.sum(-1, dtype=jnp.float32)).sum()
    return _same_segment(mask).sum(dtype=jnp.float32)


def _query_rows_and_num_pairs(mask: Array, normalisation: str) -> tuple[Array, Array]:
    """Mask of the query rows that count, [batch, seq], and the number of pairs that count."""
    if normalisation == "valid_only":
        return mask.astype(bool), num_pairs(mask)
    if normalisation == "paper_code":
        assert mask.dtype == bool, "the config refuses paper_code for packed rows"
        return jnp.ones_like(mask), jnp.float32(mask.size * mask.shape[1])
    raise ValueError(unknown_normalisation(normalisation))


def _difference(
    s_query: Array, s_key: Array, t_query: Array, t_key: Array
) -> tuple[Array, Array, Array, Array]:
    """Factors of A_S − A_T = left·rightᵀ + left2·right2ᵀ; arrays are [b, h, t, k]."""
    student_dim, teacher_dim = s_query.shape[-1], t_query.shape[-1]
    if student_dim != teacher_dim:
        return s_query * student_dim**-0.5, s_key, t_query * -(teacher_dim**-0.5), t_key
    # (Q_S − Q_T)K_Sᵀ + Q_T(K_S − K_T)ᵀ: both products are small for close models.
    scale = student_dim**-0.5
    return (s_query - t_query) * scale, s_key, t_query * scale, s_key - t_key


def _same_segment(segment_ids: Int[Array, "batch seq"]) -> Bool[Array, "batch seq seq"]:
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & (segment_ids[:, None, :] > 0)


def _product_precision(*inputs: Array) -> jax.lax.Precision:
    """HIGH for products of bfloat16 arrays: TF32 on a GPU, three bfloat16 passes on a TPU."""
    is_rounded = all(x.dtype == jnp.bfloat16 for x in inputs)
    return jax.lax.Precision.HIGH if is_rounded else jax.lax.Precision.HIGHEST


def mask_heads(x: Array, mask: Array) -> Array:
    """[b, t, h, k] to fp32 [b, h, t, k] with masked rows zeroed.

    One explicit transpose, fused with the mask and shared by all Gram products; XLA:CPU would
    otherwise insert a slower transpose into every product.
    """
    masked = jnp.where(mask[:, :, None, None], x.astype(jnp.float32), 0)
    return masked.transpose(0, 2, 1, 3)


def _squared_norm_by_gram(
    precision: jax.lax.Precision, left: Array, right: Array, left2: Array, right2: Array
) -> Array:
    """Σ‖left·rightᵀ + left2·right2ᵀ‖² over b and h from Gram matrices; all factors [b, h, t, k].

    The terms cancel within each head, before the sum over heads can round: 10× more accurate.
    """
    gram, cross_gram = (functools.partial(make, precision) for make in (_gram, _cross_gram))
    first = jnp.sum(gram(left) * gram(right), axis=(-2, -1))
    cross = jnp.sum(cross_gram(left, left2) * cross_gram(right, right2), axis=(-2, -1))
    second = jnp.sum(gram(left2) * gram(right2), axis=(-2, -1))
    return jnp.sum(first + 2 * cross + second)


def _squared_norm_by_map(
    precision: jax.lax.Precision,
    left: Array,
    right: Array,
    left2: Array,
    right2: Array,
    is_pair: Array | None,
) -> Array:
    """`_squared_norm_by_gram` from the map, over the pairs `is_pair` [b, t, s]; None: all pairs.

    Two products, so that factors without a gradient cost nothing in the backward pass.
    """
    product = functools.partial(jnp.einsum, "bhtk,bhsk->bhts", precision=precision)
    difference = product(left, right) + product(left2, right2)
    if is_pair is not None:
        difference = jnp.where(is_pair[:, None], difference, 0)
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
    """By symmetry one product is enough; autodiff would compute two."""
    (x,), (dx,) = primals, tangents
    half = _cross_gram(precision, dx, x)
    return _gram(precision, x), half + half.mT
