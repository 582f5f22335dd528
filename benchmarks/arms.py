"""Runs a comparison of arms on some data sets with `tinybert run`, and prints one table of them.

    TEACHER=<all-MiniLM-L6-v2 folder> TINYBERT_DATA=<data> python benchmarks/arms.py starts

In the repository's root. benchmarks/arms.yaml lists the comparisons: data sets (a config, or a cell
of benchmarks/cells.py), the settings of a teacher that all arms share, and the settings of each
arm. Each run has a folder and a log under --runs; what is done is not done again. `--together 6`
runs so many at one time, to fill a GPU or its host. Further arguments are settings for all runs
that have the section, over their own: `compute.unroll_layers=true`.

The scores of students are means ± deviations over seeds, those of teachers the best seed's. The
difference is that to the first arm of these, with a 95 % interval from the same resamples of the
dev rows.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from cells import FURTHER, cell_settings

from tinybert_jax.config.load import load
from tinybert_jax.metrics.intervals import interval
from tinybert_jax.runs.preflight import read_run
from tinybert_jax.runs.scoring import evaluated_models, score_seeds

_ARMS = Path(__file__).with_name("arms.yaml")
# In the settings of arms: the folder of that teacher, and a cell's text without labels.
_SHARED_TEACHER, _FURTHER_TEXT = "SHARED_TEACHER", "FURTHER_TEXT"


class Arm(NamedTuple):
    data: str
    name: str
    config: str
    folder: Path
    settings: list[str]

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def run(self) -> int:
        """The command's exit status; its output goes to the log beside the folder."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tinybert_jax", "run", self.config]
        with self.log.open("a") as log:
            return subprocess.run(
                [*command, *self.settings, f"run_dir={self.folder}"], stdout=log, stderr=log
            ).returncode


def main() -> int:
    """1 if an arm failed; the others are in the table."""
    comparisons = yaml.safe_load(_ARMS.read_text())
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("comparison", choices=list(comparisons))
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--together", type=int, default=1, help="arms at one time")
    parser.add_argument("--data", action="append", help="only this data set; may be repeated")
    parser.add_argument(
        "--arm",
        action="append",
        help="only this arm; may be repeated",
    )
    parser.add_argument("--tune", action="store_true", help="dev rows of cells that are not theirs")
    args = parser.parse_intermixed_args()
    if args.together < 1:
        parser.error(f"--together: expected 1 or more, got {args.together}")
    # Else the first of several processes on one GPU takes three quarters of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    comparison = comparisons[args.comparison]
    known = comparison.get("data", {"": {}})
    if unknown := set(args.data or ()) - set(known):
        parser.error(f"--data: expected one of {list(known)}, got {sorted(unknown)}")
    if unknown := set(args.arm or ()) - set(comparison["arms"]):
        parser.error(f"--arm: expected one of {list(comparison['arms'])}, got {sorted(unknown)}")
    arms = comparison["arms"].items()
    chosen_arms = {name: own for name, own in arms if not args.arm or name in args.arm}
    folder = args.runs / (args.comparison + ("-tune" if args.tune else ""))
    chosen_data = {name: own for name, own in known.items() if not args.data or name in args.data}
    chosen = {**comparison, "data": chosen_data, "arms": chosen_arms}
    teachers, arms = plan(chosen, folder, args.settings, is_tuning=args.tune)
    with concurrent.futures.ThreadPoolExecutor(args.together) as pool:
        failed = [
            arm for arm, status in zip(teachers, pool.map(Arm.run, teachers), strict=True) if status
        ]
        arms = [arm for arm in arms if arm.data not in {teacher.data for teacher in failed}]
        failed += [arm for arm, status in zip(arms, pool.map(Arm.run, arms), strict=True) if status]
    print("| data | arm | model | score | difference | of the teacher's | minutes |")
    print("|---|---|---|---|---|---|---|")
    first = {arm.data: arm for arm in reversed(arms)}  # the arm that the others are compared with
    references: dict[tuple[str, ...], tuple[float, np.ndarray]] = {}
    for arm in arms:
        is_first = arm == first[arm.data]
        for line in [] if arm in failed else lines(arm, references, is_first=is_first):
            print(line, flush=True)
    for arm in failed:
        print(f"{arm.data} {arm.name}: failed, see {arm.log}")
    return int(bool(failed))


def plan(
    comparison: Mapping[str, Any], folder: Path, further: list[str], *, is_tuning: bool = False
) -> tuple[list[Arm], list[Arm]]:
    """(the runs that train a shared teacher, the arms) of a comparison; writes the cells' text."""
    teachers, arms = [], []
    for data, given in comparison.get("data", {"": {}}).items():
        place = folder / data
        config = given.get("config", comparison.get("config"))
        settings = given.get("settings", [])
        if "cell" in given:
            name, num_rows = given["cell"]
            config, cell = cell_settings(name, num_rows, place, is_tuning=is_tuning)
            settings = [*cell, *settings]
        if "teacher" in comparison:
            own = _with_further([*settings, *comparison["teacher"]], further)
            teachers.append(Arm(data, "teacher", config, place / "teacher", own))
        for name, changes in comparison["arms"].items():
            own = _with_further([*settings, *comparison.get("settings", []), *changes], further)
            paths = {_SHARED_TEACHER: f"{place}/teacher/models/finetune"}
            paths[_FURTHER_TEXT] = f"{place / FURTHER}"
            for word, path in paths.items():
                own = [text.replace(word, path) for text in own]
            own_folder = place / name.replace(",", "").replace(" ", "-")
            arms.append(Arm(data, name, config, own_folder, own))
    return teachers, arms


def _with_further(settings: list[str], further: list[str]) -> list[str]:
    """`settings`, then those of `further` whose section the run has."""
    left_out = {text.removesuffix("=null") for text in settings if text.endswith("=null")}
    if any(text.startswith("teacher.finetuned=") for text in settings):
        left_out.add("finetune")
    return [*settings, *(text for text in further if text.split(".")[0] not in left_out)]


def lines(
    arm: Arm, references: dict[tuple[str, ...], tuple[float, np.ndarray]], *, is_first: bool
) -> Iterator[str]:
    """The arm's rows of the table.

    `references`: by data set, role and member the score of the first arm and its resamples.
    """
    results: dict[str, Any] = json.loads((arm.folder / "results.json").read_text())
    metric, minutes = results["metric"], sum(results["seconds"].values()) / 60
    config = load(arm.folder / "config.yaml")
    run = read_run(config, config.stages)
    teacher = None
    for model in evaluated_models(run):
        scores, _, _ = score_seeds(run, model)
        values = [by_name[metric] for by_name in scores.by_seed]
        is_teacher = model.role == "teacher"
        value = values[scores.best] if is_teacher else statistics.mean(values)
        shown = f"{value:.4f}"
        if len(values) > 1 and not is_teacher:
            shown += f" ± {statistics.stdev(values):.4f}"
        low, high = interval(scores.resampled[metric])
        key = (arm.data, model.role, model.member)
        difference = kept = ""
        if is_first:
            references[key] = value, scores.resampled[metric]
        elif key in references:
            other, resampled = references[key]
            ends = interval(scores.resampled[metric] - resampled)
            difference = f"{value - other:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}]"
        if is_teacher:
            teacher = value
        elif teacher:
            kept = f"{value / teacher:.1%}"
        name = f"{model.role} {model.member}".strip()
        yield (
            f"| {arm.data} | {arm.name} | {name} | {shown} [{low:.4f}, {high:.4f}] | {difference} "
            f"| {kept} | {minutes:.1f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
