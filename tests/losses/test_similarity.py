"""Values and gradients of `losses.similarity` against float64 PyTorch written from the formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.losses.similarity import cosent, info_nce, similarity_kl

torch = pytest.importorskip("torch")
from reference import assert_float32_of_bfloat16, assert_same, normal, value_and_grads

F = torch.nn.functional
WEIGHTS = np.array([1, 1, 0, 1, 1], np.float32)
REAL = [0, 1, 3, 4]
T = 0.2


@pytest.mark.parametrize("num_texts", [2, 3])
def test_info_nce_is_cross_entropy_over_the_partners(num_texts):
    def reference(vectors):
        units = F.normalize(vectors[REAL], dim=-1)
        others = torch.cat([units[:, place] for place in range(1, num_texts)])
        return F.cross_entropy(units[:, 0] @ others.T / T, torch.arange(len(REAL)))

    loss = functools.partial(info_nce, weights=jnp.array(WEIGHTS), temperature=T)
    assert_same(loss, reference, normal(0, 5, num_texts, 6))


def test_similarity_kl_is_that_of_the_other_texts():
    def reference(student, teacher):
        others = ~torch.eye(len(REAL), dtype=torch.bool)
        learnt, taught = (
            (units @ units.T / T)[others].reshape(len(REAL), -1)
            for units in (F.normalize(own[REAL], dim=-1) for own in (student, teacher))
        )
        return F.kl_div(
            learnt.log_softmax(-1), taught.log_softmax(-1), log_target=True, reduction="batchmean"
        )

    def loss(student, teacher):
        return similarity_kl(student, teacher, jnp.array(WEIGHTS), temperature=T)

    assert_same(loss, reference, normal(1, 5, 4), normal(2, 5, 6))
    same = normal(3, 5, 4)
    assert abs(loss(jnp.array(same), jnp.array(3 * same))) < 1e-6  # only directions count


def test_cosent_reads_the_order_of_the_scores():
    scores = np.array([3, 1, 9, 2, 2], np.float32)

    def reference(vectors):
        cosines = F.cosine_similarity(vectors[REAL, 0], vectors[REAL, 1], dim=-1) / T
        known = torch.tensor(scores[REAL])
        pairs = [cosines[j] - cosines[i] for i in range(4) for j in range(4) if known[i] > known[j]]
        return torch.logsumexp(torch.stack([*pairs, torch.zeros_like(pairs[0])]), 0)

    def loss(vectors, scores=scores):
        return cosent(vectors, jnp.array(scores), jnp.array(WEIGHTS), temperature=T)

    vectors = normal(4, 5, 2, 6)
    assert_same(loss, reference, vectors)
    squared = functools.partial(loss, scores=scores**2)
    np.testing.assert_array_equal(loss(jnp.array(vectors)), squared(jnp.array(vectors)))


LOSSES = {
    "info_nce": lambda x, w: info_nce(x, w, temperature=T),
    "similarity_kl": lambda x, w: similarity_kl(x[:, 0], x[:, 1], w, temperature=T),
    "cosent": lambda x, w: cosent(x, jnp.arange(5.0), w, temperature=T),
}


@pytest.mark.parametrize("name", LOSSES)
def test_filler_is_compared_with_nothing(name):
    """Whatever its vectors are, also zeros, which have no direction."""
    x = normal(5, 5, 2, 6)
    others = x.copy()
    others[2] = 0.0
    of_x, of_others = (
        value_and_grads(lambda v: LOSSES[name](v, jnp.array(WEIGHTS)), own) for own in (x, others)
    )
    for one, other in zip(of_x, of_others, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not of_x[1][2].any()
    nothing = value_and_grads(lambda v: LOSSES[name](v, jnp.zeros(5)), x)
    assert not any(own.any() for own in nothing)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_vectors_are_compared_in_float32(name):
    vectors = jnp.array(normal(6, 5, 2, 6), jnp.bfloat16)
    assert_float32_of_bfloat16(lambda x: LOSSES[name](x, jnp.array(WEIGHTS)), [vectors])


def test_a_count_of_the_whole_batch_takes_the_place_of_the_number_of_units():
    x, weights = jnp.array(normal(7, 5, 2, 6)), jnp.array(WEIGHTS)
    for loss in (info_nce, lambda x, w, **o: similarity_kl(x[:, 0], x[:, 1], w, **o)):
        whole = loss(x, weights, temperature=T)
        part = jax.jit(lambda x, c, loss=loss: loss(x, weights, temperature=T, count=c))
        np.testing.assert_allclose(part(x, jnp.float32(8)), whole * 4 / 8, rtol=1e-6)
