"""Linear maps over tokens, and the number format that their matrix products read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tinybert_jax.sections import ModelConfig


def make_linear(
    inputs: int,
    outputs: int,
    config: ModelConfig,
    *,
    dtype: DTypeLike,
    product_dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear map with BERT's start. `dtype`: of its input and output; parameters stay fp32.

    `product_dtype` bfloat16 rounds only what the matrix product and the two of its gradient read;
    they add up in fp32, and all else keeps `dtype`. On CPUs with bfloat16 instructions this is the
    faster way: XLA:CPU has fast bfloat16 products and slow bfloat16 everything else.
    """
    rounded = product_dtype is not None and jnp.dtype(product_dtype) == jnp.bfloat16
    return nnx.Linear(
        inputs,
        outputs,
        dtype=dtype,
        kernel_init=nnx.initializers.normal(config.initializer_range),
        dot_general=_bfloat16_dot_general if rounded else jax.lax.dot_general,
        rngs=rngs,
    )


def dense(linear: nnx.Linear, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq out"]:
    """A linear map over tokens (`affine`), in its own dtypes."""
    assert linear.bias is not None
    given = linear.promote_dtype((x, linear.kernel[...], linear.bias[...]), dtype=linear.dtype)
    return affine(*given, dot_general=linear.dot_general)


def affine(
    x: Float[Array, "batch seq dim"],
    kernel: Float[Array, "dim out"],
    bias: Float[Array, " out"],
    *,
    dot_general: Callable[..., Array] = jax.lax.dot_general,
) -> Float[Array, "batch seq out"]:
    """x·kernel + bias as one matrix product over tokens.

    XLA:CPU runs the kernel's gradient, a contraction over batch and seq, at about half the speed of
    the same product over one merged dim.
    """
    mapped = dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())))
    return _with_bias(mapped, bias).reshape(*x.shape[:2], -1)


@jax.custom_vjp
def _with_bias(rows: Array, bias: Array) -> Array:
    return rows + bias[None]


def _with_bias_backward(_: None, slope: Array) -> tuple[Array, Array]:
    return slope, jax.lax.platform_dependent(slope, cpu=_sum_as_product, default=_sum)


def _sum(rows: Array) -> Array:
    return rows.sum(0)


def _sum_as_product(rows: Array) -> Array:
    """XLA:CPU adds up columns at about a tenth of this speed."""
    ones = jnp.ones(len(rows), rows.dtype)
    return jax.lax.dot(ones, rows, precision=jax.lax.Precision.HIGHEST)


_with_bias.defvjp(lambda rows, bias: (_with_bias(rows, bias), None), _with_bias_backward)


def rounded_kernels(
    params: Any, *, dtype: DTypeLike, product_dtype: DTypeLike | None = None
) -> Any:
    """Parameters with the layers' kernels as their products read them, to round them only once.

    For a model that is not trained: its products read the same bits.
    """

    def rounded(path: tuple, array: Any) -> Any:
        names = [entry.key for entry in path]
        is_kernel = "layers" in names and "kernel" in names
        return array.astype(product_dtype or dtype) if is_kernel else array

    return jax.tree.map_with_path(rounded, params)


def _bfloat16_dot_general(
    x: Array, kernel: Array, dims, precision=None, out_sharding=None
) -> Array:
    assert dims == (((1,), (0,)), ((), ())), "linear maps take merged tokens"
    return _product(x, kernel).astype(x.dtype)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    return _contract(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), 1, 0)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    rounded = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    return _contract(*rounded, 1, 0), rounded


def _product_backward(rounded: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = rounded
    slope = cotangent.astype(jnp.bfloat16)
    return _contract(slope, kernel, 1, 1), _contract(x, slope, 0, 0)


_product.defvjp(_product_forward, _product_backward)


def _contract(left: Array, right: Array, left_dim: int, right_dim: int) -> Array:
    dims = (((left_dim,), (right_dim,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
