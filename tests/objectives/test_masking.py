"""The rates and shares of masked-LM corruption, its determinism by row, and the gather."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tinybert_jax.objectives.masking import (
    MAX_SPAN,
    SPAN_STOP,
    gather_masked,
    mask_rows,
    mask_tokens,
    num_slots,
)

VOCAB_SIZE, MASK_TOKEN_ID = 1000, 999
KEY = jax.random.key(0)
UNITS = ["token", "whole_word", "span"]
IS_CONTINUATION = np.random.default_rng(7).random(VOCAB_SIZE) < 0.25


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


@pytest.mark.parametrize("unit", ["whole_word", "span"])
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_rates_and_shares_of_words_and_spans(unit, rate):
    """The tokens of a row are drawn together, so sigma is that of the rows' own counts."""
    input_ids, maskable = random_batch(1024, 128)

    inputs, labels = mask(input_ids, maskable, KEY, rate, unit)

    chosen = labels != -100
    assert_mean(chosen.sum(-1) - rate * maskable.sum(-1))
    for column in (slice(0, 4), slice(124, 128)):  # the ends of a row as often as its middle
        assert_mean(chosen[:, column].sum(-1) - rate * maskable[:, column].sum(-1))
    became_mask = chosen & (inputs == MASK_TOKEN_ID)
    stayed = chosen & (inputs == input_ids)
    assert_mean(became_mask.sum(-1) - 0.8 * chosen.sum(-1))
    assert_mean(stayed.sum(-1) - (0.1 + 0.1 / VOCAB_SIZE) * chosen.sum(-1))
    np.testing.assert_array_equal(labels[chosen], input_ids[chosen])
    np.testing.assert_array_equal(inputs[~chosen], input_ids[~chosen])


@pytest.mark.parametrize("unit", ["whole_word", "span"])
def test_words_are_masked_whole(unit):
    input_ids, maskable = random_batch(256, 64)

    _, labels = mask(input_ids, maskable, KEY, 0.3, unit)

    num_long = 0
    for row in range(256):
        for word in words_of(input_ids[row], maskable[row]):
            assert len(set((labels[row, word] != -100).tolist())) == 1
            num_long += len(word) > 1
    assert num_long > 500


def test_each_word_is_drawn_alone():
    """Words of a row as independent as tokens: the number of chosen words is binomial."""
    input_ids, maskable = random_batch(1024, 64)

    _, labels = mask(input_ids, maskable, KEY, 0.15, "whole_word")

    excess = []
    for row in range(1024):
        firsts = [word[0] for word in words_of(input_ids[row], maskable[row])]
        num_chosen = (labels[row, firsts] != -100).sum()
        excess.append((num_chosen - 0.15 * len(firsts)) ** 2 - 0.15 * 0.85 * len(firsts))
    assert_mean(np.array(excess))


def test_spans_are_as_long_as_those_laid_down_one_by_one():
    """Runs of chosen words against a simulation: Poisson many spans at a word, each a Geo(0.2)."""
    num_rows, num_words, rate = 4096, 64, 0.05
    lengths = np.arange(1, MAX_SPAN + 1)
    probs = SPAN_STOP * (1 - SPAN_STOP) ** (lengths - 1)
    probs /= probs.sum()
    assert 3.75 < probs @ lengths < 3.85  # the paper's mean, 3.8
    rng = np.random.default_rng(0)
    expected = np.zeros((num_rows, num_words), bool)
    num_spans = -np.log(1 - rate) / (probs @ lengths)
    for row, start in np.argwhere(rng.random((num_rows, num_words + MAX_SPAN)) < num_spans):
        begin = start - MAX_SPAN
        expected[row, max(begin, 0) : max(begin + rng.choice(lengths, p=probs), 0)] = True

    input_ids = np.where(IS_CONTINUATION, 0, np.arange(VOCAB_SIZE))[
        rng.integers(0, VOCAB_SIZE - 1, (num_rows, num_words))
    ].astype(np.int32)
    _, labels = mask(input_ids, np.ones_like(input_ids, bool), KEY, rate, "span")

    got, want = (np.bincount(runs(chosen), minlength=80) for chosen in (labels != -100, expected))
    for length in range(1, 14):
        sigma = np.sqrt(got[length] + want[length])
        assert abs(got[length] - want[length]) <= 3 * sigma, (length, got, want)


