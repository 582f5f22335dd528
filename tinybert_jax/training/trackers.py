"""Sends the rows of `metrics.jsonl` to experiment trackers as well; a tracker never stops a run."""

import importlib
import importlib.util
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinybert_jax.config.log import LogSection, TrackerName

_LAST_SECONDS = 60.0  # for which the end of a run waits until a tracker has sent everything


class Tracker(NamedTuple):
    """One service: log({metric: value}, stage, step), and close()."""

    log: Callable[[Mapping[str, float], str, int], None]
    close: Callable[[], Any]


class Trackers:
    """The trackers of a run. One that raises is left out from then on, which `say` tells once."""

    def __init__(self, open_trackers: Mapping[str, Tracker], say: Callable[[str], None]):
        self._open, self._say = dict(open_trackers), say

    def write(self, kind: str, stage: str, step: int, values: Mapping[str, Any]) -> None:
        numbers = {
            f"{stage}/{kind}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        for name in list(self._open):
            self._try(name, lambda: self._open[name].log(numbers, stage, step))  # noqa: B023

    def close(self) -> None:
        """Ends all trackers; one that has not sent its rows within a minute is left alone."""
        for name in list(self._open):
            thread = threading.Thread(
                target=self._try, args=(name, self._open[name].close), daemon=True
            )
            thread.start()
            thread.join(_LAST_SECONDS)
            if thread.is_alive():
                self._say(f"log.trackers: {name} has not finished; the run goes on without it")
        self._open.clear()

    def _try(self, name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # whatever a service raises: metrics.jsonl has the row
            self._open.pop(name, None)
            self._say(
                f"log.trackers: {name} has failed and gets no more rows, metrics.jsonl has them "
                f"all: {type(error).__name__}: {error}"
            )


NONE = Trackers({}, lambda text: None)


def check_installed(names: Sequence[TrackerName]) -> None:
    """Raises ValueError for a tracker whose package is missing."""
    for name in names:
        package = _PACKAGES[name]
        if not importlib.util.find_spec(package):
            raise ValueError(
                f"log.trackers: expected the package {package} for {name}, got none; install it "
                f"with `pip install 'tinybert-jax[{name}]'`, or remove {name}"
            )


def open_trackers(
    section: LogSection,
    run_name: str,
    folder: Path,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
) -> Trackers:
    """The trackers of the section. `settings`: of the run, which trackers show beside its curves.

    One that does not open, as when its service cannot be reached, is left out with a message.
    """
    opened: dict[str, Tracker] = {}
    for name in section.trackers:
        try:
            opened[name] = _OPEN[name](section.project, run_name, folder, settings)
        except Exception as error:  # whatever a service raises: metrics.jsonl has the rows
            say(
                f"log.trackers: {name} does not open and gets no rows, metrics.jsonl has them all: "
                f"{type(error).__name__}: {error}"
            )
    return Trackers(opened, say)


def _open_tensorboard(
    project: str, run_name: str, folder: Path, settings: Mapping[str, Any]
) -> Tracker:
    package = importlib.import_module("tensorboardX")
    writer = package.SummaryWriter(str(folder / "tensorboard"))

    def log(values: Mapping[str, float], stage: str, step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _open_wandb(project: str, run_name: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    package = importlib.import_module("wandb")
    run = package.init(project=project, name=run_name, dir=str(folder), config=dict(settings))
    known: set[str] = set()

    def log(values: Mapping[str, float], stage: str, step: int) -> None:
        if stage not in known:  # a stage counts its own steps
            run.define_metric(f"{stage}/step", hidden=True)
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            known.add(stage)
        run.log({**values, f"{stage}/step": step})

    return Tracker(log, run.finish)


def _open_trackio(
    project: str, run_name: str, folder: Path, settings: Mapping[str, Any]
) -> Tracker:
    package = importlib.import_module("trackio")
    run = package.init(project=project, name=run_name, config=dict(settings))
    return Tracker(lambda values, stage, step: run.log(dict(values), step=step), run.finish)


_OPEN = {"tensorboard": _open_tensorboard, "wandb": _open_wandb, "trackio": _open_trackio}
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
