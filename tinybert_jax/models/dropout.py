"""Dropout with a mask that is a hash of the key and the position of an element."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32


def dropout(x: Array, rate: float, key: jax.Array | None) -> Array:
    """Zeroes elements with probability `rate` and scales the others by 1/(1 − rate).

    Returns the input without a key (Srivastava et al. 2014, inverted).
    """
    if key is None or rate == 0:
        return x
    return jnp.where(keep_mask(key, x.shape, rate), x / (1 - rate), jnp.zeros((), x.dtype))


def keep_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> Bool[Array, "..."]:
    """True, independently with probability 1 − `rate`, for elements that dropout keeps.

    Two rounds of a 32-bit hash finaliser of the position, with a word of the key in each round:
    about a tenth of the operations of a counter-based generator, and like the latter the same mask
    on any number of devices.
    """
    position = jnp.zeros((), jnp.uint32)
    for dim in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[dim + 1 :]) % 2**32)
        position = position + jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * stride
    words = key_words(key)
    return is_kept(position, (words[0], words[1]), rate)


def key_words(key: jax.Array) -> UInt32[Array, "2"]:
    """The two words of a key that `is_kept` reads."""
    return jax.random.bits(key, (2,), jnp.uint32)


def is_kept(
    position: UInt32[Array, "..."], words: tuple[Array, Array], rate: float
) -> Bool[Array, "..."]:
    """`keep_mask` at some positions of a flat array, with the words of a key."""
    return _hash(_hash(position ^ words[0]) + words[1]) >= jnp.uint32(round(rate * 2**32))


def _hash(x: Array) -> Array:
    """A bijection of uint32: an input bit flips every output bit with probability 1/2."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
