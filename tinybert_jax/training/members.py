"""Members: models of several sizes that are trained on the same batches, with one teacher pass.

Parameters, gradients and optimizer states of several members are dicts by member name. A single
model has the name `SOLE`, and its trees have no dict around them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tinybert_jax.config.models import SOLE
from tinybert_jax.objectives.objective import Objective


def merge_members(by_name: Mapping[str, Any]) -> Any:
    """The trees of the members as one tree."""
    assert SOLE not in by_name or len(by_name) == 1
    return by_name[SOLE] if SOLE in by_name else dict(by_name)


def split_members(tree: Any, names: Iterable[str]) -> dict[str, Any]:
    """The tree of each member by name: the inverse of `merge_members`."""
    return {name: tree if name == SOLE else tree[name] for name in names}


def losses_of(loss: jax.Array, metrics: Mapping[str, jax.Array], names: Iterable[str]) -> jax.Array:
    """The loss of each member, [..., members], from what the objective of all of them returns."""
    by_name = {name: loss if name == SOLE else metrics[f"loss/{name}"] for name in names}
    return jnp.stack(list(by_name.values()), axis=-1)


def join_objectives(members: Mapping[str, Objective]) -> Objective:
    """The objective with the sum of the members' losses.

    No parameter is shared, so the gradient of a member is that of its own loss. Only `loss` differs
    between members: `prepare` and `targets` are those of the first member. Metrics: the parts of
    the loss and `loss` are means over members; `loss/<name>` is the total of one member.
    """
    if SOLE in members:
        return members[SOLE]

    def loss(params, batch, counts, key, targets):
        by_member = {}
        for name, member in members.items():
            with jax.named_scope("~" + name):
                by_member[name] = member.loss(params[name], batch, counts, key, targets)
        totals = {f"loss/{name}": total for name, (total, _) in by_member.items()}
        stacked = jnp.stack(list(totals.values()))
        parts = jax.tree.map(
            lambda *values: jnp.stack(values).mean(), *(parts for _, parts in by_member.values())
        )
        return stacked.sum(), parts | totals | {"loss": stacked.mean()}

    first = next(iter(members.values()))
    return first._replace(loss=loss, members=tuple(members))


def join_optimizer(
    optimizer: optax.GradientTransformation, names: Iterable[str]
) -> optax.GradientTransformation:
    """Applies `optimizer` to every member separately, so that clipping is per member.

    `is_applied` of its update is a dict of flags by name.
    """
    names = tuple(names)
    if SOLE in names:
        return optimizer
    update_one = optax.with_extra_args_support(optimizer).update

    def init(params):
        return {name: optimizer.init(params[name]) for name in names}

    def update(updates, state, params=None, *, is_applied=None, **_):
        assert params is not None
        changes, states = {}, {}
        for name in names:
            flag = None if is_applied is None else is_applied[name]
            changes[name], states[name] = update_one(
                updates[name], state[name], params[name], is_applied=flag
            )
        return changes, states

    return optax.GradientTransformationExtraArgs(init, update)
