"""A linear probe: the head that fits the features of an encoder, for training to start from.

With a random head, fine-tuning first moves the encoder towards random answers, at a rate that is
far too low for the head; a head that is fitted beforehand spares both (linear probing, then
fine-tuning: Kumar et al. 2022, arXiv 2202.10054).
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Shaped

_MAX_STEPS, _TOLERANCE = 100, 1e-5

Linear = Mapping[str, jax.Array]  # kernel [dim, outputs], bias [outputs]
# (logits [units, outputs], targets [units, …]) -> convex loss, a mean over the units
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def fit_head(
    start: Linear,
    features: Float[np.ndarray, "units dim"],
    targets: Shaped[np.ndarray, "units ..."],
    loss: Loss,
    inverse_regularization: float,
) -> dict[str, jax.Array]:
    """The head with the least loss + penalty, near the head `start`.

    The penalty is the squared change of kernel and bias, times the mean squared norm of the
    features, divided by 2 · `inverse_regularization` · units. For the cross-entropy that is the C
    of a logistic regression whose features have the norm 1. Up to 100 steps of L-BFGS. Raises
    ValueError where the features are not finite.
    """
    if not np.isfinite(features).all() or not len(features):
        raise ValueError(
            f"linear probe: expected finite features of one unit or more, got {len(features)} "
            "units, some not finite; use another model, or head_init: random"
        )
    scale = float(np.square(features, dtype=np.float64).sum(axis=1).mean())
    return _fit(
        {name: jnp.asarray(leaf, jnp.float32) for name, leaf in start.items()},
        jnp.asarray(features, jnp.float32),
        jnp.asarray(targets),
        jnp.float32(scale / (2 * inverse_regularization * len(features))),
        loss,
    )


@functools.partial(jax.jit, static_argnames="loss")
def _fit(
    start: Linear, features: jax.Array, targets: jax.Array, penalty: jax.Array, loss: Loss
) -> dict[str, jax.Array]:
    solver = optax.lbfgs()

    def objective(head: Linear) -> jax.Array:
        products = jnp.matmul(features, head["kernel"], precision=jax.lax.Precision.HIGHEST)
        changes = optax.tree.norm(optax.tree.sub(head, start), squared=True)
        return loss(products + head["bias"][None], targets) + penalty * changes

    value_and_grad = optax.value_and_grad_from_state(objective)

    def is_going_on(carry) -> jax.Array:
        _, state, _ = carry
        number = optax.tree.get(state, "count")
        slope = optax.tree.norm(optax.tree.get(state, "grad"))
        return (number == 0) | ((number < _MAX_STEPS) & (slope > _TOLERANCE))

    def step(carry):
        head, state, best = carry
        value, grad = value_and_grad(head, state=state)
        updates, state = solver.update(
            grad, state, head, value=value, grad=grad, value_fn=objective
        )
        head = optax.apply_updates(head, updates)
        # The line search may end higher than it began, and beyond fp32.
        new = optax.tree.get(state, "value")
        is_better = new < best[0]
        best = jax.tree.map(lambda a, b: jnp.where(is_better, a, b), (new, head), best)
        return head, state, best

    first = (start, solver.init(start), (objective(start), start))
    return dict(jax.lax.while_loop(is_going_on, step, first)[2][1])
