"""Scores of models: a masked LM's of held-out text, against closed forms; on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.batches.batch import TokenRows
from tinybert_jax.config.compute import MeshSection
from tinybert_jax.inference.scorer import EVAL_MASK_RATE, make_masked_lm_scorer, make_scorer
from tinybert_jax.models.heads import MaskedLMOutput, make_classifier, make_token_classifier
from tinybert_jax.models.inputs import Text
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import make_mesh
from tinybert_jax.settings.sizes import ModelConfig

VOCAB, DIM = 50, 4
SPECIAL = (0, 1, 2, 3)
SIZES = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=32,
)


def rows_of(*, num_rows=600, seed=0):
    """Rows 2 … 3 of common and rare words."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, 33, num_rows)
    words = 4 + np.minimum(rng.geometric(0.2, lengths.sum()) - 1, VOCAB - 5)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    words[offsets[:-1]], words[offsets[1:] - 1] = 2, 3
    return TokenRows(words.astype(np.int32), offsets, lengths.astype(np.int32), None, 0)


def scorer(key=0, seen=None, pair_logits=None, packed=False):
    """Of a model that only knows its bias: the same logits at every position, in every row."""

    def apply(params, inputs, attention_mask, *, positions):
        if seen is not None:
            jax.debug.callback(
                lambda ids, mask: seen.append((ids, mask)), inputs.input_ids, attention_mask
            )
        hidden = jnp.zeros((*positions.shape, DIM))
        pair = pair_logits and jnp.broadcast_to(jnp.array(pair_logits), (len(positions), 2))
        table = jnp.zeros((VOCAB, DIM))
        return MaskedLMOutput(None, hidden, table, params["bias"], pair_logits=pair)

    return make_masked_lm_scorer(
        apply,
        key=jax.random.key(key),
        mask_token_id=1,
        special_token_ids=SPECIAL,
        vocab_size=VOCAB,
        buckets=(16, 32),
        pad_token_id=0,
        packed=packed,
        chunk_size=32,
    )


def test_a_model_that_knows_nothing_is_as_perplexed_as_the_vocabulary_is_large():
    values = scorer()({"bias": jnp.zeros(VOCAB)}, rows_of())
    assert set(values) == {"loss", "perplexity", "masked_accuracy"}
    np.testing.assert_allclose(values["loss"], np.log(VOCAB), rtol=1e-6)
    np.testing.assert_allclose(values["perplexity"], VOCAB, rtol=1e-5)


def test_pairs_are_counted_where_there_is_one():
    """600 rows make batches of 64: the filler, which repeats row 0, does not count."""
    labels = np.random.default_rng(1).integers(-1, 2, 600).astype(np.int32)
    labels[0] = 1
    rows = rows_of()._replace(labels=labels)
    share = (labels == 1).sum() / (labels >= 0).sum()
    for logits, expected in (([0.0, 1.0], share), ([1.0, 0.0], 1 - share)):
        values = scorer(pair_logits=logits)({"bias": jnp.zeros(VOCAB)}, rows)
        np.testing.assert_allclose(values["pair_accuracy"], expected, rtol=1e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["bucketed", "packed"])
def test_a_model_of_word_frequencies_has_their_cross_entropy(packed):
    """Over a seventh of the words, drawn at random: within three standard errors."""
    rows = rows_of()
    words = rows.ids[~np.isin(rows.ids, SPECIAL)]
    counts = np.bincount(words, minlength=VOCAB) + 0.5
    probs = counts / counts.sum()
    values = scorer(packed=packed)({"bias": jnp.log(jnp.asarray(probs, jnp.float32))}, rows)
    surprise, is_commonest = -np.log(probs[words]), words == probs.argmax()
    root = np.sqrt(EVAL_MASK_RATE * len(words))
    assert abs(values["loss"] - surprise.mean()) <= 3 * surprise.std() / root
    share = values["masked_accuracy"]
    assert abs(share - is_commonest.mean()) <= 3 * is_commonest.std() / root
    assert values["perplexity"] == np.exp(values["loss"])


