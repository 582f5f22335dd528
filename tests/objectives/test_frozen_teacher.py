"""The outputs that a student learns from are those of a teacher without dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.distillation import DistillSection
from tinybert_jax.models.heads import make_classifier, make_encoder, make_masked_lm
from tinybert_jax.models.inputs import Text
from tinybert_jax.objectives.distillation import Role, make_distill
from tinybert_jax.objectives.objective import encoder_inputs
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.terms.table import reads_of

SIZES = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=12,
    hidden_dropout_prob=0.5,
    attention_probs_dropout_prob=0.5,
)
IDS = jnp.asarray(np.random.default_rng(0).integers(5, 50, (4, 12)), jnp.int32)
BATCH = Batch(
    Text(IDS, 0 * IDS),
    IDS > 0,
    {"labels": IDS[:, 0] % 3},
    jnp.ones(4),
)


def _make_classifier(sizes):
    return make_classifier(sizes, 3)


@pytest.mark.parametrize(
    ("stage", "term", "make", "taught", "told"),
    [
        ("intermediate", "cosine", make_encoder, lambda o: o.encoder.hidden, lambda o: o.hidden),
        ("prediction", "logits", _make_classifier, lambda o: o.logits, lambda o: o.logits),
        ("general", "word_logits", make_masked_lm, lambda o: o.words.hidden, lambda o: o.hidden),
    ],
)
def test_a_student_learns_from_outputs_without_dropout(stage, term, make, taught, told):
    """`taught` are those of the objective, `told` those of the same model in evaluation."""
    terms = DistillSection.model_validate({stage: [{"term": term}]}).terms(stage)
    apply, init = make(SIZES)
    role = Role(apply, reads_of(terms), SIZES.num_hidden_layers)
    frozen = jax.jit(init)(jax.random.key(0))
    inputs = encoder_inputs(BATCH)
    outputs = jax.jit(make_distill(role, role, terms).targets)(BATCH, frozen)
    expected = told(jax.jit(apply)(frozen, *inputs))
    np.testing.assert_allclose(taught(outputs), expected, rtol=1e-5, atol=1e-6)
    dropped = told(jax.jit(apply)(frozen, *inputs, jax.random.key(1)))
    assert jnp.abs(dropped - expected).max() > 1e-2, "else the comparison says nothing"
