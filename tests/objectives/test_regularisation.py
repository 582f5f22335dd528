"""Class weights and R-Drop against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.batches.batch import Batch
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.models.inputs import Text
from tinybert_jax.objectives.objective import encoder_inputs, unit_logits
from tinybert_jax.objectives.supervised import make_supervised
from tinybert_jax.settings.sizes import ModelConfig

torch = pytest.importorskip("torch")

CLASSES, ROWS, WIDTH = 3, 8, 6
SIZES = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=WIDTH,
)
APPLY, INIT = make_classifier(SIZES, CLASSES)
PARAMS = INIT(jax.random.key(0))
PARAMS["classifier"]["kernel"] *= 50  # so that the classes are far from equal
KEY = jax.random.key(1)


def _batch():
    """Eight rows, of which the last is a filler row."""
    rng = np.random.default_rng(0)
    mask = np.ones((ROWS, WIDTH), bool)
    mask[-1] = False
    ids = rng.integers(5, 50, (ROWS, WIDTH)).astype(np.int32)
    labels = np.array([0, 0, 0, 0, 1, 2, 0, 1], np.int32)
    batch = Batch(Text(ids, 0 * ids), mask, {"labels": labels}, mask[:, 0].astype(np.float32))
    return jax.tree.map(jnp.asarray, batch)


def _loss(objective, batch, key=KEY):
    batch, counts = objective.prepare(batch, key, jnp.float32(0))
    return objective.loss(PARAMS, batch, counts, key, ())


def _logits(key):
    logits = APPLY(PARAMS, *encoder_inputs(_batch()), key).logits
    return torch.tensor(np.asarray(unit_logits(logits, _batch())))[:-1]


def test_class_weights_are_those_of_torch():
    weights = np.array([0.5, 2.0, 3.0])
    objective = make_supervised(APPLY, class_weights=weights)
    labels = torch.tensor(np.asarray(_batch().targets["labels"]))[:-1].long()
    reference = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights, dtype=torch.float32))
    expected = reference(_logits(KEY), labels).item()
    assert float(_loss(objective, _batch())[0]) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(float(_loss(make_supervised(APPLY), _batch())[0]), rel=1e-2)


def test_class_weights_of_tokens_leave_out_those_that_are_no_units():
    """Of three tokens a row; class -1 marks tokens without a label."""
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(4, CLASSES)), jnp.float32)
    labels = np.array([[0, -1], [2, 1]], np.int32)
    batch = Batch(
        Text(jnp.zeros((2, 2), jnp.int32), jnp.zeros((2, 2), jnp.int32)),
        jnp.ones((2, 2), bool),
        {"labels": jnp.asarray(labels), "units": jnp.asarray(labels >= 0, jnp.float32)},
        jnp.ones(2),
    )

    class Output:
        pass

    output = Output()
    output.logits = logits
    weights = np.array([0.5, 2.0, 3.0])
    objective = make_supervised(lambda *args, **options: output, class_weights=weights)
    reference = torch.nn.CrossEntropyLoss(
        weight=torch.tensor(weights, dtype=torch.float32), ignore_index=-1
    )
    flat = torch.tensor(labels.ravel()).long()
    expected = reference(torch.tensor(np.asarray(logits)), flat).item()
    assert float(_loss(objective, batch)[0]) == pytest.approx(expected, rel=1e-5)


def test_r_drop_is_the_divergence_of_two_passes():
    """The mean of both losses and of both divergences, as in the authors' code."""
    objective = make_supervised(APPLY, r_drop=0.7)
    total, parts = _loss(objective, _batch())
    one, two = (_logits(key) for key in jax.random.split(KEY))
    labels = torch.tensor(np.asarray(_batch().targets["labels"]))[:-1].long()
    cross_entropy = torch.nn.functional.cross_entropy
    kl = torch.nn.functional.kl_div
    p, q = one.log_softmax(-1), two.log_softmax(-1)
    distance = (
        kl(p, q, log_target=True, reduction="batchmean")
        + kl(q, p, log_target=True, reduction="batchmean")
    ) / 2
    label = (cross_entropy(one, labels) + cross_entropy(two, labels)) / 2
    assert distance > 1e-3
    assert float(parts["loss/r_drop"]) == pytest.approx(0.7 * distance.item(), rel=1e-4)
    assert float(total) == pytest.approx((label + 0.7 * distance).item(), rel=1e-5)
