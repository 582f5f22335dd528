"""Losses that compare labels, logits or hidden states position by position.

Owns the formulas, the normalisation and the numerics (fp32, whatever the dtype of the inputs).
Knows no model, config or mesh. The caller sums over layers, weights the terms, multiplies by
temperature² and stops the teacher's gradient.

Every loss is `total / number of valid units`; the docstring of a loss names the unit. `count`, if
given, replaces the number of valid units: with the count of the whole batch, the losses and
gradients of the microbatches add up to those of the batch. A batch without a valid unit has loss
0, not NaN.
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
    `torch.nn.CrossEntropyLoss`). Labels of examples with weight 0 are never read; all other labels
    must lie in 0..classes-1.
    """
    logits = logits.astype(jnp.float32)
    nll = negative_log_likelihood(logits, jnp.where(weights != 0, labels, 0))
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

    The positions are flattened, so that the caller can run the LM head on selected positions only.
    Source: Devlin et al. 2019, section 3.1; -100 is the ignored label of PyTorch and Hugging Face.
    """
    is_label = labels != IGNORED_LABEL
    nll = negative_log_likelihood(logits.astype(jnp.float32), jnp.where(is_label, labels, 0))
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
    """Cross-entropy with the teacher's classes, −softmax(z_T/t)·log_softmax(z_S/t) (unit: example).

    `reduction` over classes: "sum" is the usual cross-entropy (TinyBERT equation 10);
    "mean_classes" divides it by the number of classes, as TinyBERT's released code does. No
    temperature² factor.
    """
    teacher_probs = jax.nn.softmax(teacher_logits.astype(jnp.float32) / temperature)
    student_log_probs = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    per_class = -teacher_probs * student_log_probs
    return _weighted_mean(_reduce_classes(per_class, reduction), weights, count)


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

    The caller multiplies by the temperature² factor (Hinton et al. 2015, section 2). `reduction`
    as in `soft_cross_entropy`.
    """
    teacher_log_probs = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    student_log_probs = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    per_class = jnp.exp(teacher_log_probs) * (teacher_log_probs - student_log_probs)
    return _weighted_mean(_reduce_classes(per_class, reduction), weights, count)


