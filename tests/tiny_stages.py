"""Small stages without dropout: objective, parameters and batch, for tests of the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.compute import MeshSection
from tinybert_jax.config.distillation import DistillSection
from tinybert_jax.models.heads import make_classifier, make_encoder, make_masked_lm
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.params import unstack_layers
from tinybert_jax.objectives.alignment import init_projection
from tinybert_jax.objectives.distillation import Options, Role, make_distill
from tinybert_jax.objectives.masked_lm import make_mask, make_mlm
from tinybert_jax.objectives.supervised import make_supervised
from tinybert_jax.parallel.mesh import make_mesh
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.terms.table import reads_of

TEACHER = ModelConfig(
    vocab_size=52,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=32,
    max_position_embeddings=16,
)
STUDENT = TEACHER.model_copy(
    update={"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16}
)
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WORDS = [
    {"term": "word_logits", "weight": 5.0, "temperature": 2.0},
    {"term": "masked_lm", "weight": 2.0},
    {"term": "cosine"},
]


def make_batch(rows=16, width=12, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, width + 1, rows)
    lengths[-1] = 0  # a filler row
    mask = np.arange(width)[None] < lengths[:, None]
    batch = Batch(
        inputs=Text(
            np.where(mask, rng.integers(5, 50, (rows, width)), 0).astype(np.int32),
            np.zeros((rows, width), np.int32),
        ),
        attention_mask=mask,
        targets={"labels": rng.integers(0, 3, rows).astype(np.int32)},
        weights=(lengths > 0).astype(np.float32),
    )
    return jax.tree.map(jnp.asarray, batch)


def mesh_of(num_devices, **axes):
    return make_mesh(MeshSection(**axes), jax.devices()[:num_devices])


@functools.cache
def stage_of(kind, normalisation="valid_only", num_shards=1):
    """(objective, params, frozen) of a small stage without dropout; `kind` may end in `_apart`."""
    if kind == "supervised_apart":  # as run_stage does with compute.unroll_layers
        apply, init = make_classifier(STUDENT.model_copy(update=DRY), 3, unroll=True)
        params = unstack_layers(jax.jit(init)(jax.random.key(0)))
        return make_supervised(apply, label_smoothing=0.1), params, ()
    key = jax.random.key(0)
    student = STUDENT.model_copy(update=DRY)
    options = Options(normalisation=normalisation, num_shards=num_shards)
    if kind == "supervised":
        apply, init = make_classifier(student, 3)
        return make_supervised(apply, label_smoothing=0.1), jax.jit(init)(key), ()
    if kind == "masked_lm":
        apply, init = make_masked_lm(student, pair_head=True)
        ids = {"mask_token_id": 4, "special_token_ids": (0, 1, 2), "vocab_size": 52}
        objective = make_mlm(apply, mask_rate=0.3, pair_weight=0.5, num_shards=num_shards, **ids)

        def prepare(batch, key, share):  # labels of pairs: none, 0 and 1
            labels = batch.targets["labels"] - 1
            return objective.prepare(batch._replace(targets={"labels": labels}), key, share)

        return objective._replace(prepare=prepare), jax.jit(init)(key), ()
    if kind == "prediction":
        terms = [{"term": "logits", "temperature": 2.0, "weight": 0.7}]
        terms = _terms([*terms, {"term": "label", "weight": 0.3}])
        roles, params, frozen = _roles(terms)
        objective = make_distill(*roles, terms, options)
        return objective, {"student": params}, frozen
    if kind == "words":
        ids = {"mask_token_id": 4, "special_token_ids": (0, 1, 2), "vocab_size": 52}
        terms = DistillSection.model_validate(
            {"general": [*WORDS, {"term": "word_logits", "at": "masked"}]}
        ).terms("general")
        roles, params, frozen = _roles(terms, width=16)
        mask = make_mask(mask_rate=0.3, **ids)
        options = options._replace(chunk_size=5)
        objective = make_distill(*roles, terms, options, mask)
        return objective, {"student": params}, frozen
    if kind == "patience":
        terms = DistillSection(preset="pkd").terms("prediction")
        roles, params, frozen = _roles(terms, width=16)
        return make_distill(*roles, terms, options), {"student": params}, frozen
    terms = DistillSection().terms("intermediate")
    if kind == "relations":
        terms = _terms([{"term": "relation", "heads": 2}, {"term": "attention", "heads": 8}])
    roles, params, frozen = _roles(terms)
    params = {"student": params, "projection": init_projection(key, 8, 16, 1)}
    return make_distill(*roles, terms, options), params, frozen


def _roles(terms, width=8):
    """((student, teacher), the student's parameters, the teacher's)."""
    roles, params = [], []
    reads = reads_of(terms), reads_of(terms, of_teacher=True)
    widths = STUDENT.model_copy(update={"hidden_size": width}), TEACHER
    for number, (sizes, own) in enumerate(zip(widths, reads, strict=True)):
        apply, init = _make_model(own, sizes.model_copy(update=DRY))
        roles.append(Role(apply, own, sizes.num_hidden_layers))
        params.append(jax.jit(init)(jax.random.key(number)))
    return roles, *params


def _make_model(reads, sizes):
    """The model that has the outputs which terms read."""
    if reads.words:
        return make_masked_lm(sizes)
    return make_classifier(sizes, 3) if reads.task_logits else make_encoder(sizes)


def _terms(terms):
    return DistillSection.model_validate({"prediction": terms}).terms("prediction")
