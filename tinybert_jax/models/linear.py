"""Linear maps over tokens, with matrix products in fp32, bfloat16, int8 or float8."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
    """A linear map with BERT's initialisation; `dtype` of input and output, parameters stay fp32.

    `product_dtype` bfloat16 rounds only the operands of the matrix product and of the two products
    of the gradient; sums stay fp32, everything else stays `dtype`. On CPUs with bfloat16
    instructions that is fastest: XLA:CPU has fast bfloat16 products, and other bfloat16 operations
    are slow. int8 gives an `Int8Linear`, float8_e4m3fn a `Float8Linear`.
    """
    if is_quantised(product_dtype):
        kind = Int8Linear if jnp.dtype(product_dtype) == jnp.int8 else Float8Linear
        assert jnp.dtype(dtype) == kind.dtype, f"{kind.__name__} needs activations in {kind.dtype}"
        return kind(inputs, outputs)
    is_bfloat16 = product_dtype is not None and jnp.dtype(product_dtype) == jnp.bfloat16
    return nnx.Linear(
        inputs,
        outputs,
        dtype=dtype,
        kernel_init=nnx.initializers.normal(config.initializer_range),
        dot_general=_bfloat16_dot_general if is_bfloat16 else jax.lax.dot_general,
        rngs=rngs,
    )


class Int8Linear(nnx.Module):
    """x·kernel + bias for inference: an int8 product with int32 sums, without a gradient.

    A column of the kernel has a scale from `rounded_kernels`, a token gets a scale in the forward
    pass. A scale maps the largest absolute value to 127.
    """

    dtype = jnp.dtype(jnp.float32)  # of input and output

    def __init__(self, inputs: int, outputs: int):
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs), jnp.int8))
        self.scale = nnx.Param(jnp.ones(outputs))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq out"]:
        rows, scale = _quantise(x.reshape(-1, x.shape[-1]), 1, jnp)
        dims = (((1,), (0,)), ((), ()))
        mapped = jax.lax.dot_general(rows, self.kernel[...], dims, preferred_element_type=jnp.int32)
        mapped = mapped.astype(jnp.float32) * scale * self.scale[...][None]
        return (mapped + self.bias[...][None]).reshape(*x.shape[:2], -1)


class Float8Linear(nnx.Module):
    """x·kernel + bias for inference: a product of float8 (e4m3), without a gradient.

    `scales` are that of the inputs and that of the kernel, by which both are divided before they
    are rounded. As e4m3 is a floating format, scales need not be tight: that of the inputs is a
    quarter, so that inputs of up to 112 keep their three bits down to 0.004, and larger ones
    become 112. Written as a product of scaled bfloat16, which XLA:GPU turns into cuBLASLt's float8
    call where the GPU has one (from H100 on), and every other device computes as it stands.
    """

    dtype = jnp.dtype(jnp.bfloat16)  # of input and output

    def __init__(self, inputs: int, outputs: int):
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs), _FLOAT8))
        self.scales = nnx.Param(jnp.ones(2))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq out"]:
        of_inputs, of_kernel = self.scales[...]
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32) / of_inputs
        clipped = jnp.clip(rows, -_FLOAT8_MAX, _FLOAT8_MAX)
        # An infinity stays visible, as NaN.
        rows = jnp.where(jnp.isinf(rows), jnp.nan, clipped).astype(_FLOAT8).astype(x.dtype)
        kernel = self.kernel[...].astype(x.dtype) * of_kernel.astype(x.dtype)
        dims = (((1,), (0,)), ((), ()))
        mapped = jax.lax.dot_general(rows * of_inputs.astype(x.dtype), kernel, dims)
        return (mapped + self.bias[...].astype(x.dtype)[None]).reshape(*x.shape[:2], -1)


_FLOAT8 = jnp.float8_e4m3fn
_FLOAT8_MAX = 448.0
_INPUT_SCALE = 0.25

Linear = nnx.Linear | Int8Linear | Float8Linear


def is_quantised(product_dtype: DTypeLike | None) -> bool:
    """Whether products of this dtype have parameters of their own, which are not trained."""
    return product_dtype is not None and jnp.dtype(product_dtype) in (jnp.int8, _FLOAT8)


def _quantise(x: Any, axis: int, xp: Any) -> tuple[Any, Any]:
    """(int8, scale) with x ≈ int8·scale; scale has length 1 at `axis`. `xp`: numpy, jax.numpy."""
    scale = xp.max(xp.abs(x), axis=axis, keepdims=True) / xp.float32(127)
    scale = xp.where(scale == 0, xp.float32(1), scale)
    return xp.round(x / scale).astype(xp.int8), scale


def _to_float8(kernel: Any) -> tuple[Any, Any]:
    """(float8, scales [layers, 2]) of the kernels [layers, inputs, outputs] of a `Float8Linear`."""
    xp: Any = np if isinstance(kernel, np.ndarray) else jnp
    highest = xp.maximum(xp.abs(kernel).max(axis=(-2, -1)), xp.float32(1e-30))
    # A power of two: dividing by it is exact.
    scale = xp.exp2(xp.ceil(xp.log2(highest / xp.float32(_FLOAT8_MAX))))
    rounded = xp.clip(kernel / scale[..., None, None], -_FLOAT8_MAX, _FLOAT8_MAX).astype(_FLOAT8)
    return rounded, xp.stack([xp.full_like(scale, _INPUT_SCALE), scale], axis=-1)


def dense(linear: Linear, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq out"]:
    """Applies a linear map to tokens with `affine`, in the dtypes of the linear map."""
    if not isinstance(linear, nnx.Linear):
        return linear(x)
    assert linear.bias is not None
    kernel, bias = linear.kernel[...], linear.bias[...]
    return affine_in(linear.dtype, x, kernel, bias, dot_general=linear.dot_general)


def affine_in(
    dtype: DTypeLike, x: Array, kernel: Array, bias: Array, **options: Callable[..., Array]
) -> Array:
    """`affine` of operands that are rounded to `dtype`."""
    if jnp.dtype(dtype) == jnp.bfloat16:
        return bfloat16_affine(Form(affine), x.astype(dtype), kernel, bias)
    return affine(x.astype(dtype), kernel.astype(dtype), bias.astype(dtype), **options)


def map_pooled(linear: nnx.Linear, x: Float[Array, "*dims dim"]) -> Float[Array, "*dims out"]:
    """Applies a linear map to one state of each row or segment."""
    if linear.dtype != jnp.bfloat16:
        return linear(x)
    return _bfloat16_dense(linear, Form(_plain_affine), x)


def _plain_affine(x: Array, kernel: Array, bias: Array) -> Array:
    """x·kernel + bias as `nnx.Linear` computes it."""
    mapped = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return mapped + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def affine(
    x: Float[Array, "batch seq dim"],
    kernel: Float[Array, "dim out"],
    bias: Float[Array, " out"],
    *,
    dot_general: Callable[..., Array] = jax.lax.dot_general,
) -> Float[Array, "batch seq out"]:
    """x·kernel + bias as one matrix product, with batch and seq merged into one dim.

    XLA:CPU runs the gradient of the kernel, a contraction over batch and seq, at about half the
    speed over two dims.
    """
    mapped = dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())))
    return _add_bias(mapped, bias).reshape(*x.shape[:2], -1)


class Form(NamedTuple):
    """How an affine map of bfloat16 operands is computed."""

    plain: Callable[..., Array]  # (x, kernel, bias) -> y
    equation: str | None = None  # of an einsum that TPUs compute instead; "x,kernel->y"
    kernel_shape: tuple[int, ...] = ()  # of the kernel in that equation


def to_heads(linear: Linear, x: Array, num_heads: int) -> Float[Array, "batch seq heads head_dim"]:
    """`dense`, split into heads.

    On TPUs as one einsum in bfloat16: there, an array of merged heads has another layout, and to
    split it is a copy. docs/scale.md has the cycles of whole steps.
    """
    if not isinstance(linear, nnx.Linear) or linear.dtype != jnp.bfloat16:
        return dense(linear, x).reshape(*x.shape[:2], num_heads, -1)
    return _bfloat16_dense(linear, split_form(x.shape[-1], num_heads), x)


def from_heads(linear: Linear, x: Array) -> Float[Array, "batch seq dim"]:
    """`dense` of merged heads [batch, seq, heads, head_dim]; see `to_heads`."""
    if not isinstance(linear, nnx.Linear) or linear.dtype != jnp.bfloat16:
        return dense(linear, x.reshape(*x.shape[:2], -1))
    return _bfloat16_dense(linear, merge_form(*x.shape[2:]), x)


def split_form(dim: int, num_heads: int) -> Form:
    """The form of a map from [batch, seq, dim] to [batch, seq, heads, head_dim]."""

    def plain(x: Array, kernel: Array, bias: Array) -> Array:
        return affine(x, kernel, bias).reshape(*x.shape[:2], num_heads, -1)

    return Form(plain, "btd,dhk->bthk", (dim, num_heads, -1))


def merge_form(num_heads: int, head_dim: int) -> Form:
    """The form of a map from [batch, seq, heads, head_dim] to [batch, seq, dim]."""

    def plain(x: Array, kernel: Array, bias: Array) -> Array:
        return affine(x.reshape(*x.shape[:2], -1), kernel, bias)

    return Form(plain, "bthk,hkd->btd", (num_heads, head_dim, -1))


def _bfloat16_dense(linear: nnx.Linear, form: Form, x: Array) -> Array:
    assert linear.bias is not None
    return bfloat16_affine(form, x.astype(jnp.bfloat16), linear.kernel[...], linear.bias[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def bfloat16_affine(form: Form, x: Array, kernel: Array, bias: Array) -> Array:
    """An affine map of operands in bfloat16; on accelerators the gradients of kernel and bias are
    sums in fp32, also over devices.

    Rounded to bfloat16 before the sum over devices, as XLA would do it, a gradient would lose more
    digits with every device.
    """

    def plain(x: Array, kernel: Array, bias: Array) -> Array:
        return form.plain(x, kernel.astype(x.dtype), bias.astype(x.dtype))

    def by_einsum(x: Array, kernel: Array, bias: Array) -> Array:
        assert form.equation is not None
        y = jnp.einsum(form.equation, x, kernel.astype(x.dtype).reshape(form.kernel_shape))
        return y + bias.astype(x.dtype).reshape(1, 1, *y.shape[2:])

    if form.equation is None:
        return plain(x, kernel, bias)
    return jax.lax.platform_dependent(x, kernel, bias, tpu=by_einsum, default=plain)


def _bfloat16_affine_backward(
    form: Form, operands: tuple[Array, ...], cotangent: Array
) -> tuple[Array, ...]:
    forms = {"cpu": _rounded_gradients, "default": _gradients}
    if form.equation is not None:
        forms["tpu"] = _einsum_gradients
    own = {platform: functools.partial(function, form) for platform, function in forms.items()}
    return jax.lax.platform_dependent(cotangent, *operands, **own)


bfloat16_affine.defvjp(
    lambda form, *operands: (bfloat16_affine(form, *operands), operands),
    _bfloat16_affine_backward,
)


def _rounded_gradients(form: Form, cotangent: Array, *operands: Array) -> tuple[Array, ...]:
    x, kernel, bias = operands
    _, pull = jax.vjp(form.plain, x, kernel.astype(x.dtype), bias.astype(x.dtype))
    return _as_types_of(operands, *pull(cotangent))


def _gradients(
    form: Form, cotangent: Array, x: Array, kernel: Array, bias: Array
) -> tuple[Array, ...]:
    rows, columns = x.reshape(-1, len(kernel)), cotangent.reshape(-1, len(bias))
    by_x = _contract(columns, kernel.astype(x.dtype), 1, 1).reshape(x.shape)
    sums = _transposed_product(rows, columns), columns.sum(0, dtype=jnp.float32)
    return _as_types_of((x, kernel, bias), by_x, *sums)


def _einsum_gradients(
    form: Form, cotangent: Array, x: Array, kernel: Array, bias: Array
) -> tuple[Array, ...]:
    assert form.equation is not None
    of_x, of_kernel, of_y = re.findall(r"\w+", form.equation)
    weights = kernel.astype(x.dtype).reshape(form.kernel_shape)
    by_x = jnp.einsum(f"{of_y},{of_kernel}->{of_x}", cotangent, weights)
    by_kernel = jnp.einsum(
        f"{of_x},{of_y}->{of_kernel}", x, cotangent, preferred_element_type=jnp.float32
    )
    by_bias = cotangent.sum((0, 1), dtype=jnp.float32)
    sums = by_kernel.reshape(kernel.shape), by_bias.reshape(bias.shape)
    return _as_types_of((x, kernel, bias), by_x, *sums)


def _as_types_of(operands: tuple[Array, ...], *gradients: Array) -> tuple[Array, ...]:
    return tuple(g.astype(x.dtype) for g, x in zip(gradients, operands, strict=True))


@jax.custom_vjp
def _add_bias(rows: Array, bias: Array) -> Array:
    return rows + bias[None]


def sum_of_rows(rows: Float[Array, "rows dim"]) -> Float[Array, " dim"]:
    """Sum over rows; on XLA:CPU a product with ones, about ten times as fast as the sum."""
    return jax.lax.platform_dependent(rows, cpu=_multiply_ones, default=lambda rows: rows.sum(0))


def _multiply_ones(rows: Array) -> Array:
    ones = jnp.ones(len(rows), rows.dtype)
    return jax.lax.dot(ones, rows, precision=jax.lax.Precision.HIGHEST)


_add_bias.defvjp(
    lambda rows, bias: (_add_bias(rows, bias), None),
    lambda _, cotangent: (cotangent, sum_of_rows(cotangent)),
)


def rounded_kernels(
    params: Any, *, dtype: DTypeLike, product_dtype: DTypeLike | None = None
) -> Any:
    """Rounds the kernels of the layers once to the dtype of their matrix products, for inference.

    The products read the same bits as without. For int8 and float8 the linear maps of the layers
    become the parameters of an `Int8Linear` or `Float8Linear`. The layers must still be stacked.
    """

    def round_node(node: Any, in_layers: bool) -> Any:
        assert not isinstance(node, tuple), "round the kernels before the layers are unstacked"
        if not isinstance(node, Mapping):
            return node
        if not (in_layers and "kernel" in node):
            return {
                name: round_node(child, in_layers or name == "layers")
                for name, child in node.items()
            }
        if not is_quantised(product_dtype):
            return {**node, "kernel": node["kernel"].astype(product_dtype or dtype)}
        if product_dtype is not None and jnp.dtype(product_dtype) == _FLOAT8:
            kernel, scales = _to_float8(node["kernel"])
            return {"kernel": kernel, "scales": scales, "bias": node["bias"]}
        kernel, scale = _quantise(np.asarray(node["kernel"]), -2, np)  # on the host
        return {"kernel": kernel, "scale": scale[..., 0, :], "bias": node["bias"]}

    return round_node(params, False)


def _bfloat16_dot_general(
    x: Array, kernel: Array, dims, precision=None, out_sharding=None
) -> Array:
    assert dims == (((1,), (0,)), ((), ())), "expected batch and seq merged into one dim"
    return _bfloat16_product(x, kernel).astype(x.dtype)


@jax.custom_vjp
def _bfloat16_product(x: Array, kernel: Array) -> Array:
    return _contract(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), 1, 0)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    rounded = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    return _contract(*rounded, 1, 0), rounded


def _product_backward(rounded: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = rounded
    cotangent = cotangent.astype(jnp.bfloat16)
    kernel_gradient = jax.lax.platform_dependent(
        x, cotangent, cpu=_transposed_product_cpu, default=_transposed_product
    )
    return _contract(cotangent, kernel, 1, 1), kernel_gradient


_bfloat16_product.defvjp(_product_forward, _product_backward)


def _contract(left: Array, right: Array, left_dim: int, right_dim: int) -> Array:
    dims = (((left_dim,), (right_dim,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _transposed_product(left: Array, right: Array) -> Array:
    """leftᵀ·right."""
    return _contract(left, right, 0, 0)


def _transposed_product_cpu(left: Array, right: Array) -> Array:
    """leftᵀ·right for XLA:CPU, which has bfloat16 products only over the last axis of `left`.

    XLA folds a transpose into the product and then runs the product in fp32, at a quarter of the
    speed on a CPU with AMX: a fine-tuning step of benchmarks/finetune.py took 1.25 times as long (2
    cores, jax 0.10.2). The barrier and an axis of length 1 keep the transpose apart.
    """
    transposed = jax.lax.optimization_barrier(left.T[:, None])
    return _contract(transposed.reshape(left.shape[::-1]), right, 1, 0)
