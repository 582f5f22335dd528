"""Several runs side by side: their files, their order, and paired differences of their scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from tinybert_jax.metrics.intervals import interval
from tinybert_jax.report.figures import Stage, read_stages
from tinybert_jax.report.run_files import (
    read_environment,
    read_resamples,
    read_results,
    read_rows,
    read_text,
)
from tinybert_jax.report.tables import (
    LOWER_IS_BETTER,
    Model,
    find_model,
    finite_number,
    metric_name,
    score_of,
    with_latency_device,
)


class RunFiles(NamedTuple):
    """What the folder of a run says; `model` is its best student, else its best model."""

    label: str
    results: dict[str, Any]
    stages: dict[str, Stage]
    config: Any
    environment: dict[str, Any]
    resamples: dict[str, Any]

    @property
    def metric(self) -> str:
        return str(self.results.get("metric"))

    @property
    def metric_name(self) -> str:
        """For readers: F1 of two classes is another metric in each run whose class differs."""
        return metric_name(self.metric, self.results)

    @property
    def model(self) -> Model | None:
        found = (find_model(self.results, role) for role in ("student", "teacher", "baseline"))
        return next((model for model in found if model), None)

    @property
    def score(self) -> float | None:
        return score_of(self.results, self.model)


def read_run_files(folder: Path, label: str) -> RunFiles:
    """Reads the folder of a finished run; ValueError where it is none."""
    environment = read_environment(folder)
    results = with_latency_device(read_results(folder), environment.get("device"))
    rows, _ = read_rows(folder / "metrics.jsonl")
    try:
        config = yaml.safe_load(read_text(folder / "config.yaml") or "")
    except yaml.YAMLError:
        config = None
    stages = {stage.name: stage for stage in read_stages(rows)}
    return RunFiles(label, results, stages, config, environment, read_resamples(folder))


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(
        f"expected each run once, got {', '.join(map(str, folders))}; leave out what stands twice"
    )


def ranked(runs: Sequence[RunFiles]) -> list[RunFiles]:
    """The runs from the best score to the worst; empty where they have several metrics."""
    scored = [run for run in runs if run.score is not None]
    if len({run.metric_name for run in scored}) != 1:
        return []
    is_lower = scored[0].metric in LOWER_IS_BETTER
    return sorted(scored, key=lambda run: (run.score or 0) * (1 if is_lower else -1))


def why_not_paired(first: RunFiles, run: RunFiles) -> str:
    """Why there is no paired difference; empty where there is one."""
    if not (_resampled(first) and _resampled(run)):
        return "a run has no resamples.json (an older version wrote it)"
    if first.resamples.get("dev") != run.resamples.get("dev"):
        return "the dev rows are not the same"
    return "" if len(_resampled(first)) == len(_resampled(run)) else "the resamples differ"


def paired_interval(first: RunFiles, run: RunFiles) -> tuple[float, float] | None:
    """The 95 % interval of the score of `run` minus that of `first`; None where not known."""
    if first.metric_name != run.metric_name or why_not_paired(first, run):
        return None
    drawn = [np.array(_resampled(own)) for own in (first, run)]
    differences = drawn[1] - drawn[0]
    return interval(differences) if np.isfinite(differences).any() else None


def _resampled(run: RunFiles) -> list[float]:
    """The run's model on each resample; NaN where a resample has no score."""
    models, model = run.resamples.get("models"), run.model or {}
    for own in models if isinstance(models, list) else ():
        if isinstance(own, dict) and all(own.get(k) == model.get(k) for k in ("role", "name")):
            values = own.get("values")
            numbers = [finite_number(v) for v in values] if isinstance(values, list) else []
            return [np.nan if v is None else v for v in numbers]
    return []
