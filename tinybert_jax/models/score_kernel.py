"""The distance between the attention scores of two models as a Pallas kernel: no map in memory.

The kernel computes the gradients together with the value, so that a map is computed once (rows of
up to 256 tokens) or twice. `losses.attention` says what the distance is for.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from tinybert_jax.models.triton_blocks import (
    TOKENS,
    Blocks,
    Span,
    call,
    product,
    read,
    sum_over,
    whole_or_parts,
    write,
)


def score_distance(
    student_query: Float[Array, "batch seq heads student_head_dim"],
    student_key: Float[Array, "batch seq heads student_head_dim"],
    teacher_query: Float[Array, "batch seq heads teacher_head_dim"],
    teacher_key: Float[Array, "batch seq heads teacher_head_dim"],
    query_ids: Int[Array, "batch seq"],
    key_ids: Int[Array, "batch seq"],
    *,
    interpret: bool = False,
) -> Float[Array, " batch"]:
    """Σ over heads and pairs of (QKᵀ/√head_dim of the student − that of the teacher)².

    A pair is a query and a key with the same id above 0. Scores and sums are fp32; for the
    gradients of the student's queries and keys, differences are rounded to their dtype. The teacher
    gets no gradient. `interpret` runs the kernels on any device.
    """
    sizes = _Sizes(whole_or_parts(student_query.shape[1]), interpret)
    taps = student_query, student_key, teacher_query, teacher_key
    return _distance(sizes, *taps, query_ids, key_ids)


class _Sizes(NamedTuple):
    """The static sizes of a call."""

    blocks: Blocks
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _distance(sizes: _Sizes, *operands: Array) -> Array:
    return _distance_forward(sizes, *operands)[0]


def _distance_forward(sizes: _Sizes, *operands: Array) -> tuple[Array, tuple[Array, Array]]:
    query, key = operands[:2]
    num_rows, seq, num_heads, _ = query.shape
    shapes = [
        jax.ShapeDtypeStruct((num_rows, num_heads, seq), jnp.float32),
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct(key.shape, key.dtype),
    ]
    is_whole = sizes.blocks.num_query_blocks == 1
    kernel = functools.partial(_short_score_kernel if is_whole else _score_kernel, sizes)
    options = {"blocks": sizes.blocks, "interpret": sizes.interpret}
    by_query, *gradients = call(kernel, operands, shapes, **options)
    return by_query.sum((1, 2)), tuple(gradients)


def _distance_backward(
    sizes: _Sizes, gradients: tuple[Array, Array], cotangent: Array
) -> tuple[Array | None, ...]:
    factor = cotangent[:, None, None, None]
    by_query, by_key = ((factor * x.astype(jnp.float32)).astype(x.dtype) for x in gradients)
    return by_query, by_key, None, None, None, None


_distance.defvjp(_distance_forward, _distance_backward)


class _Row(NamedTuple):
    """The operands, of one row and head."""

    student_query: Any
    student_key: Any
    teacher_query: Any
    teacher_key: Any
    query_ids: Any
    key_ids: Any


class _Block(NamedTuple):
    """The queries, or the keys, of a block."""

    span: Span
    student: Array
    teacher: Array
    ids: Array


def _query_block(sizes: _Sizes, row: _Row, block: Any) -> _Block:
    span = sizes.blocks.queries(block)
    taken = row.student_query, row.teacher_query, row.query_ids
    return _Block(span, *(read(x, span) for x in taken))


def _key_block(sizes: _Sizes, row: _Row, block: Any) -> _Block:
    span = sizes.blocks.keys(block)
    return _Block(span, *(read(x, span) for x in (row.student_key, row.teacher_key, row.key_ids)))


def _difference(row: _Row, query: _Block, key: _Block) -> Array:
    """Of the scores of a block, fp32 [query, key]; 0 where there is no pair."""
    student = product(query.student, key.student, 1, 1) * row.student_query.shape[1] ** -0.5
    teacher = product(query.teacher, key.teacher, 1, 1) * row.teacher_query.shape[1] ** -0.5
    # Beyond the end of a row the ids are 0.
    is_pair = (query.ids[:, None] == key.ids[None]) & (key.ids > 0)[None]
    return jnp.where(is_pair, student - teacher, 0.0)


def _short_score_kernel(sizes: _Sizes, *refs: Any) -> None:
    """Distance and gradients of a row and head whose queries are one block."""
    row, (distances, by_queries, by_keys) = _Row(*refs[:-3]), refs[-3:]
    query = _query_block(sizes, row, 0)
    factor = 2 * row.student_query.shape[1] ** -0.5

    def add_keys(j: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        key = _key_block(sizes, row, j)
        difference = _difference(row, query, key)
        rounded = difference.astype(query.student.dtype)
        write(by_keys, key.span, factor * product(rounded, query.student, 0, 0))
        total = sums[0] + jnp.square(difference).sum(1)
        return total, sums[1] + product(rounded, key.student, 1, 0)

    zeros = jnp.zeros(query.student.shape, jnp.float32)
    start = jnp.zeros(len(query.ids), jnp.float32), zeros
    total, by_query = sum_over(sizes.blocks.num_key_blocks, add_keys, start)
    write(distances, query.span, total)
    write(by_queries, query.span, factor * by_query)


def _score_kernel(sizes: _Sizes, *refs: Any) -> None:
    """Gradient of a block of keys, then distance and gradient of a block of queries."""
    row, (distances, by_queries, by_keys) = _Row(*refs[:-3]), refs[-3:]
    block, factor = pl.program_id(TOKENS), 2 * row.student_query.shape[1] ** -0.5
    key = _key_block(sizes, row, block)

    def add_queries(j: Any, total: Array) -> Array:
        query = _query_block(sizes, row, j)
        rounded = _difference(row, query, key).astype(query.student.dtype)
        return total + product(rounded, query.student, 0, 0)

    zeros = jnp.zeros(key.student.shape, jnp.float32)
    by_key = sum_over(sizes.blocks.num_query_blocks, add_queries, zeros)
    write(by_keys, key.span, factor * by_key)

    query = _query_block(sizes, row, block)

    def add_keys(j: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        other = _key_block(sizes, row, j)
        difference = _difference(row, query, other)
        rounded = difference.astype(query.student.dtype)
        total = sums[0] + jnp.square(difference).sum(1)
        return total, sums[1] + product(rounded, other.student, 1, 0)

    start = jnp.zeros(len(query.ids), jnp.float32), jnp.zeros(query.student.shape, jnp.float32)
    total, by_query = sum_over(sizes.blocks.num_key_blocks, add_keys, start)
    write(distances, query.span, total)
    write(by_queries, query.span, factor * by_query)
