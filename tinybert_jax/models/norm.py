"""LayerNorm over the width, with a backward pass that suits XLA:CPU."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tinybert_jax.models.linear import sum_of_rows
from tinybert_jax.settings.sizes import ModelConfig


def make_layer_norm(config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)


def layer_norm(norm: nnx.LayerNorm, x: Float[Array, "*rows dim"]) -> Float[Array, "*rows dim"]:
    """(x − mean)/√(variance + eps)·scale + bias in fp32, given in the norm's own dtype.

    The variance has a pass of its own: E[x²]−E[x]² loses BERT's eps of 1e-12 to rounding. Instead
    of the norm's own call for the sake of its gradients by scale and bias, `sum_of_rows` here.
    """
    assert norm.scale is not None and norm.bias is not None
    centred = x.astype(jnp.float32)
    centred -= centred.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + norm.epsilon)
    scale, bias = jnp.asarray(norm.scale[...]), jnp.asarray(norm.bias[...])
    return _scale_and_shift(normed, scale, bias).astype(norm.dtype)


@jax.custom_vjp
def _scale_and_shift(x: Array, scale: Array, bias: Array) -> Array:
    return x * _like(scale, x) + _like(bias, x)


def _like(row: Array, x: Array) -> Array:
    return jnp.expand_dims(row, range(x.ndim - 1))


def _forward(x: Array, scale: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    return _scale_and_shift(x, scale, bias), (x, scale)


def _backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array, Array]:
    x, scale = kept
    # Rows are merged here alone: a forward pass over merged rows took XLA:CPU six times as long.
    rows, slopes = (y.reshape(-1, len(scale)) for y in (x, slope))
    return slope * _like(scale, x), sum_of_rows(slopes * rows), sum_of_rows(slopes)


_scale_and_shift.defvjp(_forward, _backward)
