"""Dropout whose mask is a hash of a key and of each element's place."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def dropout(x: Array, rate: float, key: jax.Array | None) -> Array:
    """Zeroes each element with probability `rate`, and scales the others by 1/(1 − rate).

    Without a key the input as it is (Srivastava et al. 2014, inverted).
    """
    if key is None or rate == 0:
        return x
    return jnp.where(kept(key, x.shape, rate), x / (1 - rate), jnp.zeros((), x.dtype))


def kept(key: jax.Array, shape: tuple[int, ...], rate: float) -> Bool[Array, "..."]:
    """Which elements stay, each alone with probability 1 − `rate`, by key and place alone.

    Two rounds of a 32-bit finaliser, each after a word of the key: about a tenth of the operations
    of a counter-based generator, and like one equal on any number of devices.
    """
    words = jax.random.bits(key, (2,), jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for dim in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[dim + 1 :]) % 2**32)
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * stride
    return _mixed(_mixed(place ^ words[0]) + words[1]) >= jnp.uint32(round(rate * 2**32))


def _mixed(x: Array) -> Array:
    """A bijection in which each bit of the input flips each of the output half of the time."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
