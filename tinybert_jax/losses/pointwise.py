"""Training losses: pure functions of arrays, each with its mask inside.

This module owns the formulas, their normalisation and their numerics (everything in fp32, whatever
the dtype of the inputs). It does not know modules, configs or meshes. Summing over layers, weights
of terms, the temperature² factor and stopping the teacher's gradient are the caller's.

Every loss is `total / number of valid units` and takes `count`, the denominator to use in place of
the local number of valid units: with the count of the whole batch, the losses (and gradients) of
its microbatches add up to those of the batch. A batch without any valid unit has loss 0, not NaN.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

IGNORED_LABEL = -100

Normalisation = Literal["paper_code", "valid_only"]
Reduction = Literal["sum", "mean_classes"]


def softmax_cross_entropy(
    logits: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    weights: Float[Array, " batch"],
    *,
    label_smoothing: float = 0.0,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Cross-entropy with hard labels, mean over weighted examples (unit: example).

    `label_smoothing` mixes the label with the uniform distribution (Szegedy et al. 2016, as in
    `torch.nn.CrossEntropyLoss`). The label of an example of weight 0 is never read; any other must
    lie in 0..classes-1.
    """
    logits = logits.astype(jnp.float32)
    nll = _negative_log_likelihood(logits, jnp.where(weights != 0, labels, 0))
    uniform_nll = jax.nn.logsumexp(logits, axis=-1) - logits.mean(-1)
    per_example = (1 - label_smoothing) * nll + label_smoothing * uniform_nll
    return _weighted_mean(per_example, weights, count)


