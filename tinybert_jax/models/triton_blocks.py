"""Blocks of tokens of one row and head, as Pallas kernels for GPUs read, multiply and write them.

A program of a kernel works on one row, one head and one block of tokens. Triton has powers of two
only: a block beyond the end of a row, or a head dim between two of them, is filled up with zeros in
registers, not in memory.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

MIN_BLOCK = 16  # the smallest side of a product in Triton
BLOCK = 64  # tokens; larger ones on both sides of a map spill registers
WHOLE = 256  # tokens of the longest row whose queries are one block without a spill
HEAD, TOKENS, ROW = range(3)  # axes of the programs: heads of a row run together, they share lines


class Span(NamedTuple):
    """The tokens of a block: their indices, and which of them the row has (None: all)."""

    index: Array
    is_there: Array | None


class Blocks(NamedTuple):
    """How the queries and keys of a row of `seq` tokens are cut."""

    seq: int
    largest_query_block: int = BLOCK  # tokens

    @property
    def query_block(self) -> int:
        return min(self.largest_query_block, filled_up(self.seq))

    @property
    def num_query_blocks(self) -> int:
        return pl.cdiv(self.seq, self.query_block)

    @property
    def key_block(self) -> int:
        largest = BLOCK if self.query_block <= 2 * BLOCK else BLOCK // 2
        return min(largest, filled_up(self.seq))

    @property
    def num_key_blocks(self) -> int:
        return pl.cdiv(self.seq, self.key_block)

    def queries(self, block: Any) -> Span:
        return _span(block, self.query_block, self.seq)

    def keys(self, block: Any) -> Span:
        return _span(block, self.key_block, self.seq)


def whole_or_parts(seq: int) -> Blocks:
    """One block of queries where a kernel can hold it, so that it computes a map once."""
    return Blocks(seq, WHOLE if seq <= WHOLE else BLOCK)


def _span(block: Any, size: int, num_tokens: int) -> Span:
    index = block * size + jax.lax.iota(jnp.int32, size)
    return Span(index, index < num_tokens if num_tokens % size else None)


def filled_up(size: int) -> int:
    """The next size that a product in Triton has."""
    return max(MIN_BLOCK, pl.next_power_of_2(size))


def call(
    kernel: Callable[..., None],
    operands: Sequence[Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    blocks: Blocks,
    interpret: bool,
) -> Sequence[Array]:
    """Runs a kernel for every head, block of queries and row.

    The first operand is [batch, seq, heads, head_dim]. The kernel sees of operands and results: a
    head [seq, head_dim] of those with four axes, a head [seq] of [batch, heads, seq], and a row of
    [batch, …].
    """
    from jax.experimental.pallas import triton  # slow to load

    num_rows, _, num_heads, _ = operands[0].shape
    params = triton.CompilerParams(num_warps=min(8, blocks.query_block // 16), num_stages=1)
    return pl.pallas_call(
        kernel,
        grid=(num_heads, blocks.num_query_blocks, num_rows),
        in_specs=[_spec(x) for x in operands],
        out_specs=[_spec(x) for x in results],
        out_shape=results,
        interpret=interpret,
        name=_name(kernel),
        compiler_params=None if interpret else params,
    )(*operands)


def _name(kernel: Any) -> str:
    return (kernel.func if isinstance(kernel, functools.partial) else kernel).__name__.strip("_")


def _spec(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    if len(x.shape) == 4:
        return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda h, i, b: (b, 0, h, 0))
    if len(x.shape) == 3:
        return pl.BlockSpec((None, None, x.shape[2]), lambda h, i, b: (b, h, 0))
    return pl.BlockSpec((None, x.shape[1]), lambda h, i, b: (b, 0))


def read(ref: Any, tokens: Span) -> Array:
    """The entries of a block; zeros beyond the row and beyond the head dim."""
    from jax.experimental.pallas import triton

    places, mask = _places(ref, tokens)
    other = None if mask is None else jnp.zeros((), ref.dtype)
    return triton.load(places, mask=mask, other=other)


def write(ref: Any, tokens: Span, x: Array) -> None:
    """Writes a block without what fills it up."""
    from jax.experimental.pallas import triton

    places, mask = _places(ref, tokens)
    triton.store(places, x.astype(ref.dtype), mask=mask)


def _places(ref: Any, tokens: Span) -> tuple[Any, Array | None]:
    """The entries of a [seq] or [seq, head_dim] array, and which of them exist (None: all)."""
    if len(ref.shape) == 1:
        return ref.at[tokens.index], tokens.is_there
    head_dim = ref.shape[1]
    dims = jax.lax.iota(jnp.int32, filled_up(head_dim))
    shape = len(tokens.index), len(dims)
    rows, columns = (jnp.broadcast_to(x, shape) for x in (tokens.index[:, None], dims[None]))
    masks = [] if tokens.is_there is None else [tokens.is_there[:, None]]
    masks += [(dims < head_dim)[None]] if len(dims) != head_dim else []
    mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), shape) if masks else None
    return ref.at[rows, columns], mask


def product(
    left: Float[Array, "rows columns"],
    right: Float[Array, "rows_ columns_"],
    left_dim: int,
    right_dim: int,
) -> Float[Array, "m n"]:
    """The sum over one dim of each, in fp32."""
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dims = (((left_dim,), (right_dim,)), ((), ()))
    return jax.lax.dot_general(
        left, right, dims, precision=exact, preferred_element_type=jnp.float32
    )


def sum_over(num_blocks: int, add: Callable[[Any, Any], Any], start: Any) -> Any:
    """`add(block, sums)` over all blocks; without a loop where there is one."""
    return add(0, start) if num_blocks == 1 else jax.lax.fori_loop(0, num_blocks, add, start)
