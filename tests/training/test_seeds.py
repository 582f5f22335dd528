"""Several seeds of a student in one step: each as if alone, and sharded as one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_stages import make_batch, mesh_of, stage_of

from tinybert_jax.parallel import sharding
from tinybert_jax.training.step import abstract_state, init_state, make_train_step


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
    objective, params, frozen = stage_of(kind)
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
                batch = jax.device_put(make_batch(seed=i), sharding.batch_sharding(mesh))
                state, metrics = step(state, batch, frozen)
            yield state, metrics

    starts = [(start, optimizer, key) for start, key in zip(starts, keys, strict=True)]
    alone = list(run(mesh_of(1), *starts))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(start for start, *_ in starts))
    for mesh in (mesh_of(1), mesh_of(8, fsdp=2, tensor=2)):
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
    params, optimizer = stage_of("supervised")[1], optax.adam(1e-2)
    mesh = mesh_of(8, fsdp=2, tensor=2)
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
