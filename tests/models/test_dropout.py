"""Dropout masks: share of zeros, independence, and equality on any number of devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.models.dropout import dropout, keep_mask

KEYS = jax.random.split(jax.random.key(0), 24)
SHAPE = (16, 8, 32, 32)
SIZE = 16 * 8 * 32 * 32


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_elements_are_dropped_independently_with_probability_rate(rate):
    """Shares by key, by key and index, of pairs of neighbours, of pairs of keys.

    About 900 shares, each within 4.5 sigma.
    """
    masks = np.array([~keep_mask(key, SHAPE, rate) for key in KEYS])
    both_dropped = rate**2

    def check(shares, expected, num):
        sigma = np.sqrt(expected * (1 - expected) / num)
        assert np.abs(np.asarray(shares) - expected).max() < 4.5 * sigma

    check(masks.mean((1, 2, 3, 4)), rate, SIZE)
    for axis in range(1, 5):
        others = tuple(a for a in range(1, 5) if a != axis)
        check(masks.mean(others), rate, SIZE / masks.shape[axis])
        ahead = np.take(masks, range(1, masks.shape[axis]), axis)
        behind = np.take(masks, range(masks.shape[axis] - 1), axis)
        check((ahead & behind).mean((1, 2, 3, 4)), both_dropped, ahead[0].size)
    pairs = [(masks[i] & masks[j]).mean() for i, j in itertools.combinations(range(24), 2)]
    check(pairs, both_dropped, SIZE)


def test_kept_elements_are_scaled_and_dropped_elements_have_no_gradient():
    x = jnp.array(np.random.default_rng(0).normal(size=(64, 50)), jnp.float32)
    mask = keep_mask(KEYS[0], x.shape, 0.2)
    value, gradient = jax.value_and_grad(lambda x: dropout(x, 0.2, KEYS[0]).sum())(x)
    np.testing.assert_allclose(dropout(x, 0.2, KEYS[0]), np.where(mask, x / 0.8, 0), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.where(mask, 1 / 0.8, 0), rtol=1e-6)
    np.testing.assert_allclose(value, np.sum(x * gradient), rtol=1e-4)


def test_without_a_key_or_a_rate_nothing_is_dropped():
    x = jnp.ones((3, 4))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, KEYS[0]) is x


def test_devices_and_vectorised_keys_change_no_mask():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placement = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jnp.ones((16, 6, 10))
    drop = jax.jit(lambda x, key: dropout(x, 0.3, key))
    one = drop(x, KEYS[0])
    np.testing.assert_array_equal(drop(jax.device_put(x, placement), KEYS[0]), one)
    many = jax.jit(jax.vmap(lambda key: dropout(x, 0.3, key)))(KEYS[:3])
    np.testing.assert_array_equal(many[0], one)
    assert (many[0] != many[1]).any()
