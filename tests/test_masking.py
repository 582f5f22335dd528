"""The rates and shares of masked-LM corruption, its determinism by row, and the gather."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tinybert_jax.masking import gather_masked, mask_tokens

VOCAB_SIZE, MASK_TOKEN_ID = 1000, 999
KEY = jax.random.key(0)


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_rates_and_shares(rate):
    input_ids, maskable = random_batch(256, 128)

    inputs, labels = mask(input_ids, maskable, KEY, rate)

    chosen = labels != -100
    became_mask = chosen & (inputs == MASK_TOKEN_ID)
    stayed = chosen & (inputs == input_ids)
    became_random = chosen & ~became_mask & ~stayed
    num_chosen = chosen.sum()
    assert_share(num_chosen, maskable.sum(), rate)
    assert_share(became_mask.sum(), num_chosen, 0.8 + 0.1 / VOCAB_SIZE)
    assert_share(stayed.sum(), num_chosen, 0.1 + 0.1 / VOCAB_SIZE)
    assert_share(became_random.sum(), num_chosen, 0.1 - 0.2 / VOCAB_SIZE)
    random_ids = inputs[became_random]
    assert 0 <= random_ids.min() < VOCAB_SIZE / 50
    assert VOCAB_SIZE * 49 / 50 < random_ids.max() < VOCAB_SIZE
    np.testing.assert_array_equal(labels[chosen], input_ids[chosen])


def test_only_maskable_tokens_are_touched():
    input_ids, maskable = random_batch(8, 32)

    inputs, labels = mask(input_ids, maskable, KEY, 1.0)

    np.testing.assert_array_equal(labels != -100, maskable)
    np.testing.assert_array_equal(inputs[~maskable], input_ids[~maskable])


def test_unchosen_tokens_are_kept():
    input_ids, maskable = random_batch(8, 32)

    inputs, labels = mask(input_ids, maskable, KEY, 0.4)

    np.testing.assert_array_equal(inputs[labels == -100], input_ids[labels == -100])


def test_rate_zero_masks_nothing():
    input_ids, maskable = random_batch(8, 32)

    inputs, labels = mask(input_ids, maskable, KEY, 0.0)

    np.testing.assert_array_equal(inputs, input_ids)
    assert (labels == -100).all()


def test_a_row_depends_on_key_and_index_only():
    input_ids, maskable = random_batch(8, 32)
    inputs, labels = mask(input_ids, maskable, KEY, 0.4)

    few_inputs, few_labels = mask(input_ids[:3], maskable[:3], KEY, 0.4)
    other_inputs, _ = mask(input_ids, maskable, jax.random.key(1), 0.4)
    same = np.tile(input_ids[:1], (8, 1))
    same_inputs, _ = mask(same, np.ones_like(maskable), KEY, 0.4)

    np.testing.assert_array_equal(few_inputs, inputs[:3])
    np.testing.assert_array_equal(few_labels, labels[:3])
    assert (other_inputs != inputs).any(-1).all()
    assert len(np.unique(same_inputs, axis=0)) == 8


def test_all_devices_draw_what_one_device_draws():
    batch = 2 * jax.device_count()
    input_ids, maskable = random_batch(batch, 32)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharded = jax.device_put(
        (input_ids, maskable), NamedSharding(mesh, PartitionSpec("data", None))
    )

    results = mask(*sharded, KEY, 0.4), mask(input_ids, maskable, KEY, 0.4)

    for got, want in zip(*results, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("rate", [-0.1, 15.0])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match="rate: expected a probability"):
        mask(*random_batch(2, 4), KEY, rate)


@pytest.mark.parametrize("max_predictions", [1, 4, 16])
def test_gather_masked_matches_a_loop(max_predictions):
    rng = np.random.default_rng(2)
    labels = np.where(rng.random((8, 16)) < 0.3, rng.integers(0, 99, (8, 16)), -100)
    labels[0] = -100
    labels[1] = np.arange(16)

    positions, gathered = gather_masked(jnp.array(labels), max_predictions)

    for row in range(8):
        chosen = np.flatnonzero(labels[row] != -100)[:max_predictions]
        unused = max_predictions - len(chosen)
        np.testing.assert_array_equal(positions[row], [*chosen, *[0] * unused])
        np.testing.assert_array_equal(gathered[row], [*labels[row, chosen], *[-100] * unused])


@pytest.mark.parametrize("max_predictions", [0, 5])
def test_gather_masked_refuses_more_slots_than_tokens(max_predictions):
    with pytest.raises(ValueError, match=r"expected 1\.\.4"):
        gather_masked(jnp.full((2, 4), -100), max_predictions)


def random_batch(batch, seq):
    rng = np.random.default_rng(batch)
    input_ids = rng.integers(0, VOCAB_SIZE - 1, (batch, seq), np.int32)
    return input_ids, rng.random((batch, seq)) < 0.8


def mask(input_ids, maskable, key, rate):
    return tuple(map(np.asarray, jitted_mask_tokens(input_ids, maskable, key, rate)))


@functools.partial(jax.jit, static_argnums=3)
def jitted_mask_tokens(input_ids, maskable, key, rate):
    return mask_tokens(
        input_ids, maskable, key, rate=rate, mask_token_id=MASK_TOKEN_ID, vocab_size=VOCAB_SIZE
    )


def assert_share(successes, trials, share):
    """Within three standard deviations of the binomial; the key is fixed, so this never flakes."""
    assert abs(successes - trials * share) <= 3 * np.sqrt(trials * share * (1 - share))
