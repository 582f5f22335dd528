"""The encoder-decoder against PyTorch's `EncoderDecoderModel`: logits, taps and decoded tokens.

The tolerance of 2e-5 is that of test_encoder.py, which gives its reasons.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from reference import random_encoder_decoder, write_bert

from tinybert_jax.huggingface.encoder_decoder import load_encoder_decoder
from tinybert_jax.models import decoding
from tinybert_jax.models.decoding import Decoding, top
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.params import frozen_params
from tinybert_jax.models.seq2seq import bind_seq2seq, make_seq2seq

TOLERANCE = 2e-5
NUM_ROWS, SOURCE, TARGET, NEW = 100, 9, 7, 15
# Widths alike, and a narrower decoder, which needs a bridge and has one layer.
NARROW = {"hidden_size": 40, "num_hidden_layers": 1, "intermediate_size": 48}
SIZES = {"deep": {}, "narrow": NARROW}


class Pair:
    """A torch model and its weights here."""

    def __init__(self, folder, **fields):
        self.torch = random_encoder_decoder(**fields)
        self.loaded = load_encoder_decoder(write_bert(folder, self.torch))
        self.config, self.params = self.loaded.config, self.loaded.params


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, torch waits for its threads on a busy machine
    yield {name: Pair(tmp_path_factory.mktemp(name), **fields) for name, fields in SIZES.items()}
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def sources():
    """(ids, mask) of sources of all lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, SOURCE + 1, NUM_ROWS)
    mask = np.arange(SOURCE)[None] < lengths[:, None]
    return np.where(mask, rng.integers(5, 61, mask.shape), 0).astype(np.int32), mask


@pytest.fixture(scope="module")
def targets():
    """(ids, mask) of targets of all lengths."""
    rng = np.random.default_rng(1)
    mask = np.arange(TARGET)[None] < rng.integers(1, TARGET + 1, NUM_ROWS)[:, None]
    ids = np.where(mask, rng.integers(5, 41, mask.shape), 0).astype(np.int32)
    ids[:, 0] = 2
    return ids, mask


def _text(ids):
    return Text(jnp.asarray(ids), jnp.zeros(ids.shape, jnp.int32))


def _run(pair, source, target, *, unroll=False, **options):
    apply, _ = make_seq2seq(pair.config, unroll=unroll)

    @jax.jit
    def forward(params, text, mask, ids, ids_mask):
        given = {"decoder_input_ids": ids, "decoder_attention_mask": ids_mask, **options}
        return apply(params, text, mask, None, **given)

    return forward(pair.params, _text(source[0]), source[1], *target)


@pytest.mark.parametrize("name", SIZES)
def test_logits_and_states_equal_those_of_transformers(pairs, sources, targets, name):
    pair = pairs[name]
    with torch.no_grad():
        expected = copy.deepcopy(pair.torch).double()(
            input_ids=torch.tensor(sources[0]),
            attention_mask=torch.tensor(sources[1]).long(),
            decoder_input_ids=torch.tensor(targets[0]),
            decoder_attention_mask=torch.tensor(targets[1]).long(),
            output_hidden_states=True,
            output_attentions=True,
        )
    forms = {"deep": (False, True), "narrow": (True,)}[name]
    outputs = [_run(pair, sources, targets, unroll=unroll, taps=True) for unroll in forms]
    real = targets[1]
    for output in outputs:
        got = np.asarray(output.logits)[real]
        np.testing.assert_allclose(got, expected.logits.numpy()[real], atol=TOLERANCE)
        for ours, theirs in zip(output.decoder.hidden, expected.decoder_hidden_states, strict=True):
            np.testing.assert_allclose(np.asarray(ours)[real], theirs[real], atol=TOLERANCE)
        factors = jnp.einsum("btd,vd->btv", output.hidden, output.table) + output.bias[None, None]
        np.testing.assert_allclose(factors, output.logits, atol=TOLERANCE)
        hidden = zip(output.encoder.hidden, expected.encoder_hidden_states, strict=True)
        for ours, theirs in hidden:
            got = np.asarray(ours)[sources[1]]
            np.testing.assert_allclose(got, theirs[sources[1]], atol=TOLERANCE)
    scores = outputs[-1].decoder.cross_attention.attention_scores
    masked = np.where(sources[1][:, None, None], np.asarray(scores[-1]), -np.inf)
    probs = np.asarray(jax.nn.softmax(masked, axis=-1)).swapaxes(1, 2)[real]
    theirs = expected.cross_attentions[-1].numpy().swapaxes(1, 2)[real]
    np.testing.assert_allclose(probs, theirs, atol=TOLERANCE)


