"""Tasks that score tokens: the same training in any layout, of units alone, in parts or at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.batches.batch import Plan, TokenRows, make_batch
from tinybert_jax.batches.packing import pack
from tinybert_jax.config.distillation import DistillSection
from tinybert_jax.losses.forms import FORMS
from tinybert_jax.models.heads import make_classifier, make_token_classifier
from tinybert_jax.models.inputs import Text
from tinybert_jax.objectives.distillation import Options, Role, make_distill
from tinybert_jax.objectives.supervised import make_supervised
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.terms.table import reads_of

NUM_ROWS, WIDTH, CLASSES = 8, 24, 3
SIZES = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=WIDTH,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
APPLY, INIT = make_token_classifier(SIZES, CLASSES)
TERMS = DistillSection.model_validate({"prediction": [{"term": "label"}, {"term": "logits"}]})


def _token_rows() -> TokenRows:
    """About half of the tokens are units, each with a class and what a teacher says of it."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 12, NUM_ROWS)
    num_tokens = lengths.sum()
    is_unit = rng.random(num_tokens) < 0.5
    return TokenRows(
        ids=rng.integers(5, SIZES.vocab_size, num_tokens).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second=lengths.astype(np.int32),
        labels=np.where(is_unit, rng.integers(0, CLASSES, num_tokens), -1).astype(np.int32),
        num_truncated=0,
        teacher_logits=rng.normal(size=(num_tokens, CLASSES)).astype(np.float32),
        is_unit=is_unit,
    )


ROWS = _token_rows()
LAYOUTS = {
    "padded": Plan(np.arange(NUM_ROWS), WIDTH),
    "bucketed": Plan(np.append(np.arange(NUM_ROWS)[::-1], -1), 12),  # and a filler row
    "packed": Plan(pack(ROWS.lengths, WIDTH, seed=0), WIDTH),
}
OBJECTIVES = ("supervised", "distilled", "distilled from known logits")


def _batch(plan, rows=ROWS):
    return jax.tree.map(jnp.asarray, make_batch(rows, plan, 0))


def _params(seed):
    return jax.tree.map(lambda leaf: 4 * leaf, INIT(jax.random.key(seed)))


def _made(name):
    """(objective, its parameters, the teacher's)."""
    if name == "supervised":
        return make_supervised(APPLY), _params(0), ()
    terms = TERMS.terms("prediction")
    roles = (Role(APPLY, reads_of(terms, of_teacher=of_teacher), 2) for of_teacher in (False, True))
    return make_distill(*roles, terms, Options()), {"student": _params(0)}, _params(1)


def _given(name, plan):
    batch = _batch(plan)
    return batch if name == OBJECTIVES[2] else batch._replace(teacher_logits=None)


def _value_and_grads(name, batch, whole=None):
    """Of a batch, or of a part of `whole`."""
    objective, params, frozen = _made(name)
    _, counts = objective.prepare(whole or batch, jax.random.key(0), jnp.zeros(()))
    targets = objective.targets(batch, frozen)
    loss = jax.value_and_grad(objective.loss, has_aux=True)
    (value, _), grads = jax.jit(loss)(params, batch, counts, None, targets)
    return value, grads


def _assert_close(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_units_give_the_same_training_in_any_layout(name):
    padded = _value_and_grads(name, _given(name, LAYOUTS["padded"]))
    for layout in ("bucketed", "packed"):
        _assert_close(_value_and_grads(name, _given(name, LAYOUTS[layout])), padded)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_of_a_batch_add_up_to_it(name):
    """Parts of unequal numbers of units, divided by the units of the whole batch."""
    whole = _given(name, LAYOUTS["padded"])
    parts = [jax.tree.map(lambda x, part=part: x[part], whole) for part in (np.s_[:3], np.s_[3:])]
    units = [float(part.targets["units"].sum()) for part in parts]
    assert units[0] != units[1] and sum(units) == ROWS.is_unit.sum()
    each = [_value_and_grads(name, part, whole) for part in parts]
    _assert_close(jax.tree.map(jnp.add, *each), _value_and_grads(name, whole))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_units_are_learnt_from(name):
    """Whatever the labels and a teacher's scores of other tokens: the same bits."""
    junk = ROWS._replace(
        labels=np.where(ROWS.is_unit, ROWS.labels, 1).astype(np.int32),
        teacher_logits=np.where(ROWS.is_unit[:, None], ROWS.teacher_logits, 9).astype(np.float32),
    )
    batch = _batch(LAYOUTS["packed"], junk)
    batch = batch if name == OBJECTIVES[2] else batch._replace(teacher_logits=None)
    ours, theirs = (_value_and_grads(name, own) for own in (batch, _given(name, LAYOUTS["packed"])))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_a_task_learns_by_its_form_of_scores(form):
    """Of whole rows; a filler row has no part in it."""
    num_classes = 1 if form == "square" else CLASSES
    apply, init = make_classifier(SIZES, num_classes)
    rng = np.random.default_rng(1)
    labels = {
        "softmax": rng.integers(0, CLASSES, NUM_ROWS).astype(np.int32),
        "sigmoid": rng.integers(0, 2, (NUM_ROWS, CLASSES)).astype(np.int32),
        "square": rng.normal(size=NUM_ROWS).astype(np.float32),
    }[form]
    rows = ROWS._replace(labels=labels, teacher_logits=None, is_unit=None)
    batch = _batch(Plan(np.append(np.arange(NUM_ROWS), -1), 12), rows)
    params = init(jax.random.key(0))
    objective = make_supervised(apply, form=form)
    _, counts = objective.prepare(batch, jax.random.key(0), jnp.zeros(()))
    value, parts = objective.loss(params, batch, counts, None, ())
    real = Text(*(x[:NUM_ROWS] for x in batch.inputs)), batch.attention_mask[:NUM_ROWS]
    expected = FORMS[form].label_loss(
        apply(params, *real).logits, jnp.asarray(labels), jnp.ones(NUM_ROWS)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert parts == {"loss/label": value}
