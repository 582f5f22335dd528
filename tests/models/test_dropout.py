"""Dropout's masks: how many, how alike, and that nobody else's devices change them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.models.dropout import dropout, kept

KEYS = jax.random.split(jax.random.key(0), 24)
SHAPE = (16, 8, 32, 32)
SIZE = 16 * 8 * 32 * 32


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_the_dropped_share_and_its_pairs_are_those_of_independent_draws(rate):
    """By key, by key and axis place, of neighbours, of two keys: within 4.5 sigma, 900 in all."""
    masks = np.array([~kept(key, SHAPE, rate) for key in KEYS])
    together = rate**2

    def check(shares, expected, num):
        sigma = np.sqrt(expected * (1 - expected) / num)
        assert np.abs(np.asarray(shares) - expected).max() < 4.5 * sigma

    check(masks.mean((1, 2, 3, 4)), rate, SIZE)
    for axis in range(1, 5):
        others = tuple(a for a in range(1, 5) if a != axis)
        check(masks.mean(others), rate, SIZE / masks.shape[axis])
        ahead = np.take(masks, range(1, masks.shape[axis]), axis)
        behind = np.take(masks, range(masks.shape[axis] - 1), axis)
        check((ahead & behind).mean((1, 2, 3, 4)), together, ahead[0].size)
    pairs = [(masks[i] & masks[j]).mean() for i, j in itertools.combinations(range(24), 2)]
    check(pairs, together, SIZE)


def test_what_stays_is_scaled_and_what_goes_has_no_gradient():
    x = jnp.array(np.random.default_rng(0).normal(size=(64, 50)), jnp.float32)
    stays = kept(KEYS[0], x.shape, 0.2)
    value, gradient = jax.value_and_grad(lambda x: dropout(x, 0.2, KEYS[0]).sum())(x)
    np.testing.assert_allclose(dropout(x, 0.2, KEYS[0]), np.where(stays, x / 0.8, 0), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.where(stays, 1 / 0.8, 0), rtol=1e-6)
    np.testing.assert_allclose(value, np.sum(x * gradient), rtol=1e-4)


def test_without_a_key_or_a_rate_nothing_is_dropped():
    x = jnp.ones((3, 4))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, KEYS[0]) is x


def test_devices_and_vectorised_keys_change_no_mask():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jnp.ones((16, 6, 10))
    drop = jax.jit(lambda x, key: dropout(x, 0.3, key))
    one = drop(x, KEYS[0])
    np.testing.assert_array_equal(drop(jax.device_put(x, place), KEYS[0]), one)
    many = jax.jit(jax.vmap(lambda key: dropout(x, 0.3, key)))(KEYS[:3])
    np.testing.assert_array_equal(many[0], one)
    assert (many[0] != many[1]).any()
