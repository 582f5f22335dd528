"""The losses for three forms of task output: one class, yes-or-no outputs, or a number.

A unit is the item that a task scores, such as an example or a word; logits are [units, classes].
`weights` [units] is 0 for padding. Every loss is a weighted sum over units divided by `count`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from jaxtyping import Array, Float, Int

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
    """The losses of one form of output: `label_loss` reads labels, `teacher_loss` a teacher."""

    label_loss: Callable[..., Array]  # (logits, labels, weights, …)
    teacher_loss: Callable[..., Array]  # (student_logits, teacher_logits, weights, …)
    has_temperature: bool = True  # `teacher_loss` takes temperature, divergence and reduction
    # (logits [units, classes], labels) -> bool [units]: whether a model's answers are right
    is_right: Callable[[Array, Array], Array] | None = None


def _square_label_loss(
    logits: Float[Array, "units 1"],
    labels: Float[Array, " units"],
    weights: Float[Array, " units"],
    *,
    label_smoothing: float = 0.0,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Squared error of one number per unit; `label_smoothing` has no effect without classes."""
    return logits_mse(logits, labels[:, None], weights, count=count)


def _softmax_teacher_loss(
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


def _is_highest(logits: Float[Array, "units classes"], labels: Int[Array, " units"]) -> Array:
    return logits.argmax(-1) == labels


def _are_signs(logits: Float[Array, "units classes"], labels: Int[Array, "units classes"]) -> Array:
    return ((logits > 0) == (labels > 0)).all(-1)


FORMS: dict[str, Form] = {
    # one class per unit
    "softmax": Form(softmax_cross_entropy, _softmax_teacher_loss, is_right=_is_highest),
    # any classes
    "sigmoid": Form(sigmoid_cross_entropy, soft_sigmoid_cross_entropy, is_right=_are_signs),
    "square": Form(_square_label_loss, logits_mse, has_temperature=False),  # one number per unit
}
