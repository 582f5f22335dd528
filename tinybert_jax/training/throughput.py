"""What a stage's steps come to, line by line: losses, rates, the share of the peak, time left."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from tinybert_jax.batches.batch import Batch
from tinybert_jax.performance import host
from tinybert_jax.training.metric_log import MetricLog
from tinybert_jax.training.step import TrainState

_TIDY_SECONDS = 30  # far more than the step whose page faults it costs


class Meter:
    """Averages step metrics and turns them into rates, leaving pauses out of the clock.

    The first step, which compiles, is out of it too, unless a line falls on it.
    """

    def __init__(
        self,
        log: MetricLog,
        stage: str,
        flops_per_token: Callable[[int], float],
        num_steps: int,
        start_step: int,
        pending: Sequence[Any],
        *,
        log_every: int,
        peak_flops: float,
    ):
        self.log, self.stage, self.flops_per_token = log, stage, flops_per_token
        self.log_every, self.num_steps, self.peak_flops = log_every, num_steps, peak_flops
        # (metrics, rows, width) of each step since the last line; a resume brings the first ones.
        self.pending: list[tuple[dict[str, Any], int, int]] = [tuple(step) for step in pending]
        self.num_untimed, self.is_first = len(self.pending), True
        self.last_step, self.since, self.pause = start_step, time.perf_counter(), 0.0
        self.tidied = self.since

    def record(self, step: int, batch: Batch, metrics: dict[str, jax.Array]) -> None:
        num_rows, width = batch.shape
        self.pending.append((metrics, num_rows, width))
        is_told = step % self.log_every == 0 or step == self.num_steps
        if self.is_first and not is_told:
            jax.block_until_ready(metrics)
            self.since, self.pause = time.perf_counter(), 0.0
            self.num_untimed += 1
        self.is_first = False
        if not is_told:
            return
        values = self._average(step)
        self.log.write("train", self.stage, step, values)
        self.log.progress(self.stage, step, self.num_steps, values)
        self.last_step, self.pause, self.num_untimed = step, 0.0, 0
        self.since = time.perf_counter()
        if self.since - self.tidied > _TIDY_SECONDS:
            host.give_back_freed_memory()
            self.tidied = self.since
        self.pending.clear()

    def snapshot(self) -> list[tuple[dict[str, float], int, int]]:
        """The steps that no line tells of yet, as plain numbers; raises where one is not finite."""
        fetched = jax.device_get(self.pending)
        plain = [({n: float(v) for n, v in m.items()}, rows, width) for m, rows, width in fetched]
        for values, _, _ in plain:
            if not np.isfinite([values["loss"], values["grad_norm"]]).all():
                raise FloatingPointError(
                    f"{self.stage}: expected a finite loss and gradient, got "
                    f"{values['loss']} and {values['grad_norm']} after step {self.last_step}; "
                    f"lower {self.stage}.learning_rate. The last checkpoint before is kept"
                )
        return plain

    def _average(self, step: int) -> dict[str, float]:
        steps = self.snapshot()
        seconds = max(time.perf_counter() - self.since - self.pause, 1e-9)
        timed = steps[self.num_untimed :]
        tokens = sum(metrics["num_tokens"] for metrics, _, _ in timed)
        flops = sum(m["num_tokens"] * self.flops_per_token(width) for m, _, width in timed)
        all_tokens = sum(metrics["num_tokens"] for metrics, _, _ in steps)
        means = {
            name: float(np.mean([metrics[name] for metrics, _, _ in steps]))
            for name in steps[0][0]
            if name not in ("num_tokens", "learning_rate")
        }
        return means | {
            "learning_rate": steps[-1][0]["learning_rate"],
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - all_tokens / sum(rows * width for _, rows, width in steps),
            "mfu": flops / seconds / self.peak_flops,
            "seconds": seconds,
            "seconds_left": seconds / max(len(timed), 1) * (self.num_steps - step),
        }

    @contextlib.contextmanager
    def paused(self, state: TrainState) -> Iterator[None]:
        """Leaves what runs inside out of the clock; work still in flight belongs to training."""
        jax.block_until_ready(state)
        start = time.perf_counter()
        yield
        self.pause += time.perf_counter() - start
