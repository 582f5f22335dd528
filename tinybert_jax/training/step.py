"""The train step: one jitted function of (state, batch, frozen) for all stages."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tinybert_jax.batches.batch import Batch
from tinybert_jax.models.params import Params
from tinybert_jax.objectives.objective import Objective
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import runs_seeds_sequentially
from tinybert_jax.training.members import losses_of, merge_members, split_members

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """The arrays that a step updates.

    With several seeds, all fields except `step` have a leading axis [seeds]. With several members,
    `params`, `opt_state` and `average` are dicts by member name. Unrolled layers are a tuple
    (`params.unstack_layers`).
    """

    step: jax.Array  # int32 []
    params: Params
    opt_state: optax.OptState
    key: jax.Array  # [] or [seeds]; constant: all random numbers come from fold_in(key, step)
    average: Any = ()  # moving average of the parameters; () if none is kept

    @property
    def evaluated(self) -> Any:
        """The parameters to evaluate, save and export: the average if there is one."""
        return self.average or self.params


def abstract_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    *,
    averaged: bool = False,
) -> TrainState:
    """The state as ShapeDtypeStructs with shardings; nothing is computed.

    `params` may be ShapeDtypeStructs too.
    """
    abstract = jax.eval_shape(lambda p: _new_state(p, optimizer, key, averaged), params)
    shardings = state_shardings(abstract, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings,
    )


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    *,
    averaged: bool = False,
) -> TrainState:
    """The state before the first step, with its final shardings.

    With keys [seeds], the leaves of `params` are [seeds, …]. `out_shardings` is needed because
    `jit(optimizer.init)` does not give the moments the sharding of the parameters.
    """
    abstract = abstract_state(params, optimizer, key, mesh, averaged=averaged)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    params = sharding.place(params, shardings.params)
    new = jax.jit(
        lambda params, key: _new_state(params, optimizer, key, averaged), out_shardings=shardings
    )
    return new(params, key)


def state_shardings(abstract: TrainState, mesh: Mesh) -> TrainState:
    """The shardings of all fields.

    A moment of the optimizer has the path of its parameter, so `param_specs` applies to it too.
    """
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
    """The jitted, sharded train step; it donates the state.

    Several seeds and members are trained separately on the same batch. They share the masking of
    the batch and the teacher's forward pass. Metrics are means over seeds, and `grad_norm` is also
    a mean over members.

    If the state has an average, the step moves it by 1 − d towards the new parameters, with
    d = min(`average_decay`, (1 + s)/(10 + s)) after s steps, so that it soon forgets the first
    steps.

    With gradient accumulation, a microbatch takes every n-th example. Every loss is divided by the
    unit counts of the whole batch, so that the sum over microbatches is the loss of the batch,
    whatever its padding.

    A model whose loss or gradient is not finite, or whose loss is above `limit`, skips the step:
    its parameters, moments and average stay as they are, its learning rate goes on with the step.
    The metric `skipped` tells which models did, bool [] or [seeds × members].
    """
    gradients = _make_gradients(objective, gradient_accumulation_steps, mesh)
    update = _make_update(optimizer, objective.members)

    def train_step(
        state: TrainState, batch: Batch, frozen: Any, limit: jax.Array | None
    ) -> tuple[TrainState, Metrics]:
        share = jnp.minimum(state.step / max(num_steps - 1, 1), 1.0)
        (loss, metrics), grads = gradients(state, batch, share, frozen)
        grads = sharding.in_stored_layout(grads, mesh)
        losses = losses_of(loss, metrics, objective.members)
        limits = jnp.full_like(losses, jnp.inf) if limit is None else limit.reshape(losses.shape)
        decay = jnp.minimum(average_decay, (1 + state.step) / (10 + state.step))
        update_all = _map_over_seeds(functools.partial(update, decay), state.key)
        old = state.params, state.opt_state, state.average
        (params, opt_state, average), grad_norm, is_applied = update_all(grads, old, losses, limits)
        metrics = {"loss": loss} | metrics | {"grad_norm": grad_norm}
        metrics = jax.tree.map(jnp.mean, metrics) | {
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "num_tokens": jnp.count_nonzero(batch.attention_mask),
            "skipped": ~is_applied.reshape(-1).squeeze(),
        }
        metrics |= {} if limit is None else {"losses": losses.reshape(limit.shape)}
        return TrainState(state.step + 1, params, opt_state, state.key, average), metrics

    compiled = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_sharding, sharding.batch_sharding(mesh), None, None),
        out_shardings=(state_sharding, sharding.replicated_sharding(mesh)),
    )
    return TrainStep(compiled, mesh)


class TrainStep(NamedTuple):
    """step(state, batch, frozen, limit): (state, metrics), compiled for `mesh`.

    It donates the state. `limit`: highest loss of each model that does not skip the step, fp32
    [seeds × members]; None: no limit.
    """

    jitted: Any
    mesh: Mesh

    def __call__(
        self, state: TrainState, batch: Batch, frozen: Any, limit: Any = None
    ) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(self.mesh):
            return self.jitted(state, batch, frozen, limit)

    def compile(self, state: TrainState, batch: Batch, frozen: Any, limit: Any = None) -> Any:
        """The program for these arguments; a later call with such arguments does not compile."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(state, batch, frozen, limit).compile()

    def program(self, state: TrainState, batch: Batch, frozen: Any, limit: Any = None) -> str:
        """The text of the program that is compiled for these arguments."""
        return self.compile(state, batch, frozen, limit).as_text()


