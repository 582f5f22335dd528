"""DistilBERT against PyTorch's `transformers`; tests/models/test_encoder.py says why 2e-5."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
from reference import our_config, our_params, random_distilbert
from transformers import (
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
)

from tinybert_jax.models.attention import attention_scores
from tinybert_jax.models.heads import (
    Classifier,
    make_classifier,
    make_encoder,
    make_masked_lm,
    make_token_classifier,
)
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.params import flatten

TOLERANCE = 2e-5
SEQ = 12


def make_batch() -> tuple[Text, np.ndarray]:
    """Full, short, one-token and perforated rows; the token types are of no account."""
    mask = np.ones((4, SEQ), bool)
    mask[1, SEQ // 2 :] = False
    mask[2, 1:] = False
    mask[3, 1::3] = False
    ids = np.where(mask, np.random.default_rng(0).integers(1, 61, mask.shape), 0).astype(np.int32)
    return Text(ids, (np.arange(SEQ) >= SEQ // 2) * np.ones_like(ids)), mask


def torch_inputs(batch) -> list:
    (ids, _), mask = batch
    return [torch.tensor(array).long() for array in (ids, mask)]


def run_torch(model, batch, **options):
    """The output in float64, and queries, keys and values [layers, batch, seq, heads, head_dim]."""
    model = copy.deepcopy(model).double()
    captured = {"q_lin": [], "k_lin": [], "v_lin": []}
    for layer in model.base_model.transformer.layer:
        for name, outputs in captured.items():
            getattr(layer.attention, name).register_forward_hook(
                lambda _, __, output, outputs=outputs: outputs.append(output)
            )
    with torch.no_grad():
        output = model(*torch_inputs(batch), **options)
    heads = model.config.n_heads
    return output, [torch.stack(taps).unflatten(-1, (heads, -1)) for taps in captured.values()]


def assert_close(ours, theirs, real=True) -> None:
    """Largest absolute difference over the entries that `real` marks."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.where(real, np.abs(ours - theirs), 0).max() <= TOLERANCE


@pytest.mark.parametrize("num_layers, activation", [(1, "gelu"), (3, "gelu"), (3, "relu")])
def test_encoder_equals_torch(num_layers, activation):
    model = random_distilbert(DistilBertModel, n_layers=num_layers, activation=activation)
    batch = make_batch()
    mask = batch[1]
    apply, init = make_encoder(our_config(model))
    params = our_params(model, init)
    assert "token_type" not in params["embeddings"]
    encoded = jax.jit(apply)(params, *batch)
    output, (queries, keys, values) = run_torch(model, batch, output_hidden_states=True)
    assert len(encoded.hidden) == num_layers + 1
    assert_close(encoded.hidden, torch.stack(output.hidden_states), mask[None, :, :, None])
    assert_close(encoded.values, values, mask[None, :, :, None, None])
    scores = torch.einsum("lbthk,lbshk->lbhts", queries, keys) / queries.shape[-1] ** 0.5
    both_real = mask[:, :, None] & mask[:, None, :]
    ours = jax.vmap(attention_scores)(encoded.queries, encoded.keys)
    assert_close(ours, scores, both_real[None, :, None])
    assert scores.std() > 1  # the reference attends to something


