"""Projection of student states to the teacher's width; starting a student from teacher weights."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.models.linear import affine_in
from tinybert_jax.settings.sizes import Side, Sizes, depths, side_of


def check_same_vocabulary(student: Sizes, teacher: Sizes) -> None:
    """Raises ValueError where the vocabulary sizes differ."""
    is_two_sided = depths(student)[1] and depths(teacher)[1]
    sides: tuple[Side, ...] = ("encoder", "decoder") if is_two_sided else ("encoder",)
    for side in sides:
        own, theirs = side_of(student, side), side_of(teacher, side)
        if own.vocab_size != theirs.vocab_size:
            raise ValueError(
                f"vocabulary: expected the same for both, got {own.vocab_size} entries for the "
                f"student and {theirs.vocab_size} for the teacher; use the teacher's tokenizer"
            )


def init_projection(
    key: jax.Array, student_dim: int, teacher_dim: int, num_projections: int
) -> dict[str, jax.Array]:
    """kernel [n, student_dim, teacher_dim] and bias [n, teacher_dim]; n = 1: shared by all layers.

    Equal widths start with the identity, others with N(0, 1/student_dim). As hidden states are
    outputs of a LayerNorm, this keeps their scale.
    """
    if student_dim == teacher_dim:
        kernel = jnp.eye(student_dim)
    else:
        kernel = jax.random.normal(key, (student_dim, teacher_dim)) * student_dim**-0.5
    return {
        "kernel": jnp.tile(kernel[None], (num_projections, 1, 1)),
        "bias": jnp.zeros((num_projections, teacher_dim)),
    }


def project(projection: Mapping[str, jax.Array], entry: int, hidden: jax.Array) -> jax.Array:
    """H·W + c of hidden state number `entry`: [batch, seq, student_dim] to [.., teacher_dim].

    Entry -1 is the last. The projection may have a leading axis [shards] of `copy_per_shard`.
    """
    index = entry if projection["kernel"].shape[-3] > 1 else 0
    kernel, bias = (projection[name] for name in ("kernel", "bias"))
    if kernel.ndim == 3:
        return affine_in(hidden.dtype, hidden, kernel[index], bias[index])
    rows = hidden.reshape(len(kernel), -1, *hidden.shape[1:])
    by_shard = jax.vmap(functools.partial(affine_in, hidden.dtype))
    return by_shard(rows, kernel[:, index], bias[:, index]).reshape(*hidden.shape[:-1], -1)


# The trained parameters of each side's projection, beside the student's.
PROJECTIONS: dict[Side, str] = {"encoder": "projection", "decoder": "decoder_projection"}

_TABLES = ("word", "position", "token_type")


def principal_directions(table: np.ndarray, num_directions: int) -> np.ndarray:
    """Orthonormal [dim, num_directions]: the top eigenvectors of tableᵀ·table, with fixed signs."""
    gram = table.astype(np.float64).T @ table.astype(np.float64)
    _, vectors = np.linalg.eigh(gram)
    top = vectors[:, ::-1][:, :num_directions]
    signs = np.sign(top[np.abs(top).argmax(0), np.arange(num_directions)])
    return (top * signs).astype(np.float32)


def start_from_teacher_embeddings(
    student: Mapping[str, Any], teacher: Mapping[str, Any]
) -> tuple[dict[str, Any], np.ndarray]:
    """(encoder parameters, directions): a student with the teacher's projected embedding tables.

    The tables are projected on the principal directions [teacher_dim, student_dim] of the teacher's
    word table. The transpose of the directions is the projection back. The layers of `student` do
    not change. Raises ValueError where a table of the teacher has too few rows.
    """
    directions = principal_directions(
        np.asarray(teacher["embeddings"]["word"]["embedding"]),
        student["embeddings"]["word"]["embedding"].shape[1],
    )
    return {**student, "embeddings": project_tables(student, teacher, directions)}, directions


def project_tables(
    student: Mapping[str, Any], teacher: Mapping[str, Any], directions: np.ndarray
) -> dict[str, Any]:
    """The student's embeddings with the teacher's tables along the directions; see above."""
    embeddings = dict(student["embeddings"])
    for name in (name for name in _TABLES if name in embeddings and name in teacher["embeddings"]):
        table = np.asarray(teacher["embeddings"][name]["embedding"])
        rows = embeddings[name]["embedding"].shape[0]
        if len(table) < rows:
            raise ValueError(
                f"student.init: expected at most {len(table)} rows in the student's {name} table "
                f"(the teacher's), got {rows}; use a smaller table or init random"
            )
        embeddings[name] = {"embedding": table[:rows] @ directions}
    return embeddings


def start_from_teacher_layers(
    student: Mapping[str, Any], teacher: Mapping[str, Any], layers: Sequence[int]
) -> dict[str, Any]:
    """The teacher's encoder parameters with only the given layers, counted from 1.

    `layers` has one teacher layer per student layer. Both models have the same width and heads;
    tables are cut to the student's number of rows.
    """
    chosen = np.array(layers) - 1

    def copied(path: tuple, initial: Any, given: Any) -> np.ndarray:
        rows = np.asarray(given)
        kept = rows[chosen] if path[0].key == "layers" else rows[: len(initial)]
        assert kept.shape == initial.shape, f"{path}: the checks before a run allow this shape"
        return kept

    kept = {name: teacher[name] for name in student}  # a student may have no pooler
    return jax.tree.map_with_path(copied, dict(student), kept)


def start_from_teacher_sides(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    encoder_layers: Sequence[int],
    decoder_layers: Sequence[int],
) -> dict[str, Any]:
    """`start_from_teacher_layers` of both sides of an encoder-decoder; all other weights too."""
    layers = {"encoder": encoder_layers, "decoder": decoder_layers}
    kept = {name: own for name, own in student.items() if name not in layers}
    return {
        **jax.tree.map(lambda _, given: np.asarray(given), kept, {n: teacher[n] for n in kept}),
        **{
            side: start_from_teacher_layers(student[side], teacher[side], chosen)
            for side, chosen in layers.items()
        },
    }
