"""The train step: one jitted function of (state, batch, frozen), the same for every stage."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tinybert_jax.batches.batch import Batch
from tinybert_jax.objectives.objective import Objective
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import runs_seeds_sequentially
from tinybert_jax.training.members import split_members

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything a step reads and changes.

    Several students that learn side by side, each from a seed of its own, have one more axis, the
    first, in all fields but `step`. A family's `params`, `opt_state` and `average` are by member.
    Layers that are unrolled are apart (`heads.unstack_layers`).
    """

    step: jax.Array  # int32 []
    params: Any
    opt_state: optax.OptState
    key: jax.Array  # [] or [seeds]; never changes: every draw comes from fold_in(key, step)
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

    With a vector of keys `params` has an axis of that length in front: one student a key.
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
    specs = sharding.param_specs(abstract, mesh, num_leading=abstract.key.ndim)
    return sharding.named_shardings(specs, mesh)


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
) -> "TrainStep":
    """The donated, sharded step; of several students it is each one's own step on one batch.

    They share the batch, its corruption and the teacher's pass; the metrics are their mean, and
    `grad_norm` that over the members of a family too.

    A state that keeps an average moves it by 1 − d towards the new parameters, with
    d = min(`average_decay`, (1 + s)/(10 + s)) after s steps: the first ones are soon forgotten.

    With accumulation, a microbatch takes every n-th example, and every loss is divided by the
    whole batch's unit counts: the sum over microbatches is the full batch's loss, padding or not.
    """

    gradients = _make_gradients(objective, gradient_accumulation_steps, mesh)
    update = _make_update(optimizer, objective.members)

    def train_step(state: TrainState, batch: Batch, frozen: Any) -> tuple[TrainState, Metrics]:
        num_tokens = jnp.count_nonzero(batch.attention_mask)
        share = jnp.minimum(state.step / max(num_steps - 1, 1), 1.0)
        (loss, metrics), grads = gradients(state, batch, share, frozen)
        each_update = _for_each(update, state.key)
        with jax.named_scope("~optimizer"):
            params, opt_state, grad_norm = each_update(grads, state.opt_state, state.params)
        metrics = {"loss": loss} | metrics | {"grad_norm": grad_norm}
        metrics = jax.tree.map(jnp.mean, metrics) | {
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "num_tokens": num_tokens,
        }
        decay = jnp.minimum(average_decay, (1 + state.step) / (10 + state.step))
        with jax.named_scope("~average"):
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
        out_shardings=(state_sharding, sharding.replicated_sharding(mesh)),
    )

    return TrainStep(compiled, mesh)


class TrainStep(NamedTuple):
    """(state, batch, frozen) -> (state, metrics), compiled for its mesh; the state is donated."""

    jitted: Any
    mesh: Mesh

    def __call__(self, state: TrainState, batch: Batch, frozen: Any) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(self.mesh):
            return self.jitted(state, batch, frozen)

    def program(self, state: TrainState, batch: Batch, frozen: Any) -> str:
        """The text of the compiled program that arguments like these run."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(state, batch, frozen).compile().as_text()


def _make_gradients(objective: Objective, num_parts: int, mesh: Mesh) -> Callable:
    """(state, batch, share, frozen) -> ((loss, metrics), gradients), in parts if asked."""
    differentiate = jax.value_and_grad(objective.loss, has_aux=True)

    def gradients(state: TrainState, batch: Batch, share: jax.Array, frozen: Any):
        split = _for_each(
            lambda key: jax.random.split(jax.random.fold_in(key, state.step)), state.key
        )
        prepare_keys, keys = jnp.moveaxis(split(state.key), -1, 0)
        with jax.named_scope("~prepare"):
            batch, counts = objective.prepare(batch, prepare_keys.ravel()[0], share)

        def micro(batch: Batch, keys: jax.Array):
            with jax.named_scope("~teacher"):
                targets = objective.targets(batch, frozen)

            def one(student: tuple[Any, jax.Array]):
                params, key = student
                return differentiate(params, batch, counts, key, targets)

            each = _for_each(one, state.key, in_turn=runs_seeds_sequentially(mesh))
            return each((state.params, keys))

        if num_parts == 1:
            return micro(batch, keys)

        def accumulate(total, part):
            return jax.tree.map(jnp.add, total, micro(*part)), None

        split = _for_each(lambda key: jax.random.split(key, num_parts), state.key)
        parts = (jax.tree.map(_split(num_parts), batch), jnp.moveaxis(split(keys), -1, 0))
        shapes = jax.eval_shape(micro, *jax.tree.map(lambda leaf: leaf[0], parts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(accumulate, zeros, parts)[0]

    return gradients


def _make_update(optimizer: optax.GradientTransformation, members: Sequence[str]) -> Callable:
    """(gradients, opt_state, params) -> (params, opt_state, gradient norms [members])."""

    def update(grads, opt_state, params):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        norms = [optax.tree.norm(own) for own in split_members(grads, members).values()]
        return optax.apply_updates(params, updates), opt_state, jnp.stack(norms)

    return update


def _for_each(function: Callable, key: jax.Array, *, in_turn: bool = False) -> Callable:
    """The function itself for one student's key, mapped over students for a vector of keys.

    `in_turn`: in a loop, one student after another; a function of one argument then.
    """
    if not key.ndim:
        return function
    return functools.partial(jax.lax.map, function) if in_turn else jax.vmap(function)


def _new_state(
    params: Any, optimizer: optax.GradientTransformation, key: jax.Array, averaged: bool
) -> TrainState:
    # A copy of its own: the step donates both.
    average = jax.tree.map(jnp.copy, params) if averaged else ()
    opt_state = _for_each(optimizer.init, key)(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, key, average)


def _split(num_parts: int) -> Callable[[jax.Array], jax.Array]:
    def split(leaf: jax.Array) -> jax.Array:
        shape = (leaf.shape[0] // num_parts, num_parts, *leaf.shape[1:])
        return jnp.moveaxis(leaf.reshape(shape), 1, 0)

    return split
