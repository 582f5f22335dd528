"""The three forms of scores against float64 PyTorch: gold labels, and a teacher's scores.

Tolerance 1e-5 (relative, in norm) as in test_pointwise.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.losses.forms import FORMS

torch = pytest.importorskip("torch")
from reference import assert_float32_of_bfloat16, assert_microbatches_add_up, assert_same, normal

F = torch.nn.functional
UNITS, CLASSES = 6, 4
WEIGHTS = np.array([1, 1, 0, 1, 0, 1], np.float32)  # 0: filler
SETS = np.random.default_rng(0).integers(0, 2, (UNITS, CLASSES)).astype(np.int32)
SIGMOID, SOFTMAX, SQUARE = FORMS["sigmoid"], FORMS["softmax"], FORMS["square"]
REDUCTIONS = {"sum": torch.sum, "mean_classes": torch.mean}


def _mean(per_unit):
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    return (per_unit * weights).sum() / weights.sum()


def _logits(seed, num_classes=CLASSES):
    return normal(seed, UNITS, num_classes, scale=4)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_sets_of_labels_are_those_of_bce_with_logits(label_smoothing):
    """Smoothing moves a target towards 1/2; filler counts nowhere."""
    target = torch.tensor(SETS * (1 - label_smoothing) + label_smoothing / 2)

    def loss(logits):
        return SIGMOID.label_loss(
            logits, jnp.array(SETS), jnp.array(WEIGHTS), label_smoothing=label_smoothing
        )

    def reference(logits):
        real = torch.tensor(WEIGHTS) > 0
        return torch.nn.BCEWithLogitsLoss()(logits[real], target[real])

    assert_same(loss, reference, _logits(1))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("divergence", ["cross_entropy", "kl"])
def test_a_teacher_s_probabilities_of_every_class(divergence, temperature, reduction):
    """Both logits are divided by the temperature; kl is that of [class, not class] outcomes."""

    def loss(student, teacher):
        return SIGMOID.teacher_loss(
            student,
            teacher,
            jnp.array(WEIGHTS),
            divergence=divergence,
            temperature=temperature,
            reduction=reduction,
        )

    def cross_entropy(student, teacher):
        return F.binary_cross_entropy_with_logits(student, torch.sigmoid(teacher), reduction="none")

    def kl(student, teacher):
        ours, theirs = (F.logsigmoid(torch.stack([x, -x])) for x in (student, teacher))
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(0)

    def reference(student, teacher):
        per_class = {"cross_entropy": cross_entropy, "kl": kl}[divergence]
        each = per_class(student / temperature, teacher / temperature)
        return _mean(REDUCTIONS[reduction](each, -1))

    assert_same(loss, reference, _logits(2), _logits(3))


def test_kl_is_the_cross_entropy_less_the_teacher_s_own():
    """So it is 0 between equals, and has the same gradient by the student."""
    logits, weights = jnp.array(_logits(4)), jnp.array(WEIGHTS)
    assert SIGMOID.teacher_loss(logits, logits, weights, divergence="kl") == 0
    other = jnp.array(_logits(5))
    entropy = SIGMOID.teacher_loss(other, other, weights)
    np.testing.assert_allclose(
        SIGMOID.teacher_loss(logits, other, weights, divergence="kl"),
        SIGMOID.teacher_loss(logits, other, weights) - entropy,
        rtol=1e-5,
    )


def test_scores_of_any_size_have_finite_losses():
    """Where a probability itself would be 0 or 1 in fp32."""
    large = jnp.array([[1e4, -1e4, 1e4, -1e4]])
    labels, weights = jnp.array([[1, 0, 0, 1]]), jnp.ones(1)
    np.testing.assert_allclose(SIGMOID.label_loss(large, labels, weights), 1e4 / 2)
    for divergence in ("cross_entropy", "kl"):
        value = SIGMOID.teacher_loss(-large, large, weights, divergence=divergence)
        np.testing.assert_allclose(value, 4e4)


def test_numbers_are_squared_errors():
    labels = normal(6, UNITS)

    def reference(logits):
        return _mean((logits[:, 0] - torch.tensor(labels)).square())

    gold = functools.partial(
        SQUARE.label_loss, labels=jnp.array(labels), weights=jnp.array(WEIGHTS)
    )
    assert_same(lambda logits: gold(logits), reference, _logits(7, 1))
    teacher = labels[:, None]

    def soft(student):
        return SQUARE.teacher_loss(student, jnp.array(teacher), jnp.array(WEIGHTS))

    assert_same(soft, reference, _logits(7, 1))
    assert not SQUARE.has_temperature and SIGMOID.has_temperature and SOFTMAX.has_temperature


@pytest.mark.parametrize("divergence", ["cross_entropy", "kl"])
def test_one_class_of_a_unit_is_the_softmax(divergence):
    def loss(student, teacher):
        return SOFTMAX.teacher_loss(
            student, teacher, jnp.array(WEIGHTS), divergence=divergence, temperature=2.0
        )

    def reference(student, teacher):
        theirs = torch.log_softmax(teacher / 2, -1)
        each = -theirs.exp() * torch.log_softmax(student / 2, -1)
        if divergence == "kl":
            each = each + theirs.exp() * theirs
        return _mean(each.sum(-1))

    assert_same(loss, reference, _logits(8), _logits(9))


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_batch_add_up_and_narrow_scores_are_widened(form):
    """Of gold labels and of a teacher's scores; the first four units in two parts."""
    num_classes = 1 if form == "square" else CLASSES
    labels = {
        "sigmoid": SETS,
        "softmax": np.array([1, 0, 2, 3, 0, 1], np.int32),
        "square": normal(10, UNITS),
    }[form]
    own = FORMS[form]

    def gold(logits, labels, weights, count=None):
        return own.label_loss(logits, labels, weights, count=count)

    def soft(logits, teacher, weights, count=None):
        return own.teacher_loss(logits, teacher, weights, count=count)

    logits, teacher = _logits(11, num_classes), _logits(12, num_classes)
    for loss, target in ((gold, labels), (soft, teacher)):
        assert_microbatches_add_up(loss, (logits, target, WEIGHTS), WEIGHTS[:4].sum())
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (logits, teacher)]
    assert_float32_of_bfloat16(lambda *given: soft(*given, jnp.array(WEIGHTS)), narrow)
