"""The train step: one jitted function of (state, batch, frozen), the same for every stage."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tinybert_jax import sharding
from tinybert_jax.data.pipeline import Batch
from tinybert_jax.objectives import Objective

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    step: jax.Array  # int32 []
    params: Any
    opt_state: optax.OptState
    key: jax.Array  # never changes: every draw comes from fold_in(key, step)
    average: Any = ()  # the parameters' moving average; () where none is kept

    @property
    def evaluated(self) -> Any:
        """The parameters that evaluation, the best checkpoint and the export take."""
        return self.average or self.params


def abstract_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    *,
    averaged: bool = False,
) -> TrainState:
    """The state's shapes, dtypes and shardings; nothing is computed."""
    abstract = jax.eval_shape(lambda: _new_state(params, optimizer, key, averaged))
    placed = state_shardings(abstract, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        placed,
    )


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    *,
    averaged: bool = False,
) -> TrainState:
    """A fresh state, born with its final shardings, the optimizer's moments too.

    `jit(optimizer.init)` does not inherit the parameters' sharding: it is asked for.
    """
    abstract = abstract_state(params, optimizer, key, mesh, averaged=averaged)
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    params = jax.device_put(params, placed.params)
    new = jax.jit(
        lambda params, key: _new_state(params, optimizer, key, averaged), out_shardings=placed
    )
    return new(params, key)


def state_shardings(abstract: TrainState, mesh: Mesh) -> TrainState:
    """The moments carry their parameter's path, so the parameters' rule places them too."""
    return sharding.shardings(sharding.param_specs(abstract, mesh), mesh)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    state_sharding: TrainState,
    *,
    num_steps: int,
    gradient_accumulation_steps: int = 1,
    average_decay: float = 0.0,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]:
    """The donated, sharded step.

    A state that keeps an average moves it by 1 − d towards the new parameters, with
    d = min(`average_decay`, (1 + s)/(10 + s)) after s steps: the first ones are soon forgotten.

    With accumulation, a microbatch takes every n-th example, and every loss is divided by the
    whole batch's unit counts: the sum over microbatches is the full batch's loss, padding or not.
    """

    gradients = _make_gradients(objective, gradient_accumulation_steps)

    def train_step(state: TrainState, batch: Batch, frozen: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        num_tokens = jnp.count_nonzero(batch.attention_mask)
        share = jnp.minimum(state.step / max(num_steps - 1, 1), 1.0)
        (loss, metrics), grads = gradients(state.params, batch, key, share, frozen)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "num_tokens": num_tokens,
        }
        decay = jnp.minimum(average_decay, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(
            lambda old, new: old + (1 - decay) * (new - old),
            state.average,
            params if state.average else (),
        )
        return TrainState(state.step + 1, params, opt_state, state.key, average), metrics

    compiled = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_sharding, sharding.batch_sharding(mesh), None),
        out_shardings=(state_sharding, sharding.replicated(mesh)),
    )

    def step(state: TrainState, batch: Batch, frozen: Any) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(mesh):
            return compiled(state, batch, frozen)

    return step


def _make_gradients(objective: Objective, num_parts: int) -> Callable:
    """(params, batch, key, share, frozen) -> ((loss, metrics), gradients), in parts if asked."""
    differentiate = jax.value_and_grad(objective.loss, has_aux=True)

    def gradients(params, batch, key, share, frozen):
        prepare_key, key = jax.random.split(key)
        batch, counts = objective.prepare(batch, prepare_key, share)
        if num_parts == 1:
            return differentiate(params, batch, counts, key, frozen)

        def micro(part):
            return differentiate(params, part[0], counts, part[1], frozen)

        def accumulate(total, part):
            return jax.tree.map(jnp.add, total, micro(part)), None

        parts = (jax.tree.map(_split(num_parts), batch), jax.random.split(key, num_parts))
        shapes = jax.eval_shape(micro, jax.tree.map(lambda leaf: leaf[0], parts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(accumulate, zeros, parts)[0]

    return gradients


def _new_state(
    params: Any, optimizer: optax.GradientTransformation, key: jax.Array, averaged: bool
) -> TrainState:
    # A copy of its own: the step donates both.
    average = jax.tree.map(jnp.copy, params) if averaged else ()
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, average)


def _split(num_parts: int) -> Callable[[jax.Array], jax.Array]:
    def split(leaf: jax.Array) -> jax.Array:
        shape = (leaf.shape[0] // num_parts, num_parts, *leaf.shape[1:])
        return jnp.moveaxis(leaf.reshape(shape), 1, 0)

    return split