@pytest.mark.parametrize(
    "dtype, product_dtype, error",
    [(jnp.float32, jnp.int8, 0.05), (jnp.bfloat16, jnp.float8_e4m3fn, 0.15)],
)
@pytest.mark.parametrize("name", ["deep", "narrow"])
def test_a_frozen_teacher_with_products_of_a_byte_is_close(
    pairs, sources, targets, name, dtype, product_dtype, error
):
    """The layers of both sides alone have such products: not the bridge and the head."""
    pair = pairs[name]
    frozen = frozen_params(pair.params, dtype=dtype, product_dtype=product_dtype)
    apply, _ = make_seq2seq(pair.config, dtype=dtype, product_dtype=product_dtype)
    source, target = (_text(sources[0]), sources[1]), targets
    more = {"decoder_input_ids": target[0], "decoder_attention_mask": target[1]}
    got = np.asarray(jax.jit(apply)(frozen, *source, **more).logits, np.float32)[target[1]]
    expected = np.asarray(_run(pair, sources, targets).logits)[target[1]]
    assert 1e-4 < np.linalg.norm(got - expected) / np.linalg.norm(expected) < error


@functools.cache
def _program(config, how):
    def run(params, text, mask, key):
        model = bind_seq2seq(config, params, unroll=True)
        return decoding.generate(model, config, text, mask, how, key)

    return jax.jit(run)


