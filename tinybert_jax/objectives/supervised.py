"""The objective of training on the labels of a task."""

import jax

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.tasks import Form
from tinybert_jax.losses.forms import FORMS
from tinybert_jax.models.params import Apply
from tinybert_jax.objectives.objective import Objective, count_units, encoder_inputs, units


def make_supervised(
    apply: Apply, *, form: Form = "softmax", label_smoothing: float = 0.0
) -> Objective:
    """The loss of `form` between a model's logits and the labels of the batch."""

    def loss(params, batch: Batch, counts, key, targets):
        logits = unit_logits(apply, params, batch, key)
        with jax.named_scope("~loss label"):
            value = FORMS[form].label_loss(
                logits, *units(batch), label_smoothing=label_smoothing, count=counts.units
            )
        return value, {"loss/label": value}

    return Objective(lambda batch, key, share: (batch, count_units(batch)), loss)


def unit_logits(apply: Apply, params, batch: Batch, key) -> jax.Array:
    """Logits [units, classes] of all units of a batch: rows, segments or tokens."""
    logits = apply(params, *encoder_inputs(batch), key, num_segments=batch.num_segments).logits
    return logits.reshape(-1, logits.shape[-1])
