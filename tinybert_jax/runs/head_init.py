"""Starts the head of a model from a linear probe of its encoder, on the text of the stage."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.tasks import Form
from tinybert_jax.losses.forms import FORMS
from tinybert_jax.models.params import Apply, Params
from tinybert_jax.objectives.linear_probe import Loss, fit_head
from tinybert_jax.objectives.objective import encoder_inputs, units
from tinybert_jax.runs.run import Run
from tinybert_jax.runs.stage_batches import StageBatches

_MAX_UNITS = 4096
# Of labels a weak fit: a close one leaves no gradient for the encoder.
_LABEL_C, _LOGIT_C = 1.0, 100.0


def init_head(
    run: Run, stage: str, apply: Apply, params: Params, batches: StageBatches, *, is_quiet: bool
) -> Params:
    """The parameters of a model of the run's task with a fitted head; a trained one is replaced.

    The first batches are read, up to 4,096 units. Their kept logits of the teacher are the targets,
    or the labels where none are kept. Raises ValueError where the features are not finite.
    """
    task = run.required_task.kind
    features, targets, num_units, is_taught = [], [], 0, False
    for index in range(batches.num_batches):
        batch: Batch = jax.device_put(batches.batch_at(index))
        wanted, weights = units(batch)
        if batch.teacher_logits is not None:
            is_taught = True
            wanted = batch.teacher_logits.reshape(-1, batch.teacher_logits.shape[-1])
        is_unit = np.asarray(weights) > 0
        features.append(np.asarray(_features(params, batch, apply, task.unit))[is_unit])
        targets.append(np.asarray(wanted)[is_unit])
        num_units += len(targets[-1])
        if num_units >= _MAX_UNITS:
            break
    read = np.concatenate(features)[:_MAX_UNITS]
    head = fit_head(
        jax.tree.map(jnp.asarray, params["classifier"]),
        read,
        np.concatenate(targets)[:_MAX_UNITS],
        _mean_loss(task.form, is_taught),
        _LOGIT_C if is_taught else _LABEL_C,
    )
    if not is_quiet:
        of = "the teacher's logits" if is_taught else "the labels"
        count = f"{len(read):,} {task.unit}s"
        run.log.say(f"{stage}: the head starts from a linear probe of {of} of {count}")
    return cast(Params, {**params, "classifier": head})


@functools.partial(jax.jit, static_argnames=("apply", "unit"))
def _features(params: Any, batch: Batch, apply: Apply, unit: str) -> Float[Array, "units dim"]:
    """What the head reads of every unit: the pooled first token, or the token's last state."""
    encoder = apply(
        params, *encoder_inputs(batch), None, num_segments=batch.num_segments, taps=True
    ).encoder
    states = encoder.hidden[-1] if unit == "word" else encoder.pooled
    return states.reshape(-1, states.shape[-1])


@functools.cache
def _mean_loss(form: Form, is_taught: bool) -> Loss:
    """The plain loss of labels or of a teacher's logits; of several outputs their sum."""
    chosen = FORMS[form].teacher_loss if is_taught else FORMS[form].label_loss
    is_mean_of_outputs = form == "sigmoid" and not is_taught

    def loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
        ones = jnp.ones(len(logits))
        value = chosen(logits, targets, ones, count=ones.sum())
        return value * logits.shape[1] if is_mean_of_outputs else value

    return loss