HEADS = {
    "SequenceClassification": (
        DistilBertForSequenceClassification,
        lambda config: make_classifier(config, 5),
    ),
    "TokenClassification": (
        DistilBertForTokenClassification,
        lambda config: make_token_classifier(config, 5),
    ),
    "MaskedLM": (DistilBertForMaskedLM, make_masked_lm),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_logits_equal_torch(head, num_layers):
    kind, make = HEADS[head]
    options = {} if head == "MaskedLM" else {"num_labels": 5}
    model = random_distilbert(kind, n_layers=num_layers, **options)
    batch = make_batch()
    apply, init = make(our_config(model))
    params = our_params(model, init)
    theirs = run_torch(model, batch)[0].logits.numpy()
    real = True if head == "SequenceClassification" else batch[1][..., None]
    assert_close(jax.jit(apply)(params, *batch).logits, theirs, real)
    if head == "MaskedLM":
        positions = np.array([[0, 3], [5, 1], [0, 0], [2, 0]], np.int32)
        ours = jax.jit(apply)(params, *batch, positions=positions).logits
        assert_close(ours, np.take_along_axis(theirs, positions[..., None], 1))


@pytest.mark.parametrize("head", ["SequenceClassification", "MaskedLM"])
def test_gradients_equal_torch(head):
    """Relative error of each tensor's gradient; that of a key bias is zero: softmax ignores it."""
    batch, rates = make_batch(), ("dropout", "attention_dropout", "seq_classif_dropout")
    kind, make = HEADS[head]
    if head == "MaskedLM":
        model = random_distilbert(kind, **dict.fromkeys(rates, 0.0))
        labels = np.where(batch[1] & (batch[0].input_ids % 2 == 0), 7, -100)
    else:
        model = random_distilbert(kind, num_labels=5, **dict.fromkeys(rates, 0.0))
        labels = np.array([0, 4, -100, 2])
    apply, init = make(our_config(model))
    params = our_params(model, init)
    model(*torch_inputs(batch), labels=torch.tensor(labels).long()).loss.backward()

    def loss(params):
        log_probs = jax.nn.log_softmax(apply(params, *jax.tree.map(jnp.asarray, batch)).logits)
        chosen = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
        return -jnp.sum(chosen * (labels >= 0)) / (labels >= 0).sum()

    ours = flatten(jax.jit(jax.grad(loss))(params))
    for parameter in model.parameters():
        parameter.data = parameter.grad  # so that the table of names transposes it
    theirs = flatten(our_params(model, init))
    whole = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in theirs.values()))
    for path, expected in theirs.items():
        error, norm = np.linalg.norm(ours[path] - expected), np.linalg.norm(expected)
        if path.endswith("key/bias") or "/pooler/" in path and head == "MaskedLM":
            assert max(error, norm) <= 1e-6 * whole, path
        else:
            assert norm > 1e-4 * whole and error <= 2e-5 * norm, path


def test_packed_equals_padded():
    """Rows of one example each, and the same examples one after the other in a row."""
    model = random_distilbert(DistilBertForSequenceClassification, num_labels=5)
    apply, init = make_classifier(our_config(model), 5)
    params = our_params(model, init)
    lengths, ids = [7, 3, 5], np.random.default_rng(1).integers(1, 61, 15).astype(np.int32)
    padded, mask = np.zeros((3, 8), np.int32), np.zeros((3, 8), bool)
    for row, part in enumerate(np.split(ids, np.cumsum(lengths)[:-1])):
        padded[row, : len(part)], mask[row, : len(part)] = part, True
    segments = np.repeat(np.arange(1, 4, dtype=np.int32), lengths)[None]
    padded, mask, segments, ids = map(jnp.asarray, (padded, mask, segments, ids[None]))
    each = apply(params, Text(padded, 0 * padded), mask, taps=True)
    packed = apply(params, Text(ids, 0 * ids), segments, num_segments=3, taps=True)
    np.testing.assert_allclose(packed.logits[0], each.logits, atol=TOLERANCE)
    hidden = np.asarray(each.encoder.hidden)[:, mask]
    np.testing.assert_allclose(packed.encoder.hidden[:, 0], hidden, atol=TOLERANCE)


def test_heads_have_the_dropout_that_transformers_gives_them():
    """`seq_classif_dropout` over the pooled token, `dropout` over tokens."""
    config = our_config(random_distilbert(DistilBertForSequenceClassification))
    assert Classifier(config, 3, rngs=nnx.Rngs(0)).dropout_rate == 0.25
    assert Classifier(config, 3, of_tokens=True, rngs=nnx.Rngs(0)).dropout_rate == 0.15
    bert = config.model_copy(update={"model_type": None})
    assert Classifier(bert, 3, of_tokens=True, rngs=nnx.Rngs(0)).dropout_rate == 0.25


@pytest.mark.parametrize("fields", [{"type_vocab_size": 2}, {"layer_norm_eps": 1e-5}])
def test_sizes_that_a_distilbert_does_not_have_are_refused(fields):
    config = our_config(random_distilbert(DistilBertModel)).model_copy(update=fields)
    with pytest.raises(ValueError, match=f"{next(iter(fields))}: expected .* in a DistilBERT"):
        make_encoder(config)
