"""Values and gradients of `losses.pointwise` against float64 PyTorch written from the definitions.

Tolerance 1e-5 (relative, in norm): fp32 rounds to 6e-8 and the sums here are short; the rest is
room for the softmaxes.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.losses import pointwise, vocabulary

torch = pytest.importorskip("torch")
from reference import (
    assert_float32_of_bfloat16,
    assert_microbatches_add_up,
    assert_padding_is_nothing,
    assert_same,
    normal,
)

F = torch.nn.functional

NORMALISATIONS = ["paper_code", "valid_only"]
LENGTHS = np.array([7, 3, 1, 5, 0])
BATCH, SEQ = 5, 7
MASK = np.arange(SEQ)[None, :] < LENGTHS[:, None]
WEIGHTS = np.array([1, 0.5, 0, 2, 1], np.float32)
LABELS = np.array([2, 0, -100, 1, 3])


def test_softmax_cross_entropy_matches_torch():
    for label_smoothing in (0.0, 0.1):

        def loss(logits, label_smoothing=label_smoothing):
            return pointwise.softmax_cross_entropy(
                logits, jnp.array(LABELS), jnp.array(WEIGHTS), label_smoothing=label_smoothing
            )

        def reference(logits, label_smoothing=label_smoothing):
            per_example = F.cross_entropy(
                logits, torch.tensor(LABELS), reduction="none", label_smoothing=label_smoothing
            )
            return weighted_mean(per_example)

        assert_same(loss, reference, normal(0, BATCH, 4, scale=5))


def test_masked_lm_matches_torch():
    labels = np.array([3, -100, 0, 10, -100, 7])

    assert_same(
        lambda logits: pointwise.masked_lm(logits, jnp.array(labels)),
        lambda logits: F.cross_entropy(logits, torch.tensor(labels), ignore_index=-100),
        normal(1, 6, 11, scale=5),
    )


@pytest.mark.parametrize("reduction", ["sum", "mean_classes"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_cross_entropy_matches_torch(reduction, temperature):
    def loss(student, teacher):
        return pointwise.soft_cross_entropy(
            student, teacher, jnp.array(WEIGHTS), temperature=temperature, reduction=reduction
        )

    def reference(student, teacher):
        probs = torch.softmax(teacher / temperature, -1)
        per_class = -probs * torch.log_softmax(student / temperature, -1)
        return weighted_mean(per_class.sum(-1) if reduction == "sum" else per_class.mean(-1))

    assert_same(loss, reference, normal(2, BATCH, 4, scale=5), normal(3, BATCH, 4, scale=5))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_matches_torch(temperature):
    def loss(student, teacher):
        return pointwise.kl(student, teacher, jnp.array(WEIGHTS), temperature=temperature)

    def reference(student, teacher):
        per_class = F.kl_div(
            torch.log_softmax(student / temperature, -1),
            torch.softmax(teacher / temperature, -1),
            reduction="none",
        )
        return weighted_mean(per_class.sum(-1))

    assert_same(loss, reference, normal(4, BATCH, 4, scale=5), normal(5, BATCH, 4, scale=5))


def test_logits_mse_matches_torch():
    def reference(student, target):
        return weighted_mean(F.mse_loss(student, target, reduction="none").mean(-1))

    assert_same(
        lambda student, target: pointwise.logits_mse(student, target, jnp.array(WEIGHTS)),
        reference,
        normal(6, BATCH, 3),
        normal(7, BATCH, 3),
    )


def test_cosine_matches_torch():
    mask = torch.tensor(MASK)
    assert_same(
        lambda student, teacher: pointwise.cosine(student, teacher, jnp.array(MASK)),
        lambda student, teacher: (1 - F.cosine_similarity(student[mask], teacher[mask])).mean(),
        normal(8, BATCH, SEQ, 6),
        normal(9, BATCH, SEQ, 6),
    )


def test_pooled_cosine_matches_torch():
    assert_same(
        lambda student, teacher: pointwise.pooled_cosine(student, teacher, jnp.array(WEIGHTS)),
        lambda student, teacher: weighted_mean(1 - F.cosine_similarity(student, teacher)),
        normal(8, BATCH, 6),
        normal(9, BATCH, 6),
    )


def test_pooled_cosine_of_zeros_has_a_finite_gradient():
    ours, theirs = jnp.zeros((2, 6)), jnp.ones((2, 6))
    value, gradient = jax.value_and_grad(pointwise.pooled_cosine)(ours, theirs, jnp.ones(2))
    assert value == 1 and np.isfinite(gradient).all()


def test_normalised_distance_matches_torch():
    def reference(student, teacher):
        return weighted_mean((F.normalize(student) - F.normalize(teacher)).square().mean(-1))

    assert_same(
        lambda student, teacher: pointwise.normalised_distance(
            student, teacher, jnp.array(WEIGHTS)
        ),
        reference,
        normal(8, BATCH, 6),
        normal(9, BATCH, 6),
    )


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_hidden_mse_matches_torch(normalisation):
    def reference(student, teacher):
        if normalisation == "paper_code":
            return F.mse_loss(student, teacher)
        return F.mse_loss(student[torch.tensor(MASK)], teacher[torch.tensor(MASK)])

    assert_same(
        lambda student, teacher: pointwise.hidden_mse(
            student, teacher, jnp.array(MASK), normalisation=normalisation
        ),
        reference,
        normal(8, BATCH, SEQ, 6),
        normal(9, BATCH, SEQ, 6),
    )


def test_padding_changes_nothing_under_valid_only():
    hidden = [normal(seed, BATCH, SEQ, 6) for seed in (30, 31)]

    def loss(*args):
        return pointwise.hidden_mse(*args, jnp.array(MASK), normalisation="valid_only")

    assert_padding_is_nothing(loss, MASK, hidden)


def test_microbatches_of_examples_add_up_to_the_batch():
    """With the `count` of the whole batch, as gradient accumulation calls the losses."""
    student, teacher = (normal(40 + i, BATCH, 4) for i in range(2))
    soft = functools.partial(pointwise.soft_cross_entropy, reduction="sum")

    assert_microbatches_add_up(
        pointwise.softmax_cross_entropy, [student, LABELS, WEIGHTS], WEIGHTS[:4].sum()
    )
    assert_microbatches_add_up(pointwise.masked_lm, [student, LABELS], 3)
    assert_microbatches_add_up(chunked_lm, [student, LABELS], 3)
    assert_microbatches_add_up(soft, [student, teacher, WEIGHTS], WEIGHTS[:4].sum())
    assert_microbatches_add_up(pointwise.kl, [student, teacher, WEIGHTS], WEIGHTS[:4].sum())
    assert_microbatches_add_up(pointwise.logits_mse, [student, teacher, WEIGHTS], WEIGHTS[:4].sum())
    assert_microbatches_add_up(
        pointwise.pooled_cosine, [student, teacher, WEIGHTS], WEIGHTS[:4].sum()
    )


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_microbatches_of_tokens_add_up_to_the_batch(normalisation):
    hidden = [normal(42 + i, BATCH, SEQ, 6) for i in range(2)]
    num_tokens = 4 * SEQ if normalisation == "paper_code" else LENGTHS[:4].sum()
    hidden_mse = functools.partial(pointwise.hidden_mse, normalisation=normalisation)
    assert_microbatches_add_up(hidden_mse, [*hidden, MASK], num_tokens)


def test_a_batch_without_valid_units_has_loss_and_gradient_zero():
    x = jnp.ones((2, 3))
    hidden, no_token, weights = jnp.ones((2, 3, 4)), jnp.zeros((2, 3), bool), jnp.zeros(2)
    ignored = jnp.full(2, -100)
    cases = [
        lambda x: pointwise.softmax_cross_entropy(x, ignored, weights),
        lambda x: pointwise.masked_lm(x, ignored),
        lambda x: chunked_lm(x, ignored),
        lambda x: pointwise.kl(x, x + 1, weights),
        lambda x: pointwise.logits_mse(x, x + 1, weights),
        lambda x: pointwise.pooled_cosine(x, x + 1, weights),
        lambda x: pointwise.soft_cross_entropy(x, x + 1, weights, reduction="sum"),
        lambda x: pointwise.hidden_mse(x * hidden, hidden, no_token, normalisation="valid_only"),
    ]
    inputs = [x, x, x, x, x, x, x, x[:, :, None]]
    for loss, value in zip(cases, inputs, strict=True):
        for got in jax.jit(jax.value_and_grad(loss))(value):
            assert not got.any()


def test_bfloat16_inputs_are_computed_in_float32():
    classes = [jnp.array(normal(50 + i, BATCH, 4), jnp.bfloat16) for i in range(2)]
    hidden = [jnp.array(normal(52 + i, BATCH, SEQ, 6), jnp.bfloat16) for i in range(2)]
    weights, mask = jnp.array(WEIGHTS), jnp.array(MASK)
    cases = [
        (lambda x: pointwise.softmax_cross_entropy(x, jnp.array(LABELS), weights), classes[:1]),
        (lambda x: pointwise.masked_lm(x, jnp.array(LABELS)), classes[:1]),
        (lambda x: chunked_lm(x, jnp.array(LABELS)), classes[:1]),
        (lambda x, y: pointwise.soft_cross_entropy(x, y, weights, reduction="sum"), classes),
        (lambda x, y: pointwise.kl(x, y, weights), classes),
        (lambda x, y: pointwise.logits_mse(x, y, weights), classes),
        (lambda x, y: pointwise.pooled_cosine(x, y, weights), classes),
        (lambda x, y: pointwise.hidden_mse(x, y, mask, normalisation="valid_only"), hidden),
    ]
    for loss, inputs in cases:
        assert_float32_of_bfloat16(loss, inputs)


def test_an_unknown_normalisation_or_reduction_is_refused():
    """`inspect.unwrap` skips the jaxtyping check, which runs only in the tests."""
    x, mask = jnp.ones((2, 3, 4)), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match="expected 'paper_code' or 'valid_only', got 'mean'"):
        inspect.unwrap(pointwise.hidden_mse)(x, x, mask, normalisation="mean")
    with pytest.raises(ValueError, match="expected 'sum' or 'mean_classes', got 'mean'"):
        inspect.unwrap(pointwise.soft_cross_entropy)(x[0], x[0], jnp.ones(3), reduction="mean")


def chunked_lm(hidden, labels, count=None):
    """Chunked masked-LM loss whose logits are the hidden states and two more columns."""
    table, bias = (
        jnp.concatenate([jnp.eye(hidden.shape[1]), jnp.ones((2, 4))[:, : hidden.shape[1]]]),
        jnp.arange(hidden.shape[1] + 2.0),
    )
    return vocabulary.masked_lm(hidden, table, bias, labels, chunk_size=1, count=count)


def weighted_mean(per_example):
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    return (per_example * weights).sum() / weights.sum()
