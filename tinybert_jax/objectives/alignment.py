"""What distillation knows of two models: the layer map, what has to fit, how a student starts."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.config.models import ModelConfig
from tinybert_jax.models.linear import affine

LayerPairs = tuple[tuple[int, int], ...]  # (student's layer 1..M, the teacher's 1..N)


def make_layer_pairs(
    kind: str | Sequence[int] | Sequence[tuple[int, int]], num_student: int, num_teacher: int
) -> LayerPairs:
    """Which of the teacher's layers a student's learns from.

    uniform: i·N/M; skip: uniform without the last (PKD, arXiv 1908.09355, 3); top: the last M;
    bottom: the first M; last: of both the last alone; a teacher layer for each of the student's; or
    pairs, where a layer may occur often. Source: arXiv 1909.10351, 3.1. Raises ValueError where
    the depths do not fit.
    """
    if kind == "last":
        return ((num_student, num_teacher),)
    pairs = [] if isinstance(kind, str) else [pair for pair in kind if not isinstance(pair, int)]
    if pairs:
        return _explicit_pairs(pairs, num_student, num_teacher)
    if num_student > num_teacher:
        raise ValueError(
            f"expected a student no deeper than its teacher, got {num_student} layers "
            f"for {num_teacher}; lower its num_hidden_layers"
        )
    if not isinstance(kind, str):
        layers = tuple(layer for layer in kind if isinstance(layer, int))
        return tuple(enumerate(_explicit(layers, num_student, num_teacher), start=1))
    if kind == "skip":
        if num_student < 2:
            raise ValueError(
                "expected a student of two layers or more for skip, got one; set it to last"
            )
        return make_layer_pairs("uniform", num_student, num_teacher)[:-1]
    if kind == "uniform":
        if num_teacher % num_student:
            raise ValueError(
                f"uniform needs a teacher depth that is a multiple of the student's, "
                f"got {num_teacher} and {num_student}; use top, bottom or a list of "
                f"{num_student} teacher layers"
            )
        ratio = num_teacher // num_student
        return tuple((i, ratio * i) for i in range(1, num_student + 1))
    first = {"top": num_teacher - num_student, "bottom": 0}[kind]
    return tuple((i, first + i) for i in range(1, num_student + 1))


def check_same_vocabulary(student: ModelConfig, teacher: ModelConfig) -> None:
    """Raises ValueError naming both sizes where they differ."""
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"vocabulary: expected the same for both, got {student.vocab_size} entries for the "
            f"student and {teacher.vocab_size} for the teacher; use the teacher's tokenizer"
        )


def check_heads(
    student: ModelConfig, teacher: ModelConfig, head_map: Sequence[tuple[int, int]] | None
) -> None:
    """Raises ValueError where heads, all or the map's, cannot be compared one by one."""
    ours, theirs = student.num_attention_heads, teacher.num_attention_heads
    if head_map is None and ours != theirs:
        raise ValueError(
            f"attention heads: expected as many in both, got {ours} for the student and {theirs} "
            f"for the teacher; give it num_attention_heads {theirs} (with a hidden_size that "
            "is a multiple of it), or the term heads or a head_map"
        )
    for one, other in head_map or ():
        if one > ours or other > theirs:
            raise ValueError(
                f"head_map: expected pairs of a student's head from 1 to {ours} and a teacher's "
                f"from 1 to {theirs}, got {[one, other]}; leave that pair out"
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
    kernel, bias = (projection[name][index].astype(hidden.dtype) for name in ("kernel", "bias"))
    return affine(hidden, kernel, bias)


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


def start_from_teacher_layers(
    student: Mapping[str, Any], teacher: Mapping[str, Any], layers: Sequence[int]
) -> dict[str, Any]:
    """The teacher's encoder parameters with these of its layers, from 1, one for each of `student`.

    Both are as wide, with as many heads; tables are cut to the student's rows.
    """
    chosen = np.array(layers) - 1

    def copied(path: tuple, own: Any, given: Any) -> np.ndarray:
        rows = np.asarray(given)
        kept = rows[chosen] if path[0].key == "layers" else rows[: len(own)]
        assert kept.shape == own.shape, f"{path}: checked before a run"
        return kept

    return jax.tree.map_with_path(copied, dict(student), dict(teacher))


def _explicit_pairs(
    pairs: Sequence[tuple[int, int]], num_student: int, num_teacher: int
) -> LayerPairs:
    if not all(1 <= i <= num_student and 1 <= g <= num_teacher for i, g in pairs):
        raise ValueError(
            f"expected pairs of a student's layer from 1 to {num_student} and a "
            f"teacher's from 1 to {num_teacher}, got {[list(pair) for pair in pairs]}"
        )
    return tuple(pairs)


def _explicit(chosen: tuple[int, ...], num_student: int, num_teacher: int) -> tuple[int, ...]:
    if len(chosen) != num_student or not all(1 <= i <= num_teacher for i in chosen):
        raise ValueError(
            f"expected {num_student} teacher layers from 1 to {num_teacher}, got {list(chosen)}; "
            "name one for each of the student's, counted from 1"
        )
    return chosen
