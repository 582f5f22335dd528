"""Models of several sizes that learn side by side: one batch, one pass of their teacher.

Parameters, gradients and optimizer state of a family are dicts by member. What stands alone has
the name `SOLE`, and its trees have no dict around them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tinybert_jax.config.models import SOLE
from tinybert_jax.objectives.objective import Objective


def merge_members(by_name: Mapping[str, Any]) -> Any:
    """What belongs to each member as one tree."""
    assert SOLE not in by_name or len(by_name) == 1
    return by_name[SOLE] if SOLE in by_name else dict(by_name)


def split_members(tree: Any, names: Iterable[str]) -> dict[str, Any]:
    """What belongs to each member, by name: the inverse of `merge_members`."""
    return {name: tree if name == SOLE else tree[name] for name in names}


def join_objectives(members: Mapping[str, Objective]) -> Objective:
    """The sum of the members' losses: no parameter is shared, so each gets its own gradient.

    Members differ in their `loss` alone: batch, corruption and the teacher's pass are the first's.
    Metrics: each part of the loss and `loss` are means over members, `loss/<name>` is a member's
    own total.
    """
    if SOLE in members:
        return members[SOLE]

    def loss(params, batch, counts, key, targets):
        each = {}
        for name, member in members.items():
            with jax.named_scope("~" + name):
                each[name] = member.loss(params[name], batch, counts, key, targets)
        totals = {f"loss/{name}": total for name, (total, _) in each.items()}
        every = jnp.stack(list(totals.values()))
        parts = jax.tree.map(
            lambda *values: jnp.stack(values).mean(), *(parts for _, parts in each.values())
        )
        return every.sum(), parts | totals | {"loss": every.mean()}

    first = next(iter(members.values()))
    return first._replace(loss=loss, members=tuple(members))


def join_optimizer(
    optimizer: optax.GradientTransformation, names: Iterable[str]
) -> optax.GradientTransformation:
    """Each member's own `optimizer`: what it clips is that member's gradient."""
    names = tuple(names)
    if SOLE in names:
        return optimizer

    def init(params):
        return {name: optimizer.init(params[name]) for name in names}

    def update(updates, state, params=None):
        assert params is not None
        changes, states = {}, {}
        for name in names:
            changes[name], states[name] = optimizer.update(updates[name], state[name], params[name])
        return changes, states

    return optax.GradientTransformation(init, update)
