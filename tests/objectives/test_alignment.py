import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.models.heads import make_encoder
from tinybert_jax.objectives.alignment import (
    check_same_vocabulary,
    init_projection,
    principal_directions,
    project,
    start_from_teacher_embeddings,
    start_from_teacher_layers,
)
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.terms.attention import AttentionTerm


def test_fit_names_both_values():
    student = ModelConfig(num_attention_heads=8, hidden_size=64)
    with pytest.raises(ValueError, match="8 for the student and 12 for the teacher"):
        AttentionTerm(term="attention").check_fit(student, ModelConfig())
    check_same_vocabulary(student, ModelConfig())
    with pytest.raises(ValueError, match="100 entries for the student and 30522"):
        check_same_vocabulary(ModelConfig(vocab_size=100), ModelConfig())


def test_principal_directions_are_the_best_basis_of_their_size():
    """Equals the truncated SVD: no other basis of 3 directions loses less."""
    table = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    basis = principal_directions(table, 3)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-6)
    singular = np.linalg.svd(table.astype(np.float64), compute_uv=False)
    residual = table - table @ basis @ basis.T
    np.testing.assert_allclose((residual**2).sum(), (singular[3:] ** 2).sum(), rtol=1e-5)


def test_start_from_teacher_embeddings_reconstructs_what_its_directions_hold():
    def tables(width):
        rng = np.random.default_rng(width)
        names = {"word": 40, "position": 10, "token_type": 2}
        return {
            "embeddings": {n: {"embedding": rng.normal(size=(r, width))} for n, r in names.items()}
        }

    teacher, student = tables(12), tables(4)
    started, directions = start_from_teacher_embeddings(student, teacher)
    for name in ("word", "position", "token_type"):
        ours = started["embeddings"][name]["embedding"]
        theirs = teacher["embeddings"][name]["embedding"]
        np.testing.assert_allclose(ours @ directions.T, theirs @ directions @ directions.T)


def test_start_from_teacher_layers_copies_tables_and_the_layers_named():
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 16}
    deep = ModelConfig(vocab_size=30, num_hidden_layers=4, max_position_embeddings=9, **sizes)
    shallow = ModelConfig(vocab_size=30, num_hidden_layers=2, max_position_embeddings=7, **sizes)
    teacher, student = (
        make_encoder(model)[1](jax.random.key(seed)) for seed, model in enumerate((deep, shallow))
    )
    started = start_from_teacher_layers(student, teacher, [2, 4])

    def expected(path, own, given):
        return given[np.array([1, 3])] if path[0].key == "layers" else given[: len(own)]

    for ours, theirs in zip(
        jax.tree.leaves(started),
        jax.tree.leaves(jax.tree.map_with_path(expected, student, teacher)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_shared_and_per_layer_projection():
    key = jax.random.key(0)
    hidden = jax.random.normal(key, (2, 3, 4))
    shared = init_projection(key, 4, 6, 1)
    own = init_projection(key, 4, 6, 3)
    own["kernel"] = own["kernel"].at[2].multiply(2.0)
    first = project(shared, 0, hidden)
    assert jnp.array_equal(project(shared, 2, hidden), first)
    np.testing.assert_allclose(project(own, 2, hidden), 2 * first, rtol=1e-6)
    same_width = init_projection(key, 4, 4, 1)
    assert jnp.array_equal(project(same_width, 1, hidden), hidden)
