"""Attention for GPUs as Pallas kernels that Triton compiles: no score map in memory.

Owns the kernels, forward and backward, and the sizes of their blocks. Dropout is that of
`models.dropout`, hashed again in the kernels from the position of an entry of the map, so that the
same key drops the same entries as where the map is built. `models.attention` says when they run.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, UInt32

from tinybert_jax.models.dropout import is_kept, key_words
from tinybert_jax.models.triton_blocks import (
    HEAD,
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


def triton_attention(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch seq heads head_dim"],
    values: Float[Array, "batch seq heads head_dim"],
    query_ids: Int[Array, "batch seq"],
    key_ids: Int[Array, "batch seq"],
    seeds: UInt32[Array, "batch 3"],
    *,
    dropout_rate: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """dropout(softmax(QKᵀ/√head_dim))·V over the keys with the id of the query.

    Softmax and sums in fp32; probabilities and gradients of scores are rounded to the dtype of the
    queries for their products. Every query needs a key with its id. `seeds`: `dropout_seeds`.
    `interpret` runs the kernels on any device. Blocks as in FlashAttention-2 (arXiv 2307.08691).
    """
    sizes = _Sizes(Blocks(queries.shape[1]), queries.shape[3], dropout_rate, interpret)
    return _attention(sizes, queries, keys, values, query_ids, key_ids, seeds)


def dropout_seeds(
    key: jax.Array | None, num_rows: int, num_heads: int, seq: int
) -> UInt32[Array, "batch 3"]:
    """The position of each row's first entry in the map, and the two words of the key.

    A row keeps them on whichever device it is, so that the mask does not depend on the mesh.
    """
    if key is None:
        return jnp.zeros((num_rows, 3), jnp.uint32)
    stride = jnp.uint32(num_heads * seq**2 % 2**32)
    first = jnp.arange(num_rows, dtype=jnp.uint32) * stride
    words = jnp.broadcast_to(key_words(key)[None], (num_rows, 2))
    return jnp.concatenate([first[:, None], words], axis=1)


_MASKED_SCORE = -1e30  # far below any score, and finite


class _Sizes(NamedTuple):
    """The static sizes of a call."""

    blocks: Blocks
    head_dim: int
    dropout_rate: float
    interpret: bool

    @property
    def scale(self) -> float:
        """Of scores in powers of 2, whose exponential is one instruction."""
        return math.log2(math.e) * self.head_dim**-0.5

    @property
    def kept_share(self) -> float:
        """Context and gradients are divided by it: their sums, not each entry."""
        return 1 - self.dropout_rate


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(sizes: _Sizes, *operands: Array) -> Array:
    return _attention_forward(sizes, *operands)[0]


def _attention_forward(sizes: _Sizes, *operands: Array) -> tuple[Array, tuple[Array, ...]]:
    queries = operands[0]
    num_rows, seq, num_heads, _ = queries.shape
    shapes = [
        jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        jax.ShapeDtypeStruct((num_rows, num_heads, seq), jnp.float32),
    ]
    context, log_sums = _call(_forward_kernel, sizes, operands, shapes)
    return context, (*operands, context, log_sums)


def _attention_backward(
    sizes: _Sizes, residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array | None, ...]:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in residuals[:3]]
    sizes = sizes._replace(blocks=whole_or_parts(sizes.blocks.seq))
    is_whole = sizes.blocks.num_query_blocks == 1
    kernel = _short_backward_kernel if is_whole else _backward_kernel
    return *_call(kernel, sizes, (*residuals, cotangent), shapes), None, None, None


def _call(kernel: Any, sizes: _Sizes, operands: Any, results: Any) -> Sequence[Array]:
    own = functools.partial(kernel, sizes)
    return call(own, operands, results, blocks=sizes.blocks, interpret=sizes.interpret)


_attention.defvjp(_attention_forward, _attention_backward)


def _scores(
    sizes: _Sizes, queries: Array, keys: Array, ids: tuple[Array, Array], key_span: Span
) -> Array:
    """Scores · log2(e), fp32 [query, key], those of keys that a query does not see at −1e30."""
    is_seen = ids[0][:, None] == ids[1][None]
    if key_span.is_there is not None:
        is_seen = is_seen & key_span.is_there[None]
    return jnp.where(is_seen, product(queries, keys, 1, 1) * sizes.scale, _MASKED_SCORE)


class _Seeds(NamedTuple):
    """What dropout reads in one program."""

    first: Array  # position of the map's first entry
    words: tuple[Array, Array]


def _read_seeds(sizes: _Sizes, seeds: Any) -> _Seeds:
    head = pl.program_id(HEAD).astype(jnp.uint32)
    stride = jnp.uint32(sizes.blocks.seq**2 % 2**32)
    return _Seeds(seeds[0] + head * stride, (seeds[1], seeds[2]))


def _is_kept(sizes: _Sizes, seeds: _Seeds, query_span: Span, key_span: Span) -> Array | None:
    """The entries of a block that dropout keeps; None: all."""
    if not sizes.dropout_rate:
        return None
    query, key = (span.index.astype(jnp.uint32) for span in (query_span, key_span))
    position = (seeds.first + query * jnp.uint32(sizes.blocks.seq))[:, None] + key[None]
    return is_kept(position, seeds.words, sizes.dropout_rate)


def _dropped(kept: Array | None, x: Array) -> Array:
    return x if kept is None else jnp.where(kept, x, 0.0)


def _forward_kernel(
    sizes: _Sizes,
    queries: Any,
    keys: Any,
    values: Any,
    query_ids: Any,
    key_ids: Any,
    seeds: Any,
    context: Any,
    log_sums: Any,
) -> None:
    """Context of a block of queries, and the logarithm to base 2 of its softmax's sums."""
    own = sizes.blocks.queries(pl.program_id(TOKENS))
    block_queries = read(queries, own)
    block_ids = read(query_ids, own)
    own_seeds = _read_seeds(sizes, seeds)

    def add_keys(j: Any, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weighted, total, largest = sums
        span = sizes.blocks.keys(j)
        ids = block_ids, read(key_ids, span)
        scores = _scores(sizes, block_queries, read(keys, span), ids, span)
        new_largest = jnp.maximum(largest, scores.max(1))
        probs = jnp.exp2(scores - new_largest[:, None])
        shrink = jnp.exp2(largest - new_largest)
        kept = _is_kept(sizes, own_seeds, own, span)
        dropped = _dropped(kept, probs).astype(values.dtype)
        block = product(dropped, read(values, span), 1, 0)
        return weighted * shrink[:, None] + block, total * shrink + probs.sum(1), new_largest

    size = sizes.blocks.query_block
    start = (
        jnp.zeros(block_queries.shape, jnp.float32),
        jnp.zeros(size, jnp.float32),
        jnp.full(size, -jnp.inf, jnp.float32),
    )
    weighted, total, largest = sum_over(sizes.blocks.num_key_blocks, add_keys, start)
    write(context, own, weighted / (total * sizes.kept_share)[:, None])
    write(log_sums, own, largest + jnp.log2(total))


class _Row(NamedTuple):
    """The operands of the gradient, of one row and head."""

    queries: Any
    keys: Any
    values: Any
    query_ids: Any
    key_ids: Any
    seeds: Any
    context: Any
    log_sums: Any
    cotangent: Any


class _QueryBlock(NamedTuple):
    """What the gradient reads of a block of queries."""

    span: Span
    queries: Array
    ids: Array
    log_sums: Array
    cotangent: Array
    mean: Array  # Σ probability · its gradient, which is cotangent · context; · kept_share


class _KeyBlock(NamedTuple):
    span: Span
    keys: Array
    values: Array
    ids: Array


def _query_block(sizes: _Sizes, row: _Row, block: Any) -> _QueryBlock:
    span = sizes.blocks.queries(block)
    taken = row.queries, row.query_ids, row.log_sums, row.cotangent, row.context
    queries, ids, log_sums, cotangent, context = (read(x, span) for x in taken)
    mean = (cotangent.astype(jnp.float32) * context.astype(jnp.float32)).sum(1)
    return _QueryBlock(span, queries, ids, log_sums, cotangent, mean * sizes.kept_share)


def _key_block(sizes: _Sizes, row: _Row, block: Any) -> _KeyBlock:
    span = sizes.blocks.keys(block)
    return _KeyBlock(span, *(read(x, span) for x in (row.keys, row.values, row.key_ids)))


def _block_gradients(
    sizes: _Sizes, seeds: _Seeds, query: _QueryBlock, key: _KeyBlock
) -> tuple[Array, Array]:
    """(dropped probabilities, gradient of the scores) of a block, both · kept_share."""
    scores = _scores(sizes, query.queries, key.keys, (query.ids, key.ids), key.span)
    probs = jnp.exp2(scores - query.log_sums[:, None])
    kept = _is_kept(sizes, seeds, query.span, key.span)
    by_probs = _dropped(kept, product(query.cotangent, key.values, 1, 1))
    by_scores = probs * (by_probs - query.mean[:, None])
    dtype = query.queries.dtype
    return _dropped(kept, probs).astype(dtype), by_scores.astype(dtype)


def _short_backward_kernel(sizes: _Sizes, *refs: Any) -> None:
    """Gradients of a row and head whose queries are one block: the map is computed once."""
    row, (by_queries, by_keys, by_values) = _Row(*refs[:-3]), refs[-3:]
    seeds, query = _read_seeds(sizes, row.seeds), _query_block(sizes, row, 0)
    factor = sizes.head_dim**-0.5 / sizes.kept_share

    def add_keys(j: Any, total: Array) -> Array:
        key = _key_block(sizes, row, j)
        dropped, by_scores = _block_gradients(sizes, seeds, query, key)
        write(by_values, key.span, product(dropped, query.cotangent, 0, 0) / sizes.kept_share)
        write(by_keys, key.span, product(by_scores, query.queries, 0, 0) * factor)
        return total + product(by_scores, key.keys, 1, 0)

    zeros = jnp.zeros(query.queries.shape, jnp.float32)
    total = sum_over(sizes.blocks.num_key_blocks, add_keys, zeros)
    write(by_queries, query.span, total * factor)


def _backward_kernel(sizes: _Sizes, *refs: Any) -> None:
    """Gradients of a block of keys and values, then of a block of queries.

    The map is computed twice, so that no sum is written in parts.
    """
    row, (by_queries, by_keys, by_values) = _Row(*refs[:-3]), refs[-3:]
    seeds, block = _read_seeds(sizes, row.seeds), pl.program_id(TOKENS)
    own_key, factor = _key_block(sizes, row, block), sizes.head_dim**-0.5 / sizes.kept_share

    def add_queries(j: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        query = _query_block(sizes, row, j)
        dropped, by_scores = _block_gradients(sizes, seeds, query, own_key)
        own = product(by_scores, query.queries, 0, 0), product(dropped, query.cotangent, 0, 0)
        return sums[0] + own[0], sums[1] + own[1]

    zeros = jnp.zeros(own_key.keys.shape, jnp.float32)
    keys, values = sum_over(sizes.blocks.num_query_blocks, add_queries, (zeros, zeros))
    write(by_keys, own_key.span, keys * factor)
    write(by_values, own_key.span, values / sizes.kept_share)

    own_query = _query_block(sizes, row, block)

    def add_keys(j: Any, total: Array) -> Array:
        key = _key_block(sizes, row, j)
        _, by_scores = _block_gradients(sizes, seeds, own_query, key)
        return total + product(by_scores, key.keys, 1, 0)

    zeros = jnp.zeros(own_query.queries.shape, jnp.float32)
    queries = sum_over(sizes.blocks.num_key_blocks, add_keys, zeros)
    write(by_queries, own_query.span, queries * factor)
