"""The three forms of a task's scores, [units, classes] each: how labels and a teacher are matched.

A unit is whatever the task scores: an example, a word. `weights` [units] is 0 for units that are
filler. Every loss is a sum over units divided by `count`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from jaxtyping import Array, Float

from tinybert_jax.losses.pointwise import (
    Reduction,
    kl,
    logits_mse,
    sigmoid_cross_entropy,
    soft_cross_entropy,
    soft_sigmoid_cross_entropy,
    softmax_cross_entropy,
)

Divergence = Literal["cross_entropy", "kl"]


class Form(NamedTuple):
    """`gold(logits, labels, weights, …)` and `soft(student's logits, teacher's logits, …)`."""

    gold: Callable[..., Array]
    soft: Callable[..., Array]
    has_temperature: bool = True  # whether `soft` takes temperature, divergence and reduction


def _square_gold(
    logits: Float[Array, "units 1"],
    labels: Float[Array, " units"],
    weights: Float[Array, " units"],
    *,
    label_smoothing: float = 0.0,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Squared error of the one number of each unit; there is no class to smooth towards."""
    return logits_mse(logits, labels[:, None], weights, count=count)


def _softmax_soft(
    student_logits: Float[Array, "units classes"],
    teacher_logits: Float[Array, "units classes"],
    weights: Float[Array, " units"],
    *,
    divergence: Divergence = "cross_entropy",
    temperature: float | Float[Array, ""] = 1.0,
    reduction: Reduction = "sum",
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    loss = kl if divergence == "kl" else soft_cross_entropy
    return loss(
        student_logits,
        teacher_logits,
        weights,
        temperature=temperature,
        reduction=reduction,
        count=count,
    )


FORMS: dict[str, Form] = {
    "softmax": Form(softmax_cross_entropy, _softmax_soft),  # one class of a unit
    "sigmoid": Form(sigmoid_cross_entropy, soft_sigmoid_cross_entropy),  # each class, or not
    "square": Form(_square_gold, logits_mse, has_temperature=False),  # a number
}
