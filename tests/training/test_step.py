"""Properties of the step: accumulation, devices, donation, objectives against PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_stages import DRY, STUDENT, make_batch, mesh_of, stage_of

from tinybert_jax.config.compute import MeshSection
from tinybert_jax.models.heads import make_encoder, make_masked_lm
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.params import restack_layers
from tinybert_jax.objectives import masking
from tinybert_jax.objectives.masked_lm import make_mlm
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import make_mesh, num_batch_shards
from tinybert_jax.training.step import init_state, make_train_step


@functools.cache
def _run(kind, num_devices, *, accumulation=1, num_steps=2, normalisation="valid_only"):
    """(the last parameters, the metrics of every step); eight devices as 2 × 2 × 2."""
    mesh = mesh_of(1) if num_devices == 1 else mesh_of(8, fsdp=2, tensor=2)
    objective, params, frozen = stage_of(kind, normalisation, num_batch_shards(mesh))
    schedule = optax.constant_schedule(1e-2)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(schedule))
    key = jax.random.key(3)
    state = init_state(params, optimizer, key, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(
        objective,
        optimizer,
        schedule,
        mesh,
        placed,
        num_steps=num_steps,
        gradient_accumulation_steps=accumulation,
    )
    history = []
    for i in range(num_steps):
        batch = jax.device_put(make_batch(seed=i), sharding.batch_sharding(mesh))
        state, metrics = step(state, batch, frozen)
        history.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state.params), history


def _loss(objective, params, batch, frozen):
    key = jax.random.key(0)

    @jax.jit
    def loss(params, batch, frozen):
        batch, counts = objective.prepare(batch, key, jnp.float32(0))
        return objective.loss(params, batch, counts, key, objective.targets(batch, frozen))

    return loss(params, batch, frozen)


KINDS = ["supervised", "masked_lm", "layers", "prediction", "words", "patience", "relations"]


@pytest.mark.parametrize("kind", [*KINDS, "supervised_apart"])
def test_eight_devices_equal_one(kind):
    one, history_one = _run(kind, 1)
    eight, history_eight = _run(kind, 8)
    for a, b in zip(history_one, history_eight, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, eight)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("masked_lm", {}),
        ("layers", {}),
        ("layers", {"normalisation": "paper_code"}),
        ("supervised_apart", {}),
    ],
)
def test_accumulation_equals_the_whole_batch(kind, options):
    """Rows differ in length, so a mean of microbatch means would not."""
    whole, history_whole = _run(kind, 1, **options)
    parts, history_parts = _run(kind, 1, accumulation=2, **options)
    for a, b in zip(history_whole, history_parts, strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole, parts)


def test_layers_apart_train_as_their_stack():
    stacked, _ = _run("supervised", 1)
    apart, _ = _run("supervised_apart", 1)
    assert isinstance(apart["encoder"]["layers"], tuple)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), restack_layers(apart), stacked
    )


@pytest.mark.parametrize("kind", ["supervised", "prediction"])
def test_filler_rows_change_nothing(kind):
    objective, params, frozen = stage_of(kind)
    batch = make_batch()
    ids, types = batch.inputs
    labels = jnp.where(batch.weights == 0, 2, batch.targets["labels"])
    other = batch._replace(
        inputs=Text(jnp.where(batch.weights[:, None] == 0, 7, ids), types),
        targets={"labels": labels},
    )
    losses = [_loss(objective, params, b, frozen)[0] for b in (batch, other)]
    assert losses[0] == losses[1]


def test_a_masked_lm_step_never_holds_the_logits_of_all_predictions():
    sizes = STUDENT.model_copy(update={**DRY, "vocab_size": 8192, "max_position_embeddings": 64})
    apply, init = make_masked_lm(sizes)
    params, batch = jax.eval_shape(init, jax.random.key(0)), make_batch(64, 64)

    def temporaries(chunk_size):
        options = {"mask_token_id": 4, "special_token_ids": (0, 1, 2), "vocab_size": 8192}
        objective = make_mlm(apply, mask_rate=0.5, max_chunk_size=chunk_size, **options)

        def step(params, batch, key):
            prepared = objective.prepare(batch, key, jnp.float32(0))
            return jax.grad(objective.loss, has_aux=True)(params, *prepared, key, ())

        compiled = jax.jit(step).lower(params, batch, jax.random.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 64 * masking.num_slots(0.5, 64) * 8192
    assert temporaries(64 * 64) >= logits
    assert temporaries(128) <= logits / 2


def test_state_is_born_sharded_and_moments_with_their_parameters():
    mesh = mesh_of(8, fsdp=2, tensor=2)
    _, init = make_encoder(STUDENT)
    state = init_state(jax.jit(init)(jax.random.key(0)), optax.adam(1e-3), jax.random.key(0), mesh)
    kernel = state.params["layers"]["intermediate"]["kernel"]
    moment = state.opt_state[0].mu["layers"]["intermediate"]["kernel"]
    assert kernel.sharding.spec == moment.sharding.spec == jax.P(None, "fsdp", "tensor")
    word = state.params["embeddings"]["word"]["embedding"]
    assert word.sharding.spec == jax.P(("fsdp", "tensor"))
    assert len({s.device for s in kernel.addressable_shards}) == 8


def test_mesh_that_does_not_multiply_to_the_devices_is_refused():
    with pytest.raises(ValueError, match="= 8 devices"):
        make_mesh(MeshSection(data=3))


def test_the_average_follows_its_formula_on_one_and_eight_devices():
    """Written out in NumPy from the parameters of each step; the trained ones are untouched."""
    decay, num_steps = 0.4, 6
    plain, _ = _run("supervised", 1, num_steps=num_steps)
    for mesh in (mesh_of(1), mesh_of(8, fsdp=2, tensor=2)):
        objective, params, frozen = stage_of("supervised")
        schedule = optax.constant_schedule(1e-2)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(schedule))
        state = init_state(params, optimizer, jax.random.key(3), mesh, averaged=True)
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = make_train_step(
            objective,
            optimizer,
            schedule,
            mesh,
            placed,
            num_steps=num_steps,
            average_decay=decay,
        )
        expected = jax.device_get(params)
        for i in range(num_steps):
            batch = jax.device_put(make_batch(seed=i), sharding.batch_sharding(mesh))
            state, _ = step(state, batch, frozen)
            kept = min(decay, (1 + i) / (10 + i))
            expected = jax.tree.map(
                lambda old, new, kept=kept: kept * old + (1 - kept) * new,
                expected,
                jax.device_get(state.params),
            )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state.params, plain)
        assert state.evaluated is state.average
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state.average, expected
        )