def _make_gradients(objective: Objective, num_parts: int, mesh: Mesh) -> Callable:
    """gradients(state, batch, share, frozen): ((loss, metrics), gradients).

    The results are sums over `num_parts` microbatches.
    """
    differentiate = jax.value_and_grad(objective.loss, has_aux=True)

    def gradients(state: TrainState, batch: Batch, share: jax.Array, frozen: Any):
        split = _map_over_seeds(
            lambda key: jax.random.split(jax.random.fold_in(key, state.step)), state.key
        )
        prepare_keys, keys = jnp.moveaxis(split(state.key), -1, 0)
        with jax.named_scope("~prepare"):
            batch, counts = objective.prepare(batch, prepare_keys.ravel()[0], share)

        def micro(batch: Batch, keys: jax.Array):
            with jax.named_scope("~teacher"):
                targets = objective.targets(batch, frozen)

            def one_seed(params_and_key: tuple[Any, jax.Array]):
                params, key = params_and_key
                return differentiate(params, batch, counts, key, targets)

            is_sequential = runs_seeds_sequentially(mesh)
            all_seeds = _map_over_seeds(one_seed, state.key, is_sequential=is_sequential)
            return all_seeds((state.params, keys))

        if num_parts == 1:
            return micro(batch, keys)

        def accumulate(total, part):
            return jax.tree.map(jnp.add, total, micro(*part)), None

        split = _map_over_seeds(lambda key: jax.random.split(key, num_parts), state.key)
        parts = (jax.tree.map(make_split(num_parts), batch), jnp.moveaxis(split(keys), -1, 0))
        shapes = jax.eval_shape(micro, *jax.tree.map(lambda leaf: leaf[0], parts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(accumulate, zeros, parts)[0]

    return gradients


def _make_update(optimizer: optax.GradientTransformation, members: Sequence[str]) -> Callable:
    """update(decay, gradients, (params, opt_state, average), losses [members], limits [members]).

    Returns ((params, opt_state, average), gradient norms [members], is_applied [members]). The
    optimizer is told `is_applied`, and keeps its moments itself.
    """
    update_members = optax.with_extra_args_support(optimizer).update

    def update(decay, grads, old, losses, limits):
        params, opt_state, average = old
        with jax.named_scope("~optimizer"):
            norms = [optax.tree.norm(grad) for grad in split_members(grads, members).values()]
            norms = jnp.stack(norms)
            is_applied = jnp.isfinite(losses) & jnp.isfinite(norms) & (losses <= limits)
            flags = dict(zip(members, is_applied, strict=True))
            updates, opt_state = update_members(
                grads, opt_state, params, is_applied=merge_members(flags)
            )
            params = _keep(flags, params, optax.apply_updates(params, updates))
        with jax.named_scope("~average"):
            moved = jax.tree.map(
                lambda old, new: old + (1 - decay) * (new - old),
                average,
                params if average else (),
            )
            average = _keep(flags, average, moved) if average else ()
        return (params, opt_state, average), norms, is_applied

    return update


def _keep(is_applied: Mapping[str, jax.Array], old: Any, new: Any) -> Any:
    """`new` for the members that apply the step, `old` for those that skip it.

    `new` stands first: XLA's CPU compiler rounds `where(is_skipped, old, new)` in another order.
    """
    olds, news = split_members(old, is_applied), split_members(new, is_applied)
    kept = {
        name: jax.tree.map(functools.partial(jnp.where, flag), news[name], olds[name])
        for name, flag in is_applied.items()
    }
    return merge_members(kept)


def _map_over_seeds(function: Callable, key: jax.Array, *, is_sequential: bool = False) -> Callable:
    """`function` for a single key, or mapped over the leading axis for keys [seeds].

    `is_sequential`: in a loop, one seed after another; `function` then takes one argument.
    """
    if not key.ndim:
        return function
    return functools.partial(jax.lax.map, function) if is_sequential else jax.vmap(function)


def _new_state(
    params: Params, optimizer: optax.GradientTransformation, key: jax.Array, averaged: bool
) -> TrainState:
    # A copy, because the step donates both the parameters and the average.
    average = jax.tree.map(jnp.copy, params) if averaged else ()
    opt_state = _map_over_seeds(optimizer.init, key)(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, key, average)


def make_split(num_parts: int) -> Callable[[jax.Array], jax.Array]:
    """split(leaf): [batch, …] to [num_parts, batch / num_parts, …], every num_parts-th example."""

    def split(leaf: jax.Array) -> jax.Array:
        shape = (leaf.shape[0] // num_parts, num_parts, *leaf.shape[1:])
        return jnp.moveaxis(leaf.reshape(shape), 1, 0)

    return split