def sigmoid_cross_entropy(
    logits: Float[Array, "units classes"],
    labels: Int[Array, "units classes"],
    weights: Float[Array, " units"],
    *,
    label_smoothing: float = 0.0,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Binary cross-entropy of all classes, mean over classes and weighted units (unit: unit).

    `labels` are 1 for the classes of a unit, else 0. `label_smoothing` moves them towards 1/2;
    without it the loss is that of `torch.nn.BCEWithLogitsLoss`.
    """
    logits = logits.astype(jnp.float32)
    target = (1 - label_smoothing) * labels.astype(jnp.float32) + label_smoothing / 2
    per_class = -(target * jax.nn.log_sigmoid(logits) + (1 - target) * jax.nn.log_sigmoid(-logits))
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
    """Binary cross-entropy with the teacher's probability of every class (unit: unit).

    Both logits are divided by the temperature; the caller multiplies by temperature². `reduction`
    over classes as in `soft_cross_entropy`. "kl" subtracts the teacher's entropy, which does not
    change the gradient.
    """
    teacher_logits = teacher_logits.astype(jnp.float32) / temperature
    student_logits = student_logits.astype(jnp.float32) / temperature

    def one_outcome(teacher: Array, student: Array) -> Array:
        log_ratio = jax.nn.log_sigmoid(student)
        if divergence == "kl":
            log_ratio = log_ratio - jax.nn.log_sigmoid(teacher)
        return -jax.nn.sigmoid(teacher) * log_ratio

    is_class = one_outcome(teacher_logits, student_logits)
    per_class = is_class + one_outcome(-teacher_logits, -student_logits)
    return _weighted_mean(_reduce_classes(per_class, reduction), weights, count)


def logits_mse(
    student_logits: Float[Array, "batch k"],
    target: Float[Array, "batch k"],
    weights: Float[Array, " batch"],
    *,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Squared error to teacher logits or gold scores, mean over k and weighted examples.

    Unit: example. For regression tasks (STS-B): the TinyBERT paper compares with teacher logits,
    TinyBERT's released code with gold scores.
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

    "valid_only" is the mean over real tokens and dim, so that padding does not dilute the loss;
    "paper_code" is the mean over all tokens, padding included (batch·seq units). Source: TinyBERT
    equations 8 and 9.
    """
    if normalisation == "valid_only":
        num_tokens = mask.sum(dtype=jnp.float32)
    elif normalisation == "paper_code":
        mask, num_tokens = jnp.ones_like(mask), jnp.float32(mask.size)
    else:
        raise ValueError(unknown_normalisation(normalisation))
    in_float32 = student.astype(jnp.float32), teacher.astype(jnp.float32)
    return divide_by_count(_squared_distance(*in_float32, mask), num_tokens, count)


@jax.custom_vjp
def _squared_distance(student: Array, teacher: Array, mask: Array) -> Array:
    """Sum over the tokens of `mask` of the mean over dim of (student − teacher)²."""
    return _squared_distance_forward(student, teacher, mask)[0]


def _squared_distance_forward(student: Array, teacher: Array, mask: Array) -> tuple[Array, Array]:
    difference = jnp.where(mask[:, :, None], student - teacher, 0)
    # Without the barrier XLA:CPU recomputes the difference, and all it is fused with, at every use.
    difference = jax.lax.platform_dependent(
        difference, cpu=jax.lax.optimization_barrier, default=lambda x: x
    )
    return jnp.square(difference).mean(-1).sum(), difference


def _squared_distance_backward(difference: Array, cotangent: Array) -> tuple[Array, Array, None]:
    student_gradient = (2 / difference.shape[-1]) * cotangent * difference
    return student_gradient, -student_gradient, None


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
    is_real = mask[:, :, None]
    student_unit, teacher_unit = (
        _unit(jnp.where(is_real, x.astype(jnp.float32), 0)) for x in (student, teacher)
    )
    per_token = 1 - jnp.sum(student_unit * teacher_unit, axis=-1)
    return divide_by_count(jnp.sum(per_token * mask), mask.sum(dtype=jnp.float32), count)


def pooled_cosine(
    student: Float[Array, "batch dim"],
    teacher: Float[Array, "batch dim"],
    weights: Float[Array, " batch"],
    *,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """1 − cos of the angle between two vectors, mean over weighted examples (unit: example).

    A vector of zeros, as a ReLU may give, has the cosine 0 with every other.
    """
    units = _unit(student.astype(jnp.float32)), _unit(teacher.astype(jnp.float32))
    return _weighted_mean(1 - jnp.sum(units[0] * units[1], axis=-1), weights, count)


def normalised_distance(
    student: Float[Array, "batch dim"],
    teacher: Float[Array, "batch dim"],
    weights: Float[Array, " batch"],
    *,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """‖s/‖s‖ − t/‖t‖‖², mean over dim and weighted examples (unit: example).

    Source: PKD (arXiv 1908.09355, equation 7); the mean over dim follows PKD's released code.
    """
    difference = _unit(student.astype(jnp.float32)) - _unit(teacher.astype(jnp.float32))
    return _weighted_mean(jnp.square(difference).mean(-1), weights, count)


def _unit(x: Array) -> Array:
    """Vectors divided by their length, or by 1e-8 where shorter, so that gradients are finite."""
    squared_length = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared_length, 1e-16))


def _reduce_classes(per_class: Array, reduction: str) -> Array:
    if reduction == "sum":
        return per_class.sum(-1)
    if reduction == "mean_classes":
        return per_class.mean(-1)
    raise ValueError(
        f"reduction: expected 'sum' or 'mean_classes', got {reduction!r}; use 'sum', or "
        "'mean_classes' to reproduce TinyBERT's released code"
    )


def negative_log_likelihood(
    logits: Float[Array, "units classes"], labels: Int[Array, " units"]
) -> Float[Array, " units"]:
    """The cross-entropy of each unit with its label."""
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - label_logits


def _weighted_mean(per_unit: Array, weights: Array, count: Array | None) -> Array:
    weights = weights.astype(jnp.float32)
    return divide_by_count(jnp.sum(per_unit * weights), weights.sum(), count)


def divide_by_count(total: Array, num_units: Array, count: Array | None) -> Array:
    """`total / count`, or `total / num_units` without a count; a denominator of 0 counts as 1."""
    denominator = num_units if count is None else count.astype(jnp.float32)
    return total / jnp.where(denominator == 0, 1, denominator)


def unknown_normalisation(normalisation: object) -> str:
    """Error message for an unknown normalisation."""
    return (
        f"normalisation: expected 'paper_code' or 'valid_only', got {normalisation!r}; use "
        "'valid_only', or 'paper_code' to reproduce TinyBERT's released code"
    )
