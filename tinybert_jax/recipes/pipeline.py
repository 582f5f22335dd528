"""Runs the stages of a config in order, compares the models, exports one and writes the report."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinybert_jax.config.run import RunConfig, StagePlan
from tinybert_jax.config.stages import (
    BASELINE,
    FINETUNE,
    GENERAL,
    INTERMEDIATE,
    PREDICTION,
    PRETRAIN,
    STAGE_NAMES,
    Stage,
)
from tinybert_jax.data.splits import describe_labels
from tinybert_jax.recipes import distill, finetune, pretrain
from tinybert_jax.report.page import write_report
from tinybert_jax.runs import estimate
from tinybert_jax.runs.preflight import open_run, read_run, reads_task_teacher
from tinybert_jax.runs.results import HELDOUT_METRICS, best_seed, collect_results, console_summary
from tinybert_jax.runs.run import Run, RunTask, check_teacher, export_models
from tinybert_jax.training.metric_log import read_rows

_RECIPES = {
    PRETRAIN: pretrain.main,
    FINETUNE: finetune.main,
    GENERAL: distill.main,
    INTERMEDIATE: distill.main,
    PREDICTION: distill.main,
    BASELINE: finetune.main,
}
# The first of these stages that is done is exported to `hf`: students before teachers.
_EXPORT_ORDER = (PREDICTION, INTERMEDIATE, GENERAL, FINETUNE, PRETRAIN, BASELINE)


def main(
    config: RunConfig,
    stages: Sequence[str] = STAGE_NAMES,
    command: str = "",
    *,
    is_profiled: bool = False,
) -> Path:
    """Runs the given stages that the config has and that are not done; returns the run folder.

    `command`: the command line, for `results.json`. Raises ValueError where the config has none of
    the stages or an input is wrong.
    """
    chosen = _choose_stages(config, stages)
    with open_run(config, chosen) as run:
        run = run._replace(is_profiled=is_profiled)
        if run.task:
            run.log.say(_describe_task(run.task))
        plans = [run.plans[stage.name] for stage in chosen]
        for plan in plans:
            is_new = _run_once(run, plan)
            if is_new and plan.stage is FINETUNE and reads_task_teacher(plans):
                check_teacher(run, run.task_teacher, run.teacher)
        exported = run.plans[next(s.name for s in _EXPORT_ORDER if run.is_done(s.name))]
        lines = read_rows(run.folder / "metrics.jsonl")
        summary = collect_results(run, _seconds(lines), command, _heldout(lines))
        best = {name: best_seed(summary, exported.name, name) for name in exported.members}
        export_models(
            run, {name: run.seed_folders(exported, name)[seed] for name, seed in best.items()}
        )
        (run.folder / "results.json").write_text(
            json.dumps(summary, indent=2) + "\n", encoding="utf-8"
        )
        report = write_report(run.folder)
        run.log.say(console_summary(summary))
        run.log.say(f"model:  {run.folder / 'hf'}\nreport: {report}")
        return run.folder


def describe_costs(config: RunConfig, stages: Sequence[str] = STAGE_NAMES) -> str:
    """The estimated FLOPs, memory and time of the given stages; writes nothing."""
    chosen = _choose_stages(config, stages)
    run = read_run(config, chosen)
    parts = [_describe_task(run.task)] if run.task else []
    plans = [run.plans[stage.name] for stage in chosen]
    return "\n\n".join([*parts, estimate.describe(run, plans)])


def _choose_stages(config: RunConfig, stages: Sequence[str]) -> list[Stage]:
    chosen = [stage for stage in config.stages if stage.name in stages]
    if not chosen:
        got = [stage.name for stage in config.stages]
        raise ValueError(
            f"expected a config with one of the stages {list(stages)}, got {got}; add the section "
            "of such a stage, or run another command"
        )
    return chosen


def _describe_task(task: RunTask) -> str:
    return describe_labels(task.data, task.kind.count_labels, task.kind.unit)


def _run_once(run: Run, plan: StagePlan) -> bool:
    """Runs a stage; returns False without running it where it is done already."""
    name = plan.name
    if run.is_done(name):
        profile = "; no profile of it" if run.is_profiled else ""
        run.log.say(f"{name}: done before, kept{profile}")
        return False
    start = time.perf_counter()
    _RECIPES[plan.stage](run, plan)
    seconds = time.perf_counter() - start
    run.log.write("stage", name, 0, {"seconds": seconds})
    run.log.say(f"{name}: finished in {seconds:.0f} s")
    return True


def _seconds(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Wall time of each finished stage in seconds, without the time before a kill."""
    return {line["stage"]: line["seconds"] for line in lines if line["kind"] == "stage"}


def _heldout(lines: list[dict[str, Any]]) -> dict[str, float] | None:
    """The last metrics of pretraining on held-out text; None without such text."""
    rows = [row for row in lines if row["kind"] == "eval" and row["stage"] == PRETRAIN.name]
    if not rows:
        return None
    return {name: rows[-1][name] for name in HELDOUT_METRICS if name in rows[-1]}
