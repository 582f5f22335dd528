"""Properties of the step: accumulation, devices, donation, objectives against PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.compute import MeshSection
from tinybert_jax.config.distillation import DistillSection
from tinybert_jax.models.heads import make_classifier, make_encoder, make_masked_lm
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.params import restack_layers, unstack_layers
from tinybert_jax.objectives import masking
from tinybert_jax.objectives.alignment import init_projection
from tinybert_jax.objectives.distillation import Options, Role, make_distill
from tinybert_jax.objectives.masked_lm import make_mask, make_mlm
from tinybert_jax.objectives.objective import Objective, count_units, encoder_inputs
from tinybert_jax.objectives.supervised import make_supervised
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import make_mesh
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.terms.table import reads_of
from tinybert_jax.training.step import abstract_state, init_state, make_train_step

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
KEY = jax.random.key(5)
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _batch(rows=16, width=12, seed=0):
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


def _mesh(num_devices, **axes):
    return make_mesh(MeshSection(**axes), jax.devices()[:num_devices])


@functools.cache
def _stage(kind, normalisation="valid_only"):
    """(objective, params, frozen) of a small stage without dropout; `kind` may end in `_apart`."""
    if kind == "supervised_apart":  # as run_stage does with compute.unroll_layers
        apply, init = make_classifier(STUDENT.model_copy(update=DRY), 3, unroll=True)
        params = unstack_layers(jax.jit(init)(jax.random.key(0)))
        return make_supervised(apply, label_smoothing=0.1), params, ()
    key = jax.random.key(0)
    student = STUDENT.model_copy(update=DRY)
    options = Options(normalisation=normalisation)
    if kind == "supervised":
        apply, init = make_classifier(student, 3)
        return make_supervised(apply, label_smoothing=0.1), jax.jit(init)(key), ()
    if kind == "masked_lm":
        apply, init = make_masked_lm(student, pair_head=True)
        ids = {"mask_token_id": 4, "special_token_ids": (0, 1, 2), "vocab_size": 52}
        objective = make_mlm(apply, mask_rate=0.3, pair_weight=0.5, **ids)

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


WORDS = [
    {"term": "word_logits", "weight": 5.0, "temperature": 2.0},
    {"term": "masked_lm", "weight": 2.0},
    {"term": "cosine"},
]


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


def _run(kind, mesh, *, accumulation=1, num_steps=2, normalisation="valid_only"):
    objective, params, frozen = _stage(kind, normalisation)
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
        batch = jax.device_put(_batch(seed=i), sharding.batch_sharding(mesh))
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
    one, history_one = _run(kind, _mesh(1))
    eight, history_eight = _run(kind, _mesh(8, fsdp=2, tensor=2))
    for a, b in zip(history_one, history_eight, strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, eight)


@pytest.mark.parametrize(
    ("kind", "normalisation"),
    [
        ("masked_lm", "valid_only"),
        ("layers", "valid_only"),
        ("layers", "paper_code"),
        ("supervised_apart", "valid_only"),
    ],
)
def test_accumulation_equals_the_whole_batch(kind, normalisation):
    """Rows differ in length, so a mean of microbatch means would not."""
    whole, history_whole = _run(kind, _mesh(1), normalisation=normalisation)
    parts, history_parts = _run(kind, _mesh(1), accumulation=2, normalisation=normalisation)
    for a, b in zip(history_whole, history_parts, strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole, parts)


@pytest.mark.parametrize(
    ("kind", "accumulation", "in_turn"),
    [
        ("supervised_apart", 1, False),
        ("layers", 2, True),
        ("prediction", 1, False),
        ("prediction", 2, True),
    ],
)
def test_students_side_by_side_equal_each_alone(kind, accumulation, in_turn, monkeypatch):
    """In a loop as on CPUs, by `vmap` as elsewhere: same batches, a start of its own.

    The gradient of one is clipped.
    Adam turns the rounding noise of gradients that are 0, those of key biases, into steps of 1e-5.
    """
    monkeypatch.setattr("tinybert_jax.training.step.runs_seeds_sequentially", lambda mesh: in_turn)
    objective, params, frozen = _stage(kind)
    starts = [params, jax.tree.map(lambda leaf: 1.5 * leaf, params)]
    keys = [jax.random.key(3), jax.random.key(4)]
    schedule = optax.constant_schedule(1e-2)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(schedule))

    def run(mesh, *starts):
        """The last state and metrics from each of the starts, with one compiled step."""
        states = [init_state(*start, mesh, averaged=True) for start in starts]
        step = make_train_step(
            objective,
            optimizer,
            schedule,
            mesh,
            jax.tree.map(lambda leaf: leaf.sharding, states[0]),
            num_steps=3,
            gradient_accumulation_steps=accumulation,
            average_decay=0.5,
        )
        for state in states:
            for i in range(3):
                batch = jax.device_put(_batch(seed=i), sharding.batch_sharding(mesh))
                state, metrics = step(state, batch, frozen)
            yield state, metrics

    starts = [(start, optimizer, key) for start, key in zip(starts, keys, strict=True)]
    alone = list(run(_mesh(1), *starts))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(start for start, *_ in starts))
    for mesh in (_mesh(1), _mesh(8, fsdp=2, tensor=2)):
        ((state, metrics),) = run(mesh, (stacked, optimizer, jnp.stack(keys)))
        for name, value in metrics.items():
            mean = np.mean([float(own[name]) for _, own in alone])
            np.testing.assert_allclose(value, mean, rtol=2e-5, atol=1e-6)
        for i, (own, _) in enumerate(alone):
            for field in ("params", "opt_state", "average"):
                jax.tree.map(
                    lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=2e-5),
                    getattr(state, field),
                    getattr(own, field),
                )


def test_seeds_are_split_over_devices_as_a_single_one():
    """Parameters and moments [seeds, …] have the spec of one seed; seeds share the devices."""
    params, optimizer = _stage("supervised")[1], optax.adam(1e-2)
    mesh = _mesh(8, fsdp=2, tensor=2)
    one = abstract_state(params, optimizer, jax.random.key(0), mesh, averaged=True)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), params)
    keys = jax.random.split(jax.random.key(0), 8)
    several = abstract_state(stacked, optimizer, keys, mesh, averaged=True)
    num_split = 0
    for field in ("params", "opt_state", "average"):
        pairs = zip(*(jax.tree.leaves(getattr(s, field)) for s in (one, several)), strict=True)
        for single, both in pairs:
            wanted = (None,) * (both.ndim - single.ndim) + tuple(single.sharding.spec)
            assert both.sharding.is_equivalent_to(
                NamedSharding(mesh, PartitionSpec(*wanted)), both.ndim
            )
            num_split += any(single.sharding.spec)
    assert num_split > 20


def test_layers_apart_train_as_their_stack():
    stacked, _ = _run("supervised", _mesh(1))
    apart, _ = _run("supervised_apart", _mesh(1))
    assert isinstance(apart["encoder"]["layers"], tuple)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), restack_layers(apart), stacked
    )


@pytest.mark.parametrize("kind", ["supervised", "prediction"])
def test_filler_rows_change_nothing(kind):
    objective, params, frozen = _stage(kind)
    batch = _batch()
    ids, types = batch.inputs
    labels = jnp.where(batch.weights == 0, 2, batch.targets["labels"])
    other = batch._replace(
        inputs=Text(jnp.where(batch.weights[:, None] == 0, 7, ids), types),
        targets={"labels": labels},
    )
    losses = [_loss(objective, params, b, frozen)[0] for b in (batch, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("unit", ["token", "whole_word", "span"])
def test_the_mask_rate_moves_over_the_stage_and_every_step_draws_anew(unit):
    objective = make_mlm(
        make_masked_lm(STUDENT)[0],
        mask_rate=0.4,
        mask_rate_end=0.1,
        mask_token_id=4,
        special_token_ids=(0, 1, 2),
        vocab_size=52,
        unit=unit,
        is_continuation=np.arange(52) % 4 == 3,
    )
    ids = np.random.default_rng(0).integers(5, 50, (2048, 64)).astype(np.int32)
    batch = Batch(
        Text(ids, 0 * ids),
        np.ones(ids.shape, bool),
        {"labels": ids[:, 0]},
        np.ones(len(ids), np.float32),
    )
    batch = jax.tree.map(jnp.asarray, batch)

    @jax.jit
    def predictions(step, share):
        masked, counts = objective.prepare(batch, jax.random.fold_in(KEY, step), share)
        positions, tokens = masked.targets["positions"], masked.targets["tokens"]
        return positions, (tokens != -100).sum(-1), counts.predictions

    for share, rate in ((0.0, 0.4), (0.5, 0.25), (1.0, 0.1)):
        _, per_row, total = predictions(0, share)
        assert total == per_row.sum()
        error = 3 * per_row.std() / np.sqrt(len(ids))
        assert abs(per_row.mean() - 64 * rate) <= error
    chosen = [np.asarray(predictions(step, 1.0)[0]) for step in (0, 1)]
    assert (chosen[0] != chosen[1]).any(-1).mean() > 0.9  # few rows have no span in either


def test_an_objective_is_told_how_far_the_stage_is():
    def prepare(batch, key, share):
        return batch, count_units(batch)._replace(predictions=share)

    def loss(params, batch, counts, key, targets):
        return params["w"] ** 2, {"share": counts.predictions}

    params, mesh, optimizer = {"w": jnp.ones(())}, _mesh(1), optax.sgd(0.1)
    state = init_state(params, optimizer, KEY, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    objective = Objective(prepare, loss)
    step = make_train_step(objective, optimizer, lambda _: 0.1, mesh, placed, num_steps=5)
    shares = []
    for _ in range(6):
        state, metrics = step(state, _batch(), ())
        shares.append(float(metrics["share"]))
    assert shares == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("num_seeds", [None, 2])
def test_every_step_draws_its_masks_and_its_dropout_anew(num_seeds):
    """As its objective sees the keys; the same seed draws the same again."""

    def prepare(batch, key, share):
        return batch, count_units(batch)._replace(predictions=jax.random.uniform(key))

    def loss(params, batch, counts, key, targets):
        draws = {"mask": counts.predictions, "dropout": jax.random.uniform(key)}
        return params["w"] ** 2, draws

    mesh, optimizer = _mesh(1), optax.sgd(0.1)
    key = KEY if num_seeds is None else jax.random.split(KEY, num_seeds)
    params = {"w": jnp.ones(key.shape)}

    def draws():
        state = init_state(params, optimizer, key, mesh)
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        objective = Objective(prepare, loss)
        step = make_train_step(objective, optimizer, lambda _: 0.1, mesh, placed, num_steps=5)
        history = []
        for _ in range(5):
            state, metrics = step(state, _batch(), ())
            history.append((float(metrics["mask"]), float(metrics["dropout"])))
        return history

    history = draws()
    assert len({draw for step in history for draw in step}) == 2 * len(history)
    assert draws() == history


def test_a_masked_lm_step_never_holds_the_logits_of_all_predictions():
    sizes = STUDENT.model_copy(update={**DRY, "vocab_size": 8192, "max_position_embeddings": 64})
    apply, init = make_masked_lm(sizes)
    params, batch = jax.eval_shape(init, jax.random.key(0)), _batch(64, 64)

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
    mesh = _mesh(8, fsdp=2, tensor=2)
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


def test_dropout_draws_differ_by_step_and_repeat_by_seed():
    apply, init = make_classifier(STUDENT, 3)
    params, batch = jax.jit(init)(jax.random.key(0)), _batch()

    @jax.jit
    def draw(step):
        return apply(
            params, *encoder_inputs(batch), jax.random.fold_in(jax.random.key(9), step)
        ).logits

    assert jnp.array_equal(draw(0), draw(0))
    assert not jnp.array_equal(draw(0), draw(1))


def test_the_average_follows_its_formula_on_one_and_eight_devices():
    """Written out in NumPy from the parameters of each step; the trained ones are untouched."""
    decay, num_steps = 0.4, 6
    plain, _ = _run("supervised", _mesh(1), num_steps=num_steps)
    for mesh in (_mesh(1), _mesh(8, fsdp=2, tensor=2)):
        objective, params, frozen = _stage("supervised")
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
            batch = jax.device_put(_batch(seed=i), sharding.batch_sharding(mesh))
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
