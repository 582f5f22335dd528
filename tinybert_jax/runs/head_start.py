"""Fits the head of a model that is about to be trained to the features of its encoder."""

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.batches.batch import Batch
from tinybert_jax.losses.forms import FORMS
from tinybert_jax.models.params import Apply, Params
from tinybert_jax.objectives.linear_probe import fit_head
from tinybert_jax.objectives.objective import encoder_inputs, units
from tinybert_jax.runs.run import Run
from tinybert_jax.runs.stage_batches import StageBatches

_SAMPLE = 4096  # units that the head is fitted to
# Of `fit_head`. Weak on labels: the encoder has to learn from what the head leaves.
_OF_LABELS, _OF_LOGITS = 1.0, 100.0


def fitted_head(run: Run, apply: Apply, params: Params, batches: StageBatches) -> Params:
    """The parameters of a model whose head fits the labels, or the teacher's logits, of batches.

    `batches`: the first of them are read, and with kept logits those are the targets.
    """
    task, num_units, number = run.required_task.kind, 0, 0
    features, targets = [], []

    @jax.jit
    def encode(params, batch):
        encoder = apply(
            params, *encoder_inputs(batch), None, num_segments=batch.num_segments, taps=True
        ).encoder
        states = encoder.hidden[-1] if task.unit == "word" else encoder.pooled
        return states.reshape(-1, states.shape[-1])

    is_taught = False
    while num_units < _SAMPLE and number < batches.num_batches:
        batch: Batch = jax.device_put(batches.batch_at(number))
        wanted, weights = units(batch)
        is_taught = batch.teacher_logits is not None
        if batch.teacher_logits is not None:
            wanted = batch.teacher_logits.reshape(-1, batch.teacher_logits.shape[-1])
        is_unit = np.asarray(weights) > 0
        features.append(np.asarray(encode(params, batch))[is_unit])
        targets.append(np.asarray(wanted)[is_unit])
        num_units, number = num_units + len(targets[-1]), number + 1
    form = FORMS[task.form]
    head = fit_head(
        jax.tree.map(jnp.asarray, params["classifier"]),
        np.concatenate(features),
        _mean(form.teacher_loss if is_taught else form.label_loss, np.concatenate(targets)),
        _OF_LOGITS if is_taught else _OF_LABELS,
    )
    return cast(Params, {**params, "classifier": head})


def _mean(loss: Callable[..., jax.Array], targets: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    ones = jnp.ones(len(targets))
    return functools.partial(
        lambda targets, logits: loss(logits, targets, ones, count=ones.sum()), jnp.asarray(targets)
    )