def test_the_masks_are_those_of_the_key():
    rows, params = rows_of(num_rows=70), {"bias": jnp.arange(VOCAB) / 10}
    score = scorer()
    assert score(params, rows) == score(params, rows) == scorer()(params, rows)
    assert score(params, rows) != scorer(key=1)(params, rows)


@pytest.mark.parametrize("packed", [False, True], ids=["bucketed", "packed"])
def test_masked_words_are_hidden_from_the_model(packed):
    """And packed, all batches have one shape: a program for each costs minutes on a GPU."""
    rows, seen = rows_of(num_rows=200), []
    scorer(seen=seen, packed=packed)({"bias": jnp.zeros(VOCAB)}, rows)
    jax.effects_barrier()
    shown = np.concatenate([np.asarray(ids)[np.asarray(mask) > 0] for ids, mask in seen])
    assert len({ids.shape for ids, _ in seen}) == 1 or not packed
    num_words = (~np.isin(rows.ids, SPECIAL)).sum()
    rate = 0.8 * EVAL_MASK_RATE
    num_masks = (shown == 1).sum()
    assert abs(num_masks - rate * num_words) <= 3 * np.sqrt(rate * num_words) + num_words / VOCAB


@pytest.mark.parametrize("packed", [False, True], ids=["bucketed", "packed"])
def test_eight_devices_score_as_one(packed):
    """And a part of the rows scores as it does among all."""
    apply, init = make_classifier(SIZES, 3)
    mesh = make_mesh(MeshSection())
    assert mesh.size == 8
    params, rows = init(jax.random.key(0)), rows_of(num_rows=70)
    options = {"buckets": (16, 32), "pad_token_id": 0, "packed": packed}
    one = make_scorer(apply, **options)(params, rows)
    score = make_scorer(apply, **options, mesh=mesh)
    eight = score(sharding.place_params(params, mesh), rows, global_batch_size=12)
    np.testing.assert_allclose(eight, one, atol=1e-6)
    part = score(sharding.place_params(params, mesh), rows.part(20, 65))
    np.testing.assert_allclose(part, one[20:65], atol=1e-6)


def test_logits_of_tokens_are_the_same_in_any_layout():
    """Packed, bucketed and padded alike: the logits of each token of a row by itself."""
    rows = rows_of(num_rows=70)
    is_unit = ~np.isin(rows.ids, SPECIAL)
    rows = rows._replace(is_unit=is_unit, second=(rows.lengths // 2).astype(np.int32))
    apply, init = make_token_classifier(SIZES, 3)
    params = jax.tree.map(lambda leaf: 5 * leaf, init(jax.random.key(0)))

    alone, forward = [], jax.jit(apply)
    for row, begin in enumerate(rows.offsets[:-1]):
        ids = rows.ids[begin : rows.offsets[row + 1]][None]
        types = (np.arange(ids.size)[None] >= rows.second[row]).astype(np.int32)
        alone.append(forward(params, Text(ids, types), ids >= 0).logits[0])
    expected = np.concatenate(alone)
    assert expected.shape == (len(rows.ids), 3) and expected.std() > 0.1

    layouts = {"packed": ((16, 32), True), "bucketed": ((16, 32), False), "padded": ((32,), False)}
    mesh = make_mesh(MeshSection())
    for name, (buckets, packed) in layouts.items():
        options = {"buckets": buckets, "pad_token_id": 0, "packed": packed}
        scored = make_scorer(apply, **options)(params, rows)
        np.testing.assert_allclose(scored, expected, atol=1e-5, err_msg=name)
        part = make_scorer(apply, **options, mesh=mesh)(
            sharding.place_params(params, mesh), rows.part(20, 65)
        )
        theirs = expected[rows.offsets[20] : rows.offsets[65]]
        np.testing.assert_allclose(part, theirs, atol=1e-5, err_msg=f"{name}, on eight devices")
