"""The training loop of all stages: runs steps, records metrics, calls hooks."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

Hook = Callable[[int, Any], bool]  # (completed steps, state) -> whether to end training


def fit(
    state: Any,
    step_fn: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]],
    batches: Iterator[Any],
    *,
    start_step: int,
    num_steps: int,
    record: Callable[[int, Any, dict[str, jax.Array]], None],
    is_new: Callable[[Any], bool] = lambda batch: False,
    compile_step: Callable[[int, Any, Any], None] = lambda step, state, batch: None,
    is_due: Callable[[int], bool] = lambda step: False,
    hooks: Sequence[Hook] = (),
) -> Any:
    """Runs steps until `num_steps`; calls `record(completed steps, batch, metrics)` one step late.

    While the device computes step n, the host makes batch n + 1 and records step n − 1, so the loop
    never waits for metrics that it does not need. If `is_due(completed steps)`, because a hook will
    save, step n is recorded before the hooks run. So it is before `compile_step(completed steps,
    state, batch)`, which prepares for a batch that `is_new`: what a stop saves then is complete. A
    hook that returns True ends training.
    """
    previous = None
    for step in range(start_step, num_steps):
        batch = next(batches)
        if is_new(batch):
            if previous is not None:
                record(*previous)
            previous = None
            compile_step(step, state, batch)
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
