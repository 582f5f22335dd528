"""What distillation knows of two models: the layer map, what has to fit, how a student starts."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.sections import ModelConfig

LayerMap = tuple[int, ...]  # for each student layer 1..M the teacher layer 1..N it learns from


def make_layer_map(kind: str | Sequence[int], num_student: int, num_teacher: int) -> LayerMap:
    """uniform: i·N/M; top: the last M; bottom: the first M; or the teacher layers themselves.

    The embedding output (entry 0) always maps to the teacher's. Source: arXiv 1909.10351, 3.1.
    Raises ValueError where the depths do not fit.
    """
    if num_student > num_teacher:
        raise ValueError(
            f"layer_map: expected a student no deeper than its teacher, got {num_student} layers "
            f"for {num_teacher}; lower student.num_hidden_layers"
        )
    if not isinstance(kind, str):
        return _explicit(tuple(kind), num_student, num_teacher)
    if kind == "uniform":
        if num_teacher % num_student:
            raise ValueError(
                f"layer_map: uniform needs a teacher depth that is a multiple of the student's, "
                f"got {num_teacher} and {num_student}; use top, bottom or a list of "
                f"{num_student} teacher layers"
            )
        ratio = num_teacher // num_student
        return tuple(ratio * (i + 1) for i in range(num_student))
    first = {"top": num_teacher - num_student, "bottom": 0}[kind]
    return tuple(first + i + 1 for i in range(num_student))


def check_fit(student: ModelConfig, teacher: ModelConfig, *, needs_heads: bool) -> None:
    """Raises ValueError naming both values where a student cannot learn from a teacher."""
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"vocabulary: expected the same for both, got {student.vocab_size} entries for the "
            f"student and {teacher.vocab_size} for the teacher; use the teacher's tokenizer"
        )
    if needs_heads and student.num_attention_heads != teacher.num_attention_heads:
        raise ValueError(
            f"attention heads: expected as many in both, got {student.num_attention_heads} for "
            f"the student and {teacher.num_attention_heads} for the teacher; set "
            f"student.num_attention_heads={teacher.num_attention_heads} (with a hidden_size that "
            f"is a multiple of it) or distillation.attention_weight=0"
        )


def init_projection(
    key: jax.Array, student_dim: int, teacher_dim: int, num_projections: int
) -> dict[str, jax.Array]:
    """kernel [n, student_dim, teacher_dim] and bias [n, teacher_dim]; n = 1 is the shared one.

    Starts as the identity between equal widths, else as N(0, 1/student_dim): the widths of
    both models' LayerNorms make that keep the scale.
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
    """H·W + c of one hidden entry: [batch, seq, student_dim] to [batch, seq, teacher_dim]."""
    index = entry if projection["kernel"].shape[0] > 1 else 0
    kernel, bias = projection["kernel"][index], projection["bias"][index]
    mapped = jnp.einsum("bts,sd->btd", hidden, kernel.astype(hidden.dtype))
    return mapped + bias[None, None].astype(hidden.dtype)


def principal_directions(table: np.ndarray, num_directions: int) -> np.ndarray:
    """Orthonormal [dim, num_directions]: the top eigenvectors of tableᵀ·table, signs fixed."""
    gram = table.astype(np.float64).T @ table.astype(np.float64)
    _, vectors = np.linalg.eigh(gram)
    top = vectors[:, ::-1][:, :num_directions]
    signs = np.sign(top[np.abs(top).argmax(0), np.arange(num_directions)])
    return (top * signs).astype(np.float32)


def start_from_teacher_embeddings(
    student: Mapping[str, Any], teacher: Mapping[str, Any]
) -> tuple[dict[str, Any], np.ndarray]:
    """Encoder parameters whose tables are the teacher's on its word table's principal directions.

    Also returns the directions [teacher_dim, student_dim]; their transpose is the projection that
    undoes the reduction. Layers keep the student's own start.
    """
    directions = principal_directions(
        np.asarray(teacher["embeddings"]["word"]["embedding"]),
        student["embeddings"]["word"]["embedding"].shape[1],
    )
    embeddings = dict(student["embeddings"])
    for name in ("word", "position", "token_type"):
        table = np.asarray(teacher["embeddings"][name]["embedding"])
        rows = embeddings[name]["embedding"].shape[0]
        if len(table) < rows:
            raise ValueError(
                f"student.init: expected at most {len(table)} rows in the student's {name} table "
                f"(the teacher's), got {rows}"
            )
        embeddings[name] = {"embedding": table[:rows] @ directions}
    return {**student, "embeddings": embeddings}, directions


def _explicit(chosen: LayerMap, num_student: int, num_teacher: int) -> LayerMap:
    if len(chosen) != num_student or not all(1 <= i <= num_teacher for i in chosen):
        raise ValueError(
            f"layer_map: expected {num_student} teacher layers from 1 to {num_teacher}, "
            f"got {list(chosen)}"
        )
    return chosen
