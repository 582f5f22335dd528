"""The one training loop. It knows steps, batches and hooks, and nothing of what is trained."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

Hook = Callable[[int, Any], bool]  # (steps done, state) -> stop here


def fit(
    state: Any,
    step_fn: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]],
    batches: Iterator[Any],
    *,
    start_step: int,
    num_steps: int,
    record: Callable[[int, Any, dict[str, jax.Array]], None],
    is_due: Callable[[int], bool] = lambda step: False,
    hooks: Sequence[Hook] = (),
) -> Any:
    """Runs steps `start_step` to `num_steps`; `record(steps done, batch, metrics)` runs one behind.

    The device works on step n while the host makes batch n + 1 and records step n − 1, so the loop
    never waits for a number it does not need; only where `is_due(steps done)`, because a hook will
    save, step n is on record before the hooks run. A hook that returns True ends the run.
    """
    previous = None
    for step in range(start_step, num_steps):
        batch = next(batches)
        state, metrics = step_fn(state, batch)
        if previous is not None:
            record(*previous)
        previous = (step + 1, batch, metrics)
        if is_due(step + 1):
            record(*previous)
            previous = None
        if any([hook(step + 1, state) for hook in hooks]):
            break
    if previous is not None:
        record(*previous)
    return state