def test_a_span_is_corrupted_in_one_way():
    input_ids, maskable = random_batch(256, 64)
    maskable = np.ones_like(maskable)

    inputs, labels = mask(input_ids, maskable, KEY, 0.15, "span")

    is_mask, is_kept = inputs == MASK_TOKEN_ID, inputs == input_ids
    kind = 2 * is_mask + is_kept
    together = (labels[:, 1:] != -100) & (labels[:, :-1] != -100)  # neighbours in one run
    num_mixed = (together & (kind[:, 1:] != kind[:, :-1])).sum()
    assert num_mixed <= 0.002 * together.sum()  # a random id may be the mask or the old one


@pytest.mark.parametrize("unit", UNITS)
def test_a_row_has_room_for_what_is_masked(unit):
    input_ids, maskable = random_batch(2048, 128)

    _, labels = mask(input_ids, np.ones_like(maskable), KEY, 0.15, unit)

    lost = np.maximum((labels != -100).sum(-1) - num_slots(0.15, 128, unit), 0)
    assert lost.sum() <= 1e-4 * (labels != -100).sum()


SPECIAL, NUM_SLOTS = (0, 1, 2, 3), 6


@pytest.mark.parametrize("unit", UNITS)
@hypothesis.given(
    input_ids=arrays(
        np.int32,
        (3, 24),
        elements=st.integers(0, 9) | st.integers(0, VOCAB_SIZE - 1),
        fill=st.nothing(),
    ),
    lengths=arrays(np.int32, 3, elements=st.integers(0, 24), fill=st.nothing()),
    rate=st.sampled_from([0.4, 0.15, 1.0, 0.0]),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_rows_are_masked_within_slots_and_restored_by_labels(
    unit, input_ids, lengths, rate, seed
):
    real = np.arange(24) < lengths[:, None]
    maskable = real & ~np.isin(input_ids, SPECIAL)
    arguments = input_ids, real, maskable, jax.random.key(seed), rate, unit
    inputs, positions, labels, all_labels = map(np.asarray, mask_both(*arguments))

    np.testing.assert_array_equal(inputs[~maskable], input_ids[~maskable])
    is_used = labels != -100
    num_masked = (all_labels != -100).sum(-1)
    np.testing.assert_array_equal(is_used.sum(-1), np.minimum(num_masked, NUM_SLOTS))
    for row in range(3):
        used = positions[row, is_used[row]]
        assert maskable[row, used].all() and (np.diff(used) > 0).all()
        np.testing.assert_array_equal(labels[row, is_used[row]], input_ids[row, used])
        restored = inputs[row].copy()
        restored[used] = labels[row, is_used[row]]
        if num_masked[row] <= NUM_SLOTS:
            np.testing.assert_array_equal(restored, input_ids[row])


@functools.partial(jax.jit, static_argnums=5)
def mask_both(input_ids, real, maskable, key, rate, unit):
    """Results of `mask_rows`, and the labels of `mask_tokens`."""
    options = {
        "rate": rate,
        "mask_token_id": MASK_TOKEN_ID,
        "vocab_size": VOCAB_SIZE,
        "unit": unit,
        "is_continuation": jnp.asarray(IS_CONTINUATION),
    }
    rows = mask_rows(
        input_ids,
        real,
        key,
        special_token_ids=SPECIAL,
        max_predictions=NUM_SLOTS,
        **options,
    )
    return *rows, mask_tokens(input_ids, maskable, key, **options)[1]


@pytest.mark.parametrize("unit", UNITS)
def test_a_traced_rate_masks_like_a_constant_one(unit):
    input_ids, maskable = random_batch(8, 32)

    traced = jax.jit(functools.partial(mask_with, unit=unit))(
        input_ids, maskable, KEY, jnp.float32(0.25)
    )

    for got, want in zip(traced, mask(input_ids, maskable, KEY, 0.25, unit), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("unit", UNITS)
def test_only_maskable_tokens_are_touched(unit):
    input_ids, maskable = random_batch(8, 32)

    inputs, labels = mask(input_ids, maskable, KEY, 1.0, unit)

    np.testing.assert_array_equal(labels != -100, maskable)
    np.testing.assert_array_equal(inputs[~maskable], input_ids[~maskable])


def test_unchosen_tokens_are_kept():
    input_ids, maskable = random_batch(8, 32)

    inputs, labels = mask(input_ids, maskable, KEY, 0.4)

    np.testing.assert_array_equal(inputs[labels == -100], input_ids[labels == -100])


@pytest.mark.parametrize("unit", UNITS)
def test_rate_zero_masks_nothing(unit):
    input_ids, maskable = random_batch(8, 32)

    inputs, labels = mask(input_ids, maskable, KEY, 0.0, unit)

    np.testing.assert_array_equal(inputs, input_ids)
    assert (labels == -100).all()


@pytest.mark.parametrize("unit", UNITS)
def test_a_row_depends_on_key_and_index_only(unit):
    input_ids, maskable = random_batch(8, 32)
    inputs, labels = mask(input_ids, maskable, KEY, 0.4, unit)

    few_inputs, few_labels = mask(input_ids[:3], maskable[:3], KEY, 0.4, unit)
    other_inputs, _ = mask(input_ids, maskable, jax.random.key(1), 0.4, unit)
    same = np.tile(input_ids[:1], (8, 1))
    same_inputs, _ = mask(same, np.ones_like(maskable), KEY, 0.4, unit)

    np.testing.assert_array_equal(few_inputs, inputs[:3])
    np.testing.assert_array_equal(few_labels, labels[:3])
    assert (other_inputs != inputs).any(-1).all()
    assert len(np.unique(same_inputs, axis=0)) == 8


@pytest.mark.parametrize("unit", UNITS)
def test_all_devices_draw_what_one_device_draws(unit):
    batch = 2 * jax.device_count()
    input_ids, maskable = random_batch(batch, 32)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharded = jax.device_put(
        (input_ids, maskable), NamedSharding(mesh, PartitionSpec("data", None))
    )

    results = mask(*sharded, KEY, 0.4, unit), mask(input_ids, maskable, KEY, 0.4, unit)

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


def words_of(input_ids, maskable):
    """Positions of each maskable word: a piece and those that continue it without a gap."""
    words = []
    for i in np.flatnonzero(maskable):
        if words and words[-1][-1] == i - 1 and IS_CONTINUATION[input_ids[i]]:
            words[-1].append(i)
        else:
            words.append([i])
    return words


def runs(chosen):
    """Lengths of the runs of True within the rows; those cut by a row's end left out."""
    padded = np.pad(chosen, ((0, 0), (1, 1))).astype(int)
    change = np.diff(padded, axis=1)
    begins, ends = np.argwhere(change == 1), np.argwhere(change == -1)
    inner = (begins[:, 1] > 0) & (ends[:, 1] < chosen.shape[1])
    return (ends[:, 1] - begins[:, 1])[inner]


def mask(input_ids, maskable, key, rate, unit="token"):
    jitted = jax.jit(mask_with, static_argnums=(3, 4))
    return tuple(map(np.asarray, jitted(input_ids, maskable, key, rate, unit)))


def mask_with(input_ids, maskable, key, rate, unit):
    return mask_tokens(
        input_ids,
        maskable,
        key,
        rate=rate,
        mask_token_id=MASK_TOKEN_ID,
        vocab_size=VOCAB_SIZE,
        unit=unit,
        is_continuation=jnp.asarray(IS_CONTINUATION),
    )


def assert_mean(per_row):
    """Zero within three standard errors; the key is fixed, so this never flakes."""
    assert abs(per_row.mean()) <= 3 * per_row.std() / np.sqrt(len(per_row))


def assert_share(successes, trials, share):
    """Within three standard deviations of the binomial; the key is fixed, so this never flakes."""
    assert abs(successes - trials * share) <= 3 * np.sqrt(trials * share * (1 - share))
