"""Reads the metrics of steps on the host: steps skipped in a row, and spikes of the loss.

The step itself decides what it skips (`step.make_train_step`). This module counts it, and sets the
limit of the loss above which a step is skipped or reported. It does not stop training.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from tinybert_jax.config.stages import StageSection

_WINDOW = 100  # steps whose losses have a median
_LEAST = 20  # losses of which a median says something


class Found(NamedTuple):
    """A step that is worth a line."""

    step: int  # completed steps after it
    is_skipped: bool
    losses: list[float]  # one entry, or one per model
    limits: list[float] | None  # of the losses; None: spikes are not looked for

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.losses).all())

    @property
    def is_spike(self) -> bool:
        """Whether a loss is above its limit, and all are finite."""
        if self.limits is None or not self.is_finite:
            return False
        return bool(np.greater(self.losses, np.asarray(self.limits, np.float32)).any())


class Skips:
    """Counts the steps in a row that each model skips.

    Metrics are read every few steps, when all but the last step have long been computed, so that
    the device never waits. While a model skips, `is_alert` asks that every step is recorded before
    the hooks run. What `look` finds depends on step numbers alone, not on when a run was resumed.
    """

    def __init__(self, section: StageSection, num_models: int, known: dict[str, Any] | None):
        known = known or {}
        self.stop_after, self.policy = section.stop_after_skipped, section.spikes
        self.factor, self.every = section.spike_factor, max(self.stop_after // 2, 1)
        self.in_row: list[int] = known.get("in_row", [0] * num_models)
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []
        # Spikes. A limit holds for the steps after `since`; the one before it for the others.
        num_losses = num_models if self.policy == "skip" else 1
        if len(known.get("limits", [[0.0] * num_losses])[0]) != num_losses:
            known = {}  # the policy has changed: its losses are of other models
        self.losses: list[tuple[int, list[float]]] = known.get("losses", [])
        self.since: int = known.get("since", 0)
        self.limits: list[list[float]] = known.get("limits", [[float("inf")] * num_losses] * 2)

    @property
    def is_alert(self) -> bool:
        return any(self.in_row) or self.stop_after == 1

    @property
    def is_over(self) -> bool:
        """Whether a model has skipped too many steps in a row."""
        return max(self.in_row) >= self.stop_after

    @property
    def limit(self) -> np.ndarray | None:
        """The limit of the next step, fp32 [models]; None: only what is not finite is skipped."""
        return np.asarray(self.limits[1], np.float32) if self.policy == "skip" else None

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        names = ("in_row", "losses", "since", "limits")
        return {name: getattr(self, name) for name in names}

    def record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        read = {"skipped": metrics["skipped"], "losses": metrics.get("losses", metrics["loss"])}
        self.pending.append((step, read))

    def look(self, step: int) -> list[Found]:
        """Counts the recorded steps, if it is time to; returns those that skipped or had a spike.

        Time is every few steps, and whenever the last completed step is recorded.
        """
        is_time = step % self.every == 0
        if not is_time and not self.is_current(step):
            return []
        recorded, self.pending = jax.device_get(self.pending), []
        found = [self._count(int(number), metrics) for number, metrics in recorded]
        if is_time and self.policy and step != self.since:
            self._set_limits(step)
        return [step for step in found if step is not None]

    def is_current(self, step: int) -> bool:
        """Whether the last completed step is recorded and not yet counted."""
        return bool(self.pending) and self.pending[-1][0] == step

    def _count(self, step: int, metrics: dict[str, np.ndarray]) -> Found | None:
        flags = np.reshape(metrics["skipped"], -1)
        self.in_row = [(n + 1) * bool(f) for n, f in zip(self.in_row, flags, strict=True)]
        losses = np.reshape(metrics["losses"], -1).astype(float).tolist()
        limits = self.limits[int(step > self.since)] if self.policy else None
        found = Found(step, bool(flags.any()), losses, limits)
        if self.policy and found.is_finite:
            self.losses = [*self.losses, (step, losses)][-_WINDOW - 1 :]
        return found if found.is_skipped or found.is_spike else None

    def _set_limits(self, step: int) -> None:
        """The limits of the steps after `step`, from the losses of the steps before it."""
        known = [losses for number, losses in self.losses if number < step][-_WINDOW:]
        if len(known) < _LEAST:
            return
        medians = np.median(known, axis=0)
        limits = np.where(medians > 0, self.factor * medians, np.inf).tolist()
        self.since, self.limits = step, [self.limits[1], limits]
