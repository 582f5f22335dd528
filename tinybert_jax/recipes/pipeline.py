"""Runs the stages of a config in order, then compares the models, exports and reports."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinybert_jax.config.run import RunConfig
from tinybert_jax.config.stages import STAGES
from tinybert_jax.data.splits import describe_labels
from tinybert_jax.recipes import distill, finetune, pretrain
from tinybert_jax.report.page import write_report
from tinybert_jax.runs import estimate
from tinybert_jax.runs.results import HELDOUT, best_seed, collect, headline
from tinybert_jax.runs.run import Run, check_teacher, open_run, publish, read_run

_RECIPES = {
    "pretrain": pretrain.main,
    "finetune": finetune.main,
    "general": distill.general,
    "intermediate": distill.intermediate,
    "prediction": distill.prediction,
    "baseline": lambda run: finetune.main(run, "baseline"),
}
# What a run is for, the best first: a student before a teacher.
_PRODUCTS = ("prediction", "intermediate", "general", "finetune", "pretrain")


def main(
    config: RunConfig,
    stages: Sequence[str] = STAGES,
    command: str = "",
    *,
    is_profiled: bool = False,
) -> Path:
    """Runs those of `stages` that the config has and that are not done; returns the run folder."""
    chosen = _chosen(config, stages)
    with open_run(config, chosen) as run:
        run = run._replace(is_profiled=is_profiled)
        if run.task:
            run.log.say(describe_labels(run.task))
        for name in chosen:
            is_new = _run_once(run, name)
            if is_new and name == "finetune" and run.learns_task(chosen):
                check_teacher(run, run.task_teacher, run.teacher)
        product = next((name for name in _PRODUCTS if run.is_done(name)), "baseline")
        lines = _lines(run)
        summary = collect(run, _seconds(lines), command, _heldout(lines))
        best = {name: best_seed(summary, product, name) for name in config.members(product)}
        publish(run, {name: run.seed_folders(product, name)[seed] for name, seed in best.items()})
        (run.folder / "results.json").write_text(
            json.dumps(summary, indent=2) + "\n", encoding="utf-8"
        )
        report = write_report(run.folder)
        run.log.say(headline(summary))
        run.log.say(f"model:  {run.folder / 'hf'}\nreport: {report}")
        return run.folder


def costs(config: RunConfig, stages: Sequence[str] = STAGES) -> str:
    """What those stages would take; writes nothing."""
    chosen = _chosen(config, stages)
    run = read_run(config, chosen)
    about = [describe_labels(run.task)] if run.task else []
    return "\n\n".join([*about, estimate.describe(run, tuple(chosen))])


def _chosen(config: RunConfig, stages: Sequence[str]) -> list[str]:
    chosen = [name for name in STAGES if name in stages and name in config.stages]
    if not chosen:
        raise ValueError(
            f"expected a config with one of the stages {list(stages)}, got {list(config.stages)}"
        )
    return chosen


def _run_once(run: Run, name: str) -> bool:
    """False for a stage that was done before."""
    if run.is_done(name):
        profile = "; no profile of it" if run.is_profiled else ""
        run.log.say(f"{name}: done before, kept{profile}")
        return False
    start = time.perf_counter()
    _RECIPES[name](run)
    seconds = time.perf_counter() - start
    run.log.write("stage", name, 0, {"seconds": seconds})
    run.log.say(f"{name}: finished in {seconds:.0f} s")
    return True


def _lines(run: Run) -> list[dict[str, Any]]:
    text = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _seconds(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Wall seconds of each finished stage, the parts before a kill left out."""
    return {line["stage"]: line["seconds"] for line in lines if line["kind"] == "stage"}


def _heldout(lines: list[dict[str, Any]]) -> dict[str, float] | None:
    """What pretraining ended with on the held-out text, if there is any."""
    judged = [line for line in lines if line["kind"] == "eval" and line["stage"] == "pretrain"]
    if not judged:
        return None
    return {name: judged[-1][name] for name in HELDOUT if name in judged[-1]}