def _generate(pair, sources, how, key=None):
    params = frozen_params(pair.params, dtype=jnp.float32, unroll=True)
    key = jax.random.key(0) if key is None else key
    ids = _program(pair.config, how)(params, _text(sources[0]), jnp.asarray(sources[1]), key)
    return np.asarray(ids)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deep", {}),
        ("deep", {"num_beams": 4}),
        ("narrow", {}),
        ("narrow", {"num_beams": 4}),
        ("narrow", {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}),
    ],
    ids=["greedy", "beams", "greedy-narrow", "beams-narrow", "early"],
)
def test_tokens_equal_those_of_transformers(pairs, sources, name, options):
    with torch.no_grad():
        expected = (
            pairs[name]
            .torch.generate(
                torch.tensor(sources[0]),
                attention_mask=torch.tensor(sources[1]).long(),
                max_new_tokens=NEW,
                do_sample=False,
                **options,
            )
            .numpy()
        )
    got = _generate(pairs[name], sources, Decoding(NEW, **options))
    ends = np.cumsum(expected == 3, axis=1) - (expected == 3) > 0
    expected[ends] = 0  # where the padding is 0, beams in transformers are filled up with the end
    assert len(np.unique(expected, axis=0)) > 30 and 0 < ends.any(axis=1).sum() < NUM_ROWS
    assert (got[:, expected.shape[1] :] == 0).all()
    np.testing.assert_array_equal(got[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("number", [1, 8])
@pytest.mark.parametrize("columns", [100, 4000])
def test_the_highest_values_are_those_of_top_k(number, columns):
    """Few values, so that most are equal: the first of equals comes first, as in `top_k`."""
    rng = np.random.default_rng(0)
    few = rng.integers(0, 9, (20, columns)).astype(np.float32)
    few[0] = -np.inf
    many = rng.standard_normal((20, columns)).astype(np.float32)
    for values in (few, many):
        found, expected = (
            jax.jit(top, static_argnums=1)(values, number),
            jax.lax.top_k(values, number),
        )
        for one, two in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, two)


def test_a_cached_step_gives_the_logits_of_the_whole_target(pairs, sources, targets):
    pair = pairs["deep"]
    rows = slice(0, 10)
    whole = np.ones_like(targets[1][rows])
    ids = np.where(targets[1], targets[0], 7)[rows]
    source = sources[0][rows], sources[1][rows]
    expected = _run(pair, source, (ids, whole)).logits

    @jax.jit
    def steps(params, text, mask, ids):
        model = bind_seq2seq(pair.config, params)
        memory = model.remember(text, mask)

        def step(cache, position):
            logits, cache = model.step(ids[:, position], position, memory, cache)
            return cache, logits

        cache = model.empty_cache(memory, TARGET)
        return jax.lax.scan(step, cache, jnp.arange(TARGET))[1].swapaxes(0, 1)

    got = steps(pair.params, _text(source[0]), source[1], ids)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_packed_pairs_equal_padded_pairs(pairs, sources, targets):
    """Two pairs in one row give the logits of two rows, and no gradient to the other's source."""
    pair = pairs["narrow"]
    apply, _ = make_seq2seq(pair.config)
    (ids, mask), (target, target_mask) = sources, targets
    real = [np.flatnonzero(mask[row]) for row in (0, 1)]
    own = [np.flatnonzero(target_mask[row]) for row in (0, 1)]

    def packed(values, places):
        row = np.concatenate([values[number][place] for number, place in enumerate(places)])
        segments = np.repeat([1, 2], [len(place) for place in places])
        pads = ((0, 3),)
        return np.pad(row, pads)[None], np.pad(segments, pads)[None].astype(np.int32)

    (source, source_segments), (words, segments) = packed(ids, real), packed(target, own)
    expected = np.asarray(_run(pair, (ids[:2], mask[:2]), (target[:2], target_mask[:2])).logits)
    got = np.asarray(_run(pair, (source, source_segments), (words, segments)).logits)[0]
    for number, place in enumerate(own):
        theirs = got[segments[0] == number + 1]
        np.testing.assert_allclose(theirs, expected[number][place], atol=TOLERANCE)

    @jax.jit
    def gradient(params, text, source_segments, words, segments):
        def first(table):
            embeddings = {**params["encoder"]["embeddings"], "word": {"embedding": table}}
            changed = {**params, "encoder": {**params["encoder"], "embeddings": embeddings}}
            given = {"decoder_input_ids": words, "decoder_attention_mask": segments}
            logits = apply(changed, text, source_segments, None, **given).logits
            return jnp.sum(jnp.square(logits) * (segments == 1)[:, :, None])

        return jax.grad(first)(params["encoder"]["embeddings"]["word"]["embedding"])

    by_id = np.abs(gradient(pair.params, _text(source), source_segments, words, segments)).sum(-1)
    seen, others = set(source[source_segments == 1]), set(source[source_segments != 1])
    assert others - seen and all(by_id[token] == 0 for token in others - seen)
    assert all(by_id[token] > 0 for token in seen)


def test_sampling_draws_from_the_likeliest_tokens(pairs, sources):
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1], [0.05, 0.05, 0.1, 0.8]]))
    kept = {
        (2, 1.0): [[1, 1, 0, 0], [0, 0, 1, 1]],
        (0, 0.65): [[1, 1, 0, 0], [0, 0, 0, 1]],
        (3, 0.35): [[1, 0, 0, 0], [0, 0, 0, 1]],
    }
    for (top_k, top_p), expected in kept.items():
        how = Decoding(1, top_k=top_k, top_p=top_p)
        found = jax.jit(decoding.likeliest, static_argnums=1)(logits, how)
        np.testing.assert_array_equal(np.isfinite(found), np.array(expected, bool))
    narrow = pairs["narrow"]
    how = Decoding(NEW, do_sample=True, temperature=2.0)
    one, again, other = (_generate(narrow, sources, how, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any(axis=1).sum() > 10
