"""Activation functions of the feed-forward layers, under the names of BERT's configs."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU x·Φ(x), computed in fp32 (arXiv 1606.08415).

    Uses erf, to 1e-6, like PyTorch. erfc keeps the digits of the far negative tail but costs more
    (docs/results.md: On a GPU). The backward pass stores one array, the slope.
    """
    return (x * _normal_cdf(x)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    wide, cdf = x.astype(jnp.float32), _normal_cdf(x)
    density = jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    slope = (cdf + wide * density).astype(x.dtype)
    return (wide * cdf).astype(x.dtype), dx * slope


def _normal_cdf(x: Array) -> Array:
    return 0.5 + 0.5 * jax.lax.erf(x.astype(jnp.float32) * 2**-0.5)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