def masked_lm(
    logits: Float[Array, "n vocab"],
    labels: Int[Array, " n"],
    *,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Masked-LM cross-entropy, mean over the labels that are not -100 (unit: label).

    Takes flat positions, so that the LM head may be run on gathered ones only. Source: Devlin et
    al. 2019, section 3.1; -100 is the ignored label of PyTorch and Hugging Face.
    """
    is_label = labels != IGNORED_LABEL
    nll = _negative_log_likelihood(logits.astype(jnp.float32), jnp.where(is_label, labels, 0))
    return _weighted_mean(nll, is_label.astype(jnp.float32), count)


def soft_cross_entropy(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    weights: Float[Array, " batch"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    reduction: Reduction,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Prediction-layer distillation -softmax(z_T/t)·log_softmax(z_S/t) (unit: example).

    `reduction` over classes: "sum" is the usual cross-entropy (TinyBERT equation 10),
    "mean_classes" the released code's, smaller by the number of classes. No temperature² factor.
    """
    teacher_probs = jax.nn.softmax(teacher_logits.astype(jnp.float32) / temperature)
    student_log_probs = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    per_class = -teacher_probs * student_log_probs
    return _weighted_mean(_over_classes(per_class, reduction), weights, count)


def kl(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    weights: Float[Array, " batch"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    reduction: Reduction = "sum",
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """KL(p_T ‖ p_S) at the given temperature, mean over weighted examples (unit: example).

    No temperature² factor (Hinton et al. 2015, section 2): the caller scales. `reduction` as in
    `soft_cross_entropy`.
    """
    teacher_log_probs = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    student_log_probs = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    per_class = jnp.exp(teacher_log_probs) * (teacher_log_probs - student_log_probs)
    return _weighted_mean(_over_classes(per_class, reduction), weights, count)


def sigmoid_cross_entropy(
    logits: Float[Array, "units classes"],
    labels: Int[Array, "units classes"],
    weights: Float[Array, " units"],
    *,
    label_smoothing: float = 0.0,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Binary cross-entropy of each class, mean over classes and weighted units.

    `labels` are 1 for the classes that a unit has, else 0. `label_smoothing` moves both towards
    1/2. As `torch.nn.BCEWithLogitsLoss`.
    """
    wide = logits.astype(jnp.float32)
    wanted = (1 - label_smoothing) * labels.astype(jnp.float32) + label_smoothing / 2
    per_class = -(wanted * jax.nn.log_sigmoid(wide) + (1 - wanted) * jax.nn.log_sigmoid(-wide))
    return _weighted_mean(per_class.mean(-1), weights, count)


def soft_sigmoid_cross_entropy(
    student_logits: Float[Array, "units classes"],
    teacher_logits: Float[Array, "units classes"],
    weights: Float[Array, " units"],
    *,
    divergence: Literal["cross_entropy", "kl"] = "cross_entropy",
    temperature: float | Float[Array, ""] = 1.0,
    reduction: Reduction = "sum",
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Binary cross-entropy with a teacher's probabilities, each class on its own (unit: unit).

    At the given temperature, without its square as a factor; `reduction` over classes as in
    `soft_cross_entropy`. "kl" subtracts the teacher's entropy, which moves no gradient.
    """
    theirs = teacher_logits.astype(jnp.float32) / temperature
    ours = student_logits.astype(jnp.float32) / temperature

    def each(teacher: Array, student: Array) -> Array:
        goal = jax.nn.log_sigmoid(student)
        if divergence == "kl":
            goal = goal - jax.nn.log_sigmoid(teacher)
        return -jax.nn.sigmoid(teacher) * goal

    per_class = each(theirs, ours) + each(-theirs, -ours)
    return _weighted_mean(_over_classes(per_class, reduction), weights, count)


def logits_mse(
    student_logits: Float[Array, "batch k"],
    target: Float[Array, "batch k"],
    weights: Float[Array, " batch"],
    *,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Squared error to teacher logits or gold scores, mean over k and weighted examples.

    Unit: example. Source: regression tasks (STS-B), teacher logits in the TinyBERT paper, gold
    scores in its released code.
    """
    difference = student_logits.astype(jnp.float32) - target.astype(jnp.float32)
    return _weighted_mean(jnp.square(difference).mean(-1), weights, count)


def hidden_mse(
    student: Float[Array, "batch seq dim"],
    teacher: Float[Array, "batch seq dim"],
    mask: Bool[Array, "batch seq"],
    *,
    normalisation: Normalisation,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Mean squared error between projected student and teacher hidden states (unit: token).

    "valid_only" is the mean over real tokens and dim, so that padding neither counts nor dilutes;
    "paper_code" the plain mean over everything, whose unit count is batch·seq. Source: TinyBERT
    equations 8 and 9.
    """
    if normalisation == "valid_only":
        num_tokens = mask.sum(dtype=jnp.float32)
    elif normalisation == "paper_code":
        mask, num_tokens = jnp.ones_like(mask), jnp.float32(mask.size)
    else:
        raise ValueError(unknown_normalisation(normalisation))
    wide = student.astype(jnp.float32), teacher.astype(jnp.float32)
    return mean_over(_squared_distance(*wide, mask), num_tokens, count)


@jax.custom_vjp
def _squared_distance(student: Array, teacher: Array, mask: Array) -> Array:
    """Mean over dim of (student − teacher)², summed over the tokens [batch, seq] of the mask."""
    return _squared_distance_forward(student, teacher, mask)[0]


def _squared_distance_forward(student: Array, teacher: Array, mask: Array) -> tuple[Array, Array]:
    difference = jnp.where(mask[:, :, None], student - teacher, 0)
    # XLA:CPU would make it anew, from all that it can be fused with, wherever it is read.
    difference = jax.lax.platform_dependent(
        difference, cpu=jax.lax.optimization_barrier, default=lambda x: x
    )
    return jnp.square(difference).mean(-1).sum(), difference


def _squared_distance_backward(difference: Array, slope: Array) -> tuple[Array, Array, None]:
    by_student = (2 / difference.shape[-1]) * slope * difference
    return by_student, -by_student, None


_squared_distance.defvjp(_squared_distance_forward, _squared_distance_backward)


def cosine(
    student: Float[Array, "batch seq dim"],
    teacher: Float[Array, "batch seq dim"],
    mask: Bool[Array, "batch seq"],
    *,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """1 − cos of the angle between two hidden states, mean over real tokens (unit: token).

    Source: DistilBERT (arXiv 1910.01108, section 2).
    """
    shown = mask[:, :, None]
    ours, theirs = (_unit(jnp.where(shown, x.astype(jnp.float32), 0)) for x in (student, teacher))
    per_token = 1 - jnp.sum(ours * theirs, axis=-1)
    return mean_over(jnp.sum(per_token * mask), mask.sum(dtype=jnp.float32), count)


def normalised_distance(
    student: Float[Array, "batch dim"],
    teacher: Float[Array, "batch dim"],
    weights: Float[Array, " batch"],
    *,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """‖s/‖s‖ − t/‖t‖‖², mean over dim and weighted examples (unit: example).

    Source: PKD (arXiv 1908.09355, equation 7; the mean over dim is its code's).
    """
    difference = _unit(student.astype(jnp.float32)) - _unit(teacher.astype(jnp.float32))
    return _weighted_mean(jnp.square(difference).mean(-1), weights, count)


def _unit(x: Array) -> Array:
    """Vectors of length 1; of length 0 where they have next to none, with a finite gradient."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-16))


def _over_classes(per_class: Array, reduction: str) -> Array:
    if reduction == "sum":
        return per_class.sum(-1)
    if reduction == "mean_classes":
        return per_class.mean(-1)
    raise ValueError(
        f"reduction: expected 'sum' or 'mean_classes', got {reduction!r}; use 'sum' unless the "
        "released code is to be reproduced"
    )


def _negative_log_likelihood(logits: Array, labels: Array) -> Array:
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _weighted_mean(per_unit: Array, weights: Array, count: Array | None) -> Array:
    weights = weights.astype(jnp.float32)
    return mean_over(jnp.sum(per_unit * weights), weights.sum(), count)


def mean_over(total: Array, num_units: Array, count: Array | None) -> Array:
    """`total` by `count`, or by the local number of units where there is none; 0 of nothing."""
    denominator = num_units if count is None else count.astype(jnp.float32)
    return total / jnp.where(denominator == 0, 1, denominator)


def unknown_normalisation(normalisation: object) -> str:
    """The message for a normalisation that there is not."""
    return (
        f"normalisation: expected 'paper_code' or 'valid_only', got {normalisation!r}; use "
        "'valid_only' unless the released code is to be reproduced"
    )
