"""Linear maps over tokens, and the number format that their matrix products read."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tinybert_jax.settings.sizes import ModelConfig


def make_linear(
    inputs: int,
    outputs: int,
    config: ModelConfig,
    *,
    dtype: DTypeLike,
    product_dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
) -> "Linear":
    """A linear map with BERT's start. `dtype`: of its input and output; parameters stay fp32.

    `product_dtype` bfloat16 rounds only what the matrix product and the two of its gradient read;
    they add up in fp32, and all else keeps `dtype`. On CPUs with bfloat16 instructions this is the
    faster way: XLA:CPU has fast bfloat16 products and slow bfloat16 everything else. int8 gives an
    `Int8Linear`.
    """
    if is_int8(product_dtype):
        assert jnp.dtype(dtype) == jnp.float32, "int8 products are of fp32 activations"
        return Int8Linear(inputs, outputs)
    rounded = product_dtype is not None and jnp.dtype(product_dtype) == jnp.bfloat16
    return nnx.Linear(
        inputs,
        outputs,
        dtype=dtype,
        kernel_init=nnx.initializers.normal(config.initializer_range),
        dot_general=_bfloat16_dot_general if rounded else jax.lax.dot_general,
        rngs=rngs,
    )


class Int8Linear(nnx.Module):
    """x·kernel + bias of a model that is only read: the product is of int8, added up in int32.

    Each column of the kernel has a scale, made once (`rounded_kernels`), each token one of its own,
    made as it comes: its largest number is 127. No gradient.
    """

    def __init__(self, inputs: int, outputs: int):
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs), jnp.int8))
        self.scale = nnx.Param(jnp.ones(outputs))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq out"]:
        rows, scale = _quantised(x.reshape(-1, x.shape[-1]), 1, jnp)
        dims = (((1,), (0,)), ((), ()))
        mapped = jax.lax.dot_general(rows, self.kernel[...], dims, preferred_element_type=jnp.int32)
        mapped = mapped.astype(jnp.float32) * scale * self.scale[...][None]
        return (mapped + self.bias[...][None]).reshape(*x.shape[:2], -1)


Linear = nnx.Linear | Int8Linear


def is_int8(product_dtype: DTypeLike | None) -> bool:
    return product_dtype is not None and jnp.dtype(product_dtype) == jnp.int8


def _quantised(x: Any, axis: int, xp: Any) -> tuple[Any, Any]:
    """int8 and scales along `axis`, of length 1 there: x ≈ int8·scale. `xp`: jax's numpy, or it."""
    scale = xp.max(xp.abs(x), axis=axis, keepdims=True) / xp.float32(127)
    scale = xp.where(scale == 0, xp.float32(1), scale)
    return xp.round(x / scale).astype(xp.int8), scale


def dense(linear: Linear, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq out"]:
    """A linear map over tokens (`affine`), in its own dtypes."""
    if isinstance(linear, Int8Linear):
        return linear(x)
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


def sum_of_rows(rows: Float[Array, "rows dim"]) -> Float[Array, " dim"]:
    """XLA:CPU adds up columns at about a tenth of the speed of a product with ones."""
    return jax.lax.platform_dependent(rows, cpu=_ones_times, default=lambda rows: rows.sum(0))


def _ones_times(rows: Array) -> Array:
    ones = jnp.ones(len(rows), rows.dtype)
    return jax.lax.dot(ones, rows, precision=jax.lax.Precision.HIGHEST)


_with_bias.defvjp(
    lambda rows, bias: (_with_bias(rows, bias), None),
    lambda _, slope: (slope, sum_of_rows(slope)),
)


def rounded_kernels(
    params: Any, *, dtype: DTypeLike, product_dtype: DTypeLike | None = None
) -> Any:
    """Parameters with the layers' kernels as their products read them, to round them only once.

    For a model that is not trained: its products read the same bits. For int8 the layers' linear
    maps become those of an `Int8Linear`. Layers are still stacked.
    """

    def rounded(node: Any, in_layers: bool) -> Any:
        assert not isinstance(node, tuple), "layers are split after rounding"
        if not isinstance(node, Mapping):
            return node
        if not (in_layers and "kernel" in node):
            return {name: rounded(own, in_layers or name == "layers") for name, own in node.items()}
        if not is_int8(product_dtype):
            return {**node, "kernel": node["kernel"].astype(product_dtype or dtype)}
        kernel, scale = _quantised(np.asarray(node["kernel"]), -2, np)  # where they are: the host
        return {"kernel": kernel, "scale": scale[..., 0, :], "bias": node["bias"]}

    return rounded(params, False)


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
    by_kernel = jax.lax.platform_dependent(x, slope, cpu=_turned_product, default=_over_rows)
    return _contract(slope, kernel, 1, 1), by_kernel


_product.defvjp(_product_forward, _product_backward)


def _contract(left: Array, right: Array, left_dim: int, right_dim: int) -> Array:
    dims = (((left_dim,), (right_dim,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _over_rows(left: Array, right: Array) -> Array:
    """leftᵀ·right."""
    return _contract(left, right, 0, 0)


def _turned_product(left: Array, right: Array) -> Array:
    """leftᵀ·right for XLA:CPU, whose bfloat16 products are over the left side's last axis alone.

    It folds a transpose into the product and then runs that in fp32, at a quarter of the speed
    on a CPU with AMX: a fine-tuning step of benchmarks/finetune.py took 1.25 times as long (2
    cores, jax 0.10.2). The barrier, and an axis of 1 between, keep the transpose outside.
    """
    turned = jax.lax.optimization_barrier(left.T[:, None])
    return _contract(turned.reshape(left.shape[::-1]), right, 1, 0)
