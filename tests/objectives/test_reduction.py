"""Narrower students from a teacher's layers: what is exact is exact, what is cut is cut best."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.models.heads import make_encoder
from tinybert_jax.models.inputs import Text
from tinybert_jax.objectives.reduction import (
    reduction_directions,
    refit_norms,
    start_from_reduced_teacher,
)
from tinybert_jax.settings.sizes import ModelConfig

HEADS, TEACHER, STUDENT = 2, 16, 8


def _sizes(width, num_layers, inner):
    return ModelConfig(
        vocab_size=60,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        intermediate_size=inner,
        max_position_embeddings=12,
    )


def _encoder(width, num_layers, inner, seed, spread=1.0):
    apply, init = make_encoder(_sizes(width, num_layers, inner))
    params = jax.tree.map(np.array, init(jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf += spread * 0.1 * rng.normal(size=leaf.shape) * (path[-1].key != "embedding")
    return apply, params


def _hidden(apply, params):
    ids = jnp.asarray(np.random.default_rng(3).integers(5, 60, (24, 12)), jnp.int32)
    output = apply(params, Text(ids, 0 * ids), jnp.ones(ids.shape, bool))
    return [np.asarray(own).reshape(-1, own.shape[-1]) for own in output.hidden]


def test_the_mean_that_a_norm_subtracts_is_the_direction_that_matters_least():
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(500, 6)) * np.array([5, 4, 3, 2, 1, 0.5])]
    turned = reduction_directions(states, 4)
    np.testing.assert_allclose(turned.T @ turned, np.eye(4), atol=1e-6)
    # The same subspace as that of the four principal directions: the first four axes.
    np.testing.assert_allclose((turned @ turned.T).diagonal()[:4], 1.0, atol=0.02)
    removed = turned @ np.full(4, 0.5)
    assert abs(removed[3]) > 0.99
    assert reduction_directions(states, 1).shape == (6, 1)


def test_scores_and_context_are_the_teachers_where_the_heads_keep_their_rank():
    """Heads of rank 4 in a student whose heads have 4 dimensions: nothing is cut."""
    _, teacher = _encoder(TEACHER, 2, 32, 0)
    attention = teacher["layers"]["attention"]
    for name in ("query", "key", "value"):  # rank 4 of 8, with the bias
        whole = np.concatenate([attention[name]["kernel"], attention[name]["bias"][:, None]], 1)
        for layer in whole:
            for head in np.split(layer, HEADS, axis=1):
                u, s, v = np.linalg.svd(head, full_matrices=False)
                head[:] = (u[:, :4] * s[:4]) @ v[:4]
        attention[name]["kernel"], attention[name]["bias"] = whole[:, :-1], whole[:, -1]
    rng = np.random.default_rng(1)
    directions = np.linalg.qr(rng.normal(size=(TEACHER, STUDENT)))[0].astype(np.float32)
    ours = rng.normal(size=(30, STUDENT))
    states = [ours @ directions.T] * 3
    _, student = _encoder(STUDENT, 2, 16, 1)
    got = start_from_reduced_teacher(student, teacher, [1, 2], states, directions, HEADS)
    for layer in range(2):
        given, own = (
            jax.tree.map(lambda leaf: leaf[layer], tree["layers"]["attention"])  # noqa: B023
            for tree in (teacher, got)
        )
        for name, one, other in (
            ("scores", _scores(given, states[0]), _scores(own, ours)),
            ("context", _context(given, states[0]) @ directions, _context(own, ours)),
        ):
            np.testing.assert_allclose(other, one, rtol=2e-3, atol=2e-4, err_msg=name)


def _heads(params, name, states):
    whole = states @ params[name]["kernel"] + params[name]["bias"]
    return np.stack(np.split(whole, HEADS, axis=1))


def _scores(params, states):
    query, key = _heads(params, "query", states), _heads(params, "key", states)
    return query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])


def _context(params, states):
    """The output for tokens that attend to themselves alone."""
    values = np.concatenate(list(_heads(params, "value", states)), axis=1)
    return values @ params["output"]["kernel"] + params["output"]["bias"]


def test_what_is_cut_is_less_than_by_dropping_columns():
    _, teacher = _encoder(TEACHER, 1, 32, 0)
    rng = np.random.default_rng(1)
    directions = np.linalg.qr(rng.normal(size=(TEACHER, STUDENT)))[0].astype(np.float32)
    ours = rng.normal(size=(200, STUDENT)) * np.linspace(3, 0.3, STUDENT)
    states = [ours @ directions.T] * 2
    _, student = _encoder(STUDENT, 1, 16, 1)
    got = start_from_reduced_teacher(student, teacher, [1], states, directions, HEADS)
    given, own = (
        jax.tree.map(lambda leaf: leaf[0], tree["layers"]["attention"]) for tree in (teacher, got)
    )
    wanted = _scores(given, states[0])
    query, key = _heads(given, "query", states[0]), _heads(given, "key", states[0])
    dropped = query[..., :4] @ key[..., :4].transpose(0, 2, 1) / np.sqrt(8)
    assert np.square(_scores(own, ours) - wanted).sum() < 0.5 * np.square(dropped - wanted).sum()


def test_the_neurons_kept_are_those_with_the_largest_weights():
    _, teacher = _encoder(TEACHER, 1, 32, 0)
    rng = np.random.default_rng(1)
    directions = np.linalg.qr(rng.normal(size=(TEACHER, STUDENT)))[0].astype(np.float32)
    kept = np.sort(rng.permutation(32)[:16])
    teacher["layers"]["intermediate"]["kernel"][:, :, kept] *= 10
    _, student = _encoder(STUDENT, 1, 16, 1)
    states = [rng.normal(size=(50, TEACHER))] * 2
    got = start_from_reduced_teacher(student, teacher, [1], states, directions, HEADS)
    expected = directions.T @ teacher["layers"]["intermediate"]["kernel"][0][:, kept]
    np.testing.assert_allclose(got["layers"]["intermediate"]["kernel"][0], expected, rtol=1e-4)
    expected = teacher["layers"]["output"]["kernel"][0][kept] @ directions
    np.testing.assert_allclose(got["layers"]["output"]["kernel"][0], expected, rtol=1e-4)


def test_fitted_norms_come_nearer_to_the_teacher_at_every_state():
    apply, teacher = _encoder(TEACHER, 4, 32, 0)
    student_apply, student = _encoder(STUDENT, 2, 16, 1)
    states = _hidden(apply, teacher)
    directions = reduction_directions(states, STUDENT)
    start = start_from_reduced_teacher(student, teacher, [2, 4], states, directions, HEADS)
    targets = [states[entry] @ directions for entry in (0, 2, 4)]
    fitted = refit_norms(start, lambda params: _hidden(student_apply, params), targets)
    for entry, target in enumerate(targets):
        before, after = (
            np.square(_hidden(student_apply, params)[entry] - target).mean()
            for params in (start, fitted)
        )
        random = np.square(_hidden(student_apply, student)[entry] - target).mean()
        assert after < before < random, entry
    assert jax.tree.structure(fitted) == jax.tree.structure(student)
    for path, leaf in jax.tree_util.tree_leaves_with_path(fitted):
        assert leaf.dtype == np.float32, path


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_a_norm_along_directions_keeps_the_size_of_the_states(share):
    """Of normalised states with this share of their energy in the directions."""
    from tinybert_jax.objectives.reduction import _reduce_norm

    rng = np.random.default_rng(0)
    dim, num = 64, 16
    scale = np.full(dim, 1.3)
    kept = rng.normal(size=(400, num))
    kept *= np.sqrt(share * dim) / np.linalg.norm(kept, axis=1, keepdims=True)
    directions = np.eye(dim)[:, :num]
    norm = _reduce_norm({"scale": scale, "bias": np.zeros(dim)}, directions, share)
    ours = kept / np.sqrt(np.square(kept).mean(1, keepdims=True)) * norm["scale"]
    np.testing.assert_allclose(ours, 1.3 * kept, rtol=1e-5)
