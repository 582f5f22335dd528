"""LayerNorm over the width."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tinybert_jax.model.linear import sum_of_rows
from tinybert_jax.sections import ModelConfig


class LayerNorm(nnx.Module):
    """(x − mean)/√(variance + eps)·scale + bias, in fp32; gives `dtype`.

    The variance has a pass of its own: E[x²]−E[x]² loses BERT's eps of 1e-12 to rounding.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(config.hidden_size))
        self.bias = nnx.Param(jnp.zeros(config.hidden_size))
        self.eps, self.dtype = config.layer_norm_eps, dtype

    def __call__(self, x: Float[Array, "*rows dim"]) -> Float[Array, "*rows dim"]:
        centred = x.astype(jnp.float32)
        centred -= centred.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normed = (centred * jax.lax.rsqrt(variance + self.eps)).reshape(-1, x.shape[-1])
        scaled = _scaled(normed, self.scale[...], self.bias[...])
        return scaled.reshape(x.shape).astype(self.dtype)


@jax.custom_vjp
def _scaled(rows: Array, scale: Array, bias: Array) -> Array:
    return rows * scale[None] + bias[None]


def _scaled_backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array, Array]:
    rows, scale = kept
    return slope * scale[None], sum_of_rows(slope * rows), sum_of_rows(slope)


_scaled.defvjp(
    lambda rows, scale, bias: (_scaled(rows, scale, bias), (rows, scale)), _scaled_backward
)
