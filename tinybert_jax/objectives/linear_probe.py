"""A linear probe: the head that fits the features of an encoder, for training to start from.

Fine-tuning from a random head first moves the encoder towards a head that means nothing yet, and
a rate that is right for the encoder is far too low for the head; a head that is fitted beforehand
spares both (Kumar et al. 2022, arXiv 2202.10054).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

_NUM_STEPS = 100

Linear = Mapping[str, jax.Array]  # kernel [dim, outputs], bias [outputs]


def fit_head(
    start: Linear,
    features: Float[np.ndarray, "units dim"],
    loss: Callable[[Float[Array, "units outputs"]], jax.Array],
    strength: float,
) -> dict[str, jax.Array]:
    """The head with the least `loss(logits)` + penalty, near the head `start`.

    `loss`: convex, a mean over units. The penalty is the squared change of the kernel, times the
    mean squared norm of the features, divided by 2 · `strength` · units: `strength` is the C of a
    logistic regression whose features have the norm 1. 100 steps of L-BFGS.
    """
    inputs = jnp.asarray(features, jnp.float32)
    weight = jnp.mean(jnp.sum(inputs**2, axis=1)) / (2 * strength * len(features))
    solver = optax.lbfgs()

    def objective(head: Linear) -> jax.Array:
        logits = inputs @ head["kernel"] + head["bias"][None]
        change = head["kernel"] - start["kernel"]
        return loss(logits) + weight * jnp.sum(change**2)

    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(_, carry):
        head, state = carry
        value, grad = value_and_grad(head, state=state)
        updates, state = solver.update(
            grad, state, head, value=value, grad=grad, value_fn=objective
        )
        return optax.apply_updates(head, updates), state

    @jax.jit
    def fit(head: Linear) -> dict[str, jax.Array]:
        return jax.lax.fori_loop(0, _NUM_STEPS, step, (head, solver.init(head)))[0]

    return fit({name: jnp.asarray(leaf, jnp.float32) for name, leaf in start.items()})
