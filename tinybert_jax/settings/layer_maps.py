"""Which layers of the student and the teacher a term compares."""

from collections.abc import Sequence
from typing import Literal

from tinybert_jax.settings.section import PositiveInt

LayerMap = (
    Literal["uniform", "top", "bottom", "last", "skip"]
    | tuple[PositiveInt, ...]
    | tuple[tuple[PositiveInt, PositiveInt], ...]
)
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
