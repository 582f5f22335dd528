"""Steps whose loss or gradient is not finite, spikes of the loss, and replicas that differ."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_stages import make_batch, mesh_of, stage_of

from tinybert_jax.config.stages import StageSection
from tinybert_jax.parallel import replicas, sharding
from tinybert_jax.training import checkpoint
from tinybert_jax.training.members import join_objectives, join_optimizer
from tinybert_jax.training.optimizer import make_optimizer, make_schedule
from tinybert_jax.training.skipping import Skips
from tinybert_jax.training.step import init_state, make_train_step


def _bad(batch):
    """A batch with one weight that is NaN: every loss and gradient of it is NaN."""
    return batch._replace(weights=batch.weights.at[0].set(jnp.nan))


def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


@functools.cache
def _programs(num_devices=1, accumulation=1, *, num_seeds=0, members=()):
    """(the first state, a step of it), compiled once: on eight devices also fsdp and tensor."""
    objective, params, _ = stage_of("supervised")
    key, mesh = jax.random.key(3), mesh_of(1)
    if num_devices > 1:
        mesh = mesh_of(num_devices, fsdp=2, tensor=2)
    if num_seeds:
        params = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_seeds), params)
        key = jax.random.split(key, num_seeds)
    if members:
        objective = join_objectives(dict.fromkeys(members, objective))
        params = {name: _copy(params) for name in members}
    schedule = make_schedule("linear", learning_rate=1e-2, num_steps=9, warmup_steps=0)
    optimizer = join_optimizer(make_optimizer(schedule), objective.members)
    state = init_state(params, optimizer, key, mesh, averaged=True)
    step = make_train_step(
        objective,
        optimizer,
        schedule,
        mesh,
        jax.tree.map(lambda leaf: leaf.sharding, state),
        num_steps=9,
        gradient_accumulation_steps=accumulation,
        average_decay=0.5,
    )

    def run(state, batch, limit=None):
        return step(state, jax.device_put(batch, sharding.batch_sharding(mesh)), (), limit)

    return state, run


def _begin(*words, **given):
    """(a state before the first step, a step of it); the step donates the state."""
    state, run = _programs(*words, **given)
    return _copy(state), run


def _host(tree):
    """A copy: the step gives the memory of the state away."""
    return jax.tree.map(np.array, (tree.params, tree.opt_state, tree.average))


def _assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("num_devices", "accumulation"), [(1, 1), (1, 2), (8, 1)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(num_devices, accumulation):
    state, run = _begin(num_devices, accumulation)
    state, metrics = run(state, make_batch(seed=0))
    assert not metrics["skipped"]
    before = _host(state)
    for number in range(2, 5):
        state, metrics = run(state, _bad(make_batch(seed=number)))
        assert metrics["skipped"] and metrics["skipped"].shape == ()
        assert state.step == number
        # The learning rate goes on with the step; the count of the moments does not.
        adam, schedule = state.opt_state[1], state.opt_state[3]
        assert (adam.count, schedule.count) == (1, number)
    after = _host(state)
    _assert_equal((before[0], before[1][1], before[2]), (after[0], after[1][1], after[2]))
    assert metrics["learning_rate"] == pytest.approx(1e-2 * (1 - 3 / 9))
    state, metrics = run(state, make_batch(seed=5))
    assert not metrics["skipped"] and np.isfinite(metrics["loss"])
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.params, after[0])
    assert all(jax.tree.leaves(changed))


def test_a_seed_that_is_not_finite_leaves_the_others_as_they_are():
    state, run = _begin(num_seeds=3)
    start, before = _copy(state), _host(state)[0]
    no_limit = jnp.full(3, jnp.inf)

    def spoilt(leaf):  # finite weights, whose products are not
        return leaf.at[1].set(1e30)

    for name in ("kernel", "bias"):
        head = state.params["classifier"]
        head[name] = spoilt(head[name])
    expected, actual = start, state
    for seed in range(3):
        expected, plain = run(expected, make_batch(seed=seed), no_limit)
        actual, metrics = run(actual, make_batch(seed=seed), no_limit)
        assert not plain["skipped"].any()
        assert metrics["skipped"].tolist() == [False, True, False]
    for a, b in zip(jax.tree.leaves(_host(expected)), jax.tree.leaves(_host(actual)), strict=True):
        if a.ndim:
            np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])
    assert (np.asarray(actual.params["classifier"]["kernel"][1]) == np.float32(1e30)).all()
    assert not np.asarray(actual.opt_state[1].count)[1]
    _assert_equal(
        jax.tree.map(lambda leaf: leaf[1], actual.params["encoder"]),
        jax.tree.map(lambda leaf: leaf[1], before["encoder"]),
    )


def test_a_member_that_is_not_finite_leaves_the_others_as_they_are():
    state, run = _begin(members=("one", "two"))
    state.params["two"]["classifier"]["bias"] = jnp.full(3, jnp.inf)
    alone, run_alone = _begin(1, 1)
    before = _host(alone)[0]
    for seed in range(2):
        alone, _ = run_alone(alone, make_batch(seed=seed))
        state, metrics = run(state, make_batch(seed=seed))
        assert metrics["skipped"].tolist() == [False, True]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        state.params["one"],
        alone.params,
    )
    _assert_equal(state.params["two"]["encoder"], before["encoder"])


def test_a_loss_above_the_limit_of_its_model_is_skipped():
    state, run = _begin(num_seeds=3)
    state, metrics = run(state, make_batch(), jnp.full(3, jnp.inf))
    assert not metrics["skipped"].any()
    before = _host(state)
    limit = metrics["losses"] * jnp.array([2.0, 0.5, 2.0])
    state, metrics = run(state, make_batch(), limit)
    assert metrics["skipped"].tolist() == [False, True, False]
    moved = jax.tree.map(
        lambda a, b: [bool((x != y).any()) for x, y in zip(a, b, strict=True)],
        before[0]["encoder"],
        jax.device_get(state.params["encoder"]),
    )
    flags = np.array(jax.tree.leaves(moved, is_leaf=lambda node: isinstance(node, list)))
    assert not flags.reshape(-1, 3)[:, 1].any() and flags.reshape(-1, 3)[:, [0, 2]].all()


def _section(**settings):
    return StageSection(num_steps=9, learning_rate=1e-3, **settings)


def _metrics(loss, skipped=False):
    return {"loss": jnp.float32(loss), "skipped": jnp.asarray(skipped)}


def _watch(skips, first, last, metrics_of, in_time=0):
    """Steps as the loop records them: one step late, or in time where a hook asks for it.

    `in_time`: every n-th step is recorded in time, as for a save. Ends where it is over.
    """
    found, is_recorded = [], True
    for step in range(first, last + 1):
        if not is_recorded:
            skips.record(step - 1, metrics_of(step - 1))
        is_recorded = skips.is_alert or bool(in_time and step % in_time == 0)
        if is_recorded:
            skips.record(step, metrics_of(step))
        is_current = skips.is_current(step)
        found += skips.look(step)
        if is_current and skips.is_over:
            break
    return found


@pytest.mark.parametrize("in_time", [0, 2, 3])
def test_steps_in_a_row_are_counted_whenever_they_are_read(in_time):
    def metrics_of(step):
        return _metrics(1.0, [step in (3, 4, 5) or step > 8, step == 5])

    skips = Skips(_section(stop_after_skipped=4), 2, None)
    found = _watch(skips, 1, 20, metrics_of, in_time)
    assert skips.in_row == [4, 0]
    assert [own.step for own in found] == [3, 4, 5, 9, 10, 11, 12]


def test_the_limit_is_a_multiple_of_the_running_median():
    section = _section(spikes="report", spike_factor=3.0, stop_after_skipped=4)
    losses = [1 + step % 3 for step in range(1, 60)]  # of median 2
    losses[39], losses[49] = 7, 6

    def metrics_of(step):
        return _metrics(losses[step - 1])

    (found,) = _watch(Skips(section, 1, None), 1, 59, metrics_of)
    assert (found.step, found.losses, found.limits, found.is_skipped) == (40, [7], [6], False)
    # A run that is resumed at any step finds the same.
    for resumed_at in (30, 37, 39):
        skips = Skips(section, 1, None)
        _watch(skips, 1, resumed_at, metrics_of, in_time=resumed_at)
        known = json.loads(json.dumps(skips.snapshot()))
        assert _watch(Skips(section, 1, known), resumed_at + 1, 59, metrics_of) == [found]


def test_another_policy_begins_with_losses_of_its_own():
    """As after `--from-step` with `spikes: skip`, which has a limit for each of the models."""
    known = Skips(_section(spikes="report"), 4, None).snapshot()
    assert Skips(_section(spikes="skip"), 4, known).limit.shape == (4,)


def _different(tree):
    return [str(own) for own in replicas.differences(checkpoint.named_leaves(tree))]


def test_a_flipped_bit_in_one_replica_is_found_and_its_device_named():
    """Before a step and after it, which no loss tells."""
    state, run = _begin(8, 1)
    state, _ = run(state, make_batch())
    assert _different(state._asdict()) == []
    norm = state.params["encoder"]["embeddings"]["norm"]
    parts = []
    for number, shard in enumerate(norm["scale"].addressable_shards):
        part = np.array(shard.data)
        if number == 5:
            part.view(np.uint32)[3] ^= 1  # the lowest bit
        parts.append(jax.device_put(part, shard.device))
    scale = norm["scale"]
    norm["scale"] = jax.make_array_from_single_device_arrays(scale.shape, scale.sharding, parts)
    named = f"params.encoder.embeddings.norm.scale on {jax.devices()[5]} (process 0)"
    assert _different(state._asdict()) == [named]
    state, metrics = run(state, make_batch(seed=1))
    assert np.isfinite(metrics["loss"])
    assert named in _different(state._asdict())


def test_of_two_copies_both_are_named():
    mesh = mesh_of(2)
    whole = sharding.replicated_sharding(mesh)
    parts = [jax.device_put(jnp.float32([1, own]), mesh.devices.flat[own]) for own in (0, 1)]
    array = jax.make_array_from_single_device_arrays((2,), whole, parts)
    first, second = mesh.devices.flat
    named = f"weights on {first} (process 0), {second} (process 0)"
    assert _different({"weights": array}) == [named]
