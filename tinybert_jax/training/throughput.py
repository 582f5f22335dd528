"""Averages the steps of a stage into log lines: losses, rates, share of peak FLOP/s, time left."""

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

_NO_MEANS = ("num_tokens", "learning_rate", "skipped", "losses")  # metrics of a step

_SILENCE = 20  # seconds to the first line of a stage, above which a step's time is told before it
_TRIM_SECONDS = 30  # seconds between malloc_trim calls; each costs about one step


class Meter:
    """Averages step metrics and turns them into rates; pauses are not timed.

    The first step, which compiles, is not timed either, unless a log line is due at that step.
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
        # (metrics, rows, width) of every step since the last line; a checkpoint restores the first.
        self.pending: list[tuple[dict[str, Any], int, int]] = [tuple(step) for step in pending]
        self.num_untimed, self.num_recorded = len(self.pending), 0
        self.last_step, self.start, self.pause = start_step, time.perf_counter(), 0.0
        self.last_trim = self.start

    def record(self, step: int, batch: Batch, metrics: dict[str, jax.Array]) -> None:
        num_rows, width = batch.shape
        self.log.at_step(step, self.num_steps)
        self.pending.append((metrics, num_rows, width))
        is_logged = step % self.log_every == 0 or step == self.num_steps
        self.num_recorded += 1
        if is_logged:
            self._log_pending(step, self.num_steps - step)
        elif self.num_recorded == 1:
            jax.block_until_ready(metrics)
            self.start, self.pause = time.perf_counter(), 0.0
            self.num_untimed += 1
        elif self.num_recorded == 2:
            jax.block_until_ready(metrics)
            seconds = time.perf_counter() - self.start - self.pause
            if seconds * (self.log_every - step % self.log_every) > _SILENCE:
                self.log.foresee(self.stage, seconds, self.num_steps - step)

    def finish(self, step: int) -> None:
        """Logs the steps since the last line, for training that ends before `num_steps`."""
        if self.pending:
            self._log_pending(step, 0)

    def _log_pending(self, step: int, num_left: int) -> None:
        values = self._average(num_left)
        self.log.write("train", self.stage, step, values)
        self.log.progress(self.stage, step, self.num_steps, values)
        self.last_step, self.pause, self.num_untimed = step, 0.0, 0
        self.start = time.perf_counter()
        if self.start - self.last_trim > _TRIM_SECONDS:
            host.return_freed_memory()
            self.last_trim = self.start
        self.pending.clear()

    def snapshot(self) -> list[tuple[dict[str, Any], int, int]]:
        """The steps that are not logged yet, as plain numbers."""
        fetched = jax.device_get(self.pending)
        return [
            ({name: np.asarray(v).tolist() for name, v in m.items()}, rows, width)
            for m, rows, width in fetched
        ]

    def _average(self, num_left: int) -> dict[str, float]:
        steps = self.snapshot()
        seconds = max(time.perf_counter() - self.start - self.pause, 1e-9)
        timed = steps[self.num_untimed :]
        tokens = sum(metrics["num_tokens"] for metrics, _, _ in timed)
        flops = sum(m["num_tokens"] * self.flops_per_token(width) for m, _, width in timed)
        all_tokens = sum(metrics["num_tokens"] for metrics, _, _ in steps)
        num_skipped = sum(int(np.sum(metrics.get("skipped", 0))) for metrics, _, _ in steps)
        means = {
            name: _mean_of_finite([metrics[name] for metrics, _, _ in steps])
            for name in steps[0][0]
            if name not in _NO_MEANS
        }
        return (
            means
            | ({"skipped": num_skipped} if num_skipped else {})
            | {
                "learning_rate": steps[-1][0]["learning_rate"],
                "tokens_per_second": tokens / seconds,
                "padding_share": 1 - all_tokens / sum(rows * width for _, rows, width in steps),
                "mfu": flops / seconds / self.peak_flops,
                "seconds": seconds,
                "seconds_left": seconds / max(len(timed), 1) * num_left,
            }
        )

    @contextlib.contextmanager
    def paused(self, state: TrainState) -> Iterator[None]:
        """Does not time the block; first waits for `state`, whose computation is timed."""
        jax.block_until_ready(state)
        start = time.perf_counter()
        yield
        self.pause += time.perf_counter() - start


def _mean_of_finite(values: Sequence[float]) -> float:
    """The mean without the steps that were skipped because a value was not finite."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else np.nan
