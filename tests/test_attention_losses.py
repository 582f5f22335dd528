"""The relation loss against the maps that it never builds, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from reference import assert_same, normal, value_and_grads  # noqa: E402

from tinybert_jax.attention_losses import regroup, relation_kl  # noqa: E402

F = torch.nn.functional
BATCH, SEQ, HEADS = 4, 11, 3
LENGTHS = np.array([11, 4, 1, 0])
PADDED = np.arange(SEQ)[None] < LENGTHS[:, None]
PACKED = np.array(
    [
        [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2],
        [1, 2, 2, 2, 3, 3, 3, 3, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0] * 11,
    ],
    np.int32,
)
MASKS = {"padded": PADDED, "packed": PACKED}


def _loss(mask, teacher, block_size):
    def loss(left, right):
        goal = map(jnp.array, teacher)
        return relation_kl(left, right, *goal, jnp.array(mask), block_size=block_size)

    return loss


def _reference(mask, teacher):
    """Softmax over each token's own example, KL, mean over heads and real tokens."""
    segments = torch.tensor(mask.astype(np.int64))
    is_pair = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)

    def log_probs(left, right):
        left, right = left.transpose(1, 2), right.transpose(1, 2)
        scores = left @ right.transpose(2, 3) / left.shape[-1] ** 0.5
        return scores.masked_fill(~is_pair[:, None], -1e9).log_softmax(-1)

    goal = log_probs(*(torch.tensor(x, dtype=torch.float64) for x in teacher))

    def reference(left, right):
        divergence = F.kl_div(log_probs(left, right), goal, reduction="none", log_target=True)
        return divergence.sum(-1).mean(1)[segments > 0].mean()

    return reference


def _teacher(head_dim=6):
    return [normal(seed, BATCH, SEQ, HEADS, head_dim, scale=1.5) for seed in (1, 2)]


@pytest.mark.parametrize("block_size", [1, 4, 11, 128])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_relation_kl_matches_maps(mask, block_size):
    student = [normal(seed, BATCH, SEQ, HEADS, 4, scale=1.5) for seed in (3, 4)]
    teacher = _teacher()
    assert_same(_loss(mask, teacher, block_size), _reference(mask, teacher), *student)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_relation_of_values_with_themselves_matches_maps(mask):
    values, teacher = normal(3, BATCH, SEQ, HEADS, 4), [_teacher()[0]] * 2
    loss, reference = _loss(mask, teacher, 4), _reference(mask, teacher)
    assert_same(lambda x: loss(x, x), lambda x: reference(x, x), values)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3])
def test_relation_kl_near_the_teacher(distance, mask):
    """No cancellation, however close the student is."""
    teacher = _teacher()
    student = [x + normal(20 + i, *x.shape, scale=distance) for i, x in enumerate(teacher)]
    assert_same(_loss(mask, teacher, 4), _reference(mask, teacher), *student)


def test_relation_kl_far_from_the_teacher():
    """Probabilities of 0 and 1. Scores of hundreds have an error of hundreds times fp32's 6e-8."""
    teacher = [8 * x for x in _teacher()]
    student = [normal(seed, BATCH, SEQ, HEADS, 6, scale=8) for seed in (3, 4)]
    loss, reference = _loss(PADDED, teacher, 4), _reference(PADDED, teacher)
    assert_same(loss, reference, *student, tolerance=2e-4)


def test_padding_and_other_segments_change_nothing():
    student = [normal(seed, BATCH, SEQ, HEADS, 4) for seed in (3, 4)]
    for mask in MASKS.values():
        real = (mask > 0)[:, :, None, None]
        teacher = _teacher()
        expected = value_and_grads(_loss(mask, teacher, 4), *student)
        junk = [np.where(real, x, np.float32(np.nan)) for x in (*student, *teacher)]
        got = value_and_grads(_loss(mask, junk[2:], 4), *junk[:2])
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_teacher_gets_no_gradient_and_nothing_gives_zero():
    teacher = [jnp.array(x) for x in _teacher()]
    student = [jnp.array(normal(seed, BATCH, SEQ, HEADS, 4)) for seed in (3, 4)]

    def loss(teacher, mask):
        return relation_kl(*student, *teacher, jnp.array(mask))

    grads = jax.grad(loss)(teacher, PADDED)
    assert not any(grad.any() for grad in grads)
    value, grads = value_and_grads(_loss(PADDED & False, teacher, 4), *student)[0], []
    assert value == 0


def test_memory_grows_with_the_length_and_not_with_its_square():
    """From T to 2T the temporaries double; those of the maps, forward and backward, quadruple."""

    def temporaries(loss, seq):
        shape = jax.ShapeDtypeStruct((1, seq, 2, 8), jnp.float32)
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        compiled = step.lower(*[shape] * 4).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def streamed(*heads):
        return relation_kl(*heads, jnp.ones(heads[0].shape[:2], bool), block_size=64)

    def maps(*heads):
        return relation_kl(*heads, jnp.ones(heads[0].shape[:2], bool), block_size=heads[0].shape[1])

    assert temporaries(streamed, 1024) <= 2.2 * temporaries(streamed, 512)
    assert temporaries(maps, 1024) >= 3.5 * temporaries(maps, 512)


def test_regrouped_heads_have_the_same_features():
    x = jnp.array(normal(0, 2, 3, 4, 6))
    grouped = regroup(x, 8)
    assert grouped.shape == (2, 3, 8, 3)
    np.testing.assert_array_equal(grouped.reshape(2, 3, 24), x.reshape(2, 3, 24))
    with pytest.raises(ValueError, match="expected a divisor of the width 24, got 7"):
        regroup(x, 7)


def test_microbatches_add_up():
    student = [jnp.array(normal(seed, BATCH, SEQ, HEADS, 4)) for seed in (3, 4)]
    teacher = [jnp.array(x) for x in _teacher()]
    count = jnp.float32(LENGTHS.sum())
    part = jax.jit(functools.partial(relation_kl, count=count))
    whole = part(*student, *teacher, jnp.array(PADDED))
    halves = [
        part(*(x[rows] for x in (*student, *teacher)), jnp.array(PADDED[rows]))
        for rows in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(sum(halves), whole, rtol=1e-6)
