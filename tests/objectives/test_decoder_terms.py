"""Terms of the layers of an encoder-decoder: of either side, and of the attention between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.batches.batch import Plan, Targets, TokenRows, make_batch
from tinybert_jax.config.distillation import DistillSection
from tinybert_jax.models.seq2seq import make_seq2seq
from tinybert_jax.objectives.alignment import PROJECTIONS, init_projection
from tinybert_jax.objectives.distillation import Options, Role, make_distill
from tinybert_jax.objectives.objective import decoder_inputs, encoder_inputs
from tinybert_jax.objectives.supervised import make_supervised
from tinybert_jax.settings.sizes import EncoderDecoderConfig, ModelConfig, depths
from tinybert_jax.terms.table import reads_of

TERMS = [
    {"term": "logits", "form": "kl"},
    *({"term": "attention", "side": side} for side in ("encoder", "decoder", "cross")),
    *(
        {"term": term, "side": side}
        for term in ("hidden", "embedding")
        for side in ("encoder", "decoder")
    ),
]
PADDED = Plan(np.array([0, 1, 2, 3, -1]), 12)


def _sizes(width, num_encoder, num_decoder, inner=16):
    sides = (
        ModelConfig(
            vocab_size=23,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=2,
            intermediate_size=inner,
            max_position_embeddings=16,
        )
        for depth in (num_encoder, num_decoder)
    )
    return EncoderDecoderConfig(
        encoder=next(sides), decoder=next(sides), decoder_start_token_id=2, eos_token_id=3
    )


def _rows():
    draw = np.random.default_rng(0)
    lengths, others = np.array([5, 3, 9, 4]), np.array([4, 6, 2, 7])
    ids = draw.integers(5, 23, lengths.sum()).astype(np.int32)
    inputs = draw.integers(5, 23, others.sum()).astype(np.int32)
    ends, target_ends = (np.concatenate([[0], np.cumsum(own)]) for own in (lengths, others))
    targets = Targets(inputs, np.roll(inputs, -1), target_ends)
    return TokenRows(ids, ends, lengths.astype(np.int32), None, 0, targets=targets)


class Case:
    """The objective's value, parts and gradients, and both models' outputs as fp64 arrays."""

    def __init__(self, plan, unroll=False, num_shards=1):
        terms = DistillSection(prediction=TERMS).terms("prediction")
        sizes = _sizes(8, 1, 2), _sizes(12, 2, 4)
        made = [make_seq2seq(own, unroll=unroll) for own in sizes]
        reads = reads_of(terms), reads_of(terms, of_teacher=True)
        roles = [
            Role(apply, own, *depths(model))
            for (apply, _), own, model in zip(made, reads, sizes, strict=True)
        ]
        params = [init(jax.random.key(number)) for number, (_, init) in enumerate(made)]
        keys = jax.random.split(jax.random.key(7))
        self.projections = {
            name: init_projection(key, 8, 12, 1)
            for name, key in zip(PROJECTIONS.values(), keys, strict=True)
        }
        objective = make_distill(*roles, terms, Options(form="vocabulary", num_shards=num_shards))
        batch = jax.tree.map(jnp.asarray, make_batch(_rows(), plan, 0))
        batch, counts = objective.prepare(batch, jax.random.key(0), jnp.zeros(()))
        goal = jax.jit(objective.targets)(batch, params[1])
        loss = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
        (self.value, self.parts), self.grads = loss(
            {"student": params[0], **self.projections}, batch, counts, None, goal
        )
        self.batch, self.plan = batch, plan
        self.student, self.teacher = (
            role.apply(own, *encoder_inputs(batch), **decoder_inputs(batch), taps=True)
            for role, own in zip(roles, params, strict=True)
        )


@pytest.fixture(scope="module", params=[False, True], ids=["scanned", "unrolled"])
def padded(request):
    return Case(PADDED, request.param)


def test_packed_pairs_have_the_losses_and_gradients_of_padded_ones(padded):
    packed = Case(Plan(np.array([[1, 2], [0, -1], [3, -1]]), 14))
    assert packed.parts.keys() == padded.parts.keys() and len(packed.parts) == len(TERMS)
    for name, value in padded.parts.items():
        np.testing.assert_allclose(packed.parts[name], value, rtol=1e-5, err_msg=name)
    for one, two in zip(*(jax.tree.leaves(own.grads) for own in (padded, packed)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_shards_with_copies_of_the_word_table_train_as_one(padded):
    """Their copies get gradients of their own, which are summed once."""
    plan = padded.plan._replace(rows=np.array([0, 1, 2, 3, -1, -1]))
    sharded = Case(plan, num_shards=3)
    for name, value in padded.parts.items():
        np.testing.assert_allclose(sharded.parts[name], value, rtol=1e-5, err_msg=name)
    for one, two in zip(*(jax.tree.leaves(own.grads) for own in (padded, sharded)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_smoothed_labels_of_shards_are_those_of_one():
    apply, init = make_seq2seq(_sizes(8, 1, 2))
    params = init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, make_batch(_rows(), PADDED._replace(rows=np.arange(4)), 0))

    def value_and_gradients(num_shards):
        options = {"form": "vocabulary", "label_smoothing": 0.1, "num_shards": num_shards}
        objective = make_supervised(apply, **options)
        prepared, counts = objective.prepare(batch, jax.random.key(1), jnp.zeros(()))
        loss = lambda params: objective.loss(params, prepared, counts, None, ())[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    one, two = value_and_gradients(1), value_and_gradients(2)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def _mean_square(difference, is_counted):
    kept = np.asarray(difference, np.float64)[np.broadcast_to(is_counted, difference.shape)]
    return np.square(kept).mean()


# The layer map of 2 layers and 4, and of 1 and 2, is uniform.
@pytest.mark.parametrize(
    "name, side, pairs",
    [
        ("attention", "encoder", [(1, 2)]),
        ("attention_2", "self_attention", [(1, 2), (2, 4)]),
        ("attention_3", "cross_attention", [(1, 2), (2, 4)]),
    ],
)
def test_scores_are_compared_over_the_pairs_that_attention_is_over(padded, name, side, pairs):
    def scores(model, layer):
        own = model.encoder if side == "encoder" else getattr(model.decoder, side)
        queries, keys = (np.asarray(x[layer - 1], np.float64) for x in (own.queries, own.keys))
        return np.einsum("bthk,bshk->bhts", queries, keys) / queries.shape[-1] ** 0.5

    source, target = padded.batch.attention_mask, padded.batch.targets["decoder_mask"]
    of_queries, of_keys = {
        "encoder": (source, source),
        "self_attention": (target, target),
        "cross_attention": (target, source),
    }[side]
    is_pair = np.asarray(of_queries)[:, :, None] & np.asarray(of_keys)[:, None, :]
    if side == "self_attention":
        is_pair &= np.tri(is_pair.shape[1], dtype=bool)
    expected = sum(
        _mean_square(scores(padded.student, i) - scores(padded.teacher, j), is_pair[:, None])
        for i, j in pairs
    )
    np.testing.assert_allclose(padded.parts[f"loss/{name}"], expected, rtol=2e-5)


@pytest.mark.parametrize(
    "name, side, pairs",
    [
        ("hidden", "encoder", [(1, 2)]),
        ("hidden_2", "decoder", [(1, 2), (2, 4)]),
        ("embedding", "encoder", [(0, 0)]),
        ("embedding_2", "decoder", [(0, 0)]),
    ],
)
def test_states_are_compared_at_the_real_tokens_of_their_side(padded, name, side, pairs):
    mask = padded.batch.attention_mask
    if side == "decoder":
        mask = padded.batch.targets["decoder_mask"]
    projection = padded.projections[PROJECTIONS[side]]
    kernel, bias = (np.asarray(projection[key][0], np.float64) for key in ("kernel", "bias"))
    ours, theirs = (getattr(model, side).hidden for model in (padded.student, padded.teacher))
    expected = sum(
        _mean_square(np.asarray(ours[i]) @ kernel + bias - np.asarray(theirs[j]), mask[..., None])
        for i, j in pairs
    )
    np.testing.assert_allclose(padded.parts[f"loss/{name}"], expected, rtol=2e-5)
    assert np.abs(padded.grads[PROJECTIONS[side]]["kernel"]).max() > 0
