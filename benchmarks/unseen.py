"""Runs a config, then scores all models of the run on labelled text that the run never read.

    TEACHER=<all-MiniLM-L6-v2 folder> TINYBERT_DATA=<data> python benchmarks/unseen.py \
        configs/distill/tagging.yaml $TINYBERT_DATA/ner/bc5cdr/devel.tsv [key.path=value …]

The run chooses checkpoints, the teacher and thresholds on the config's dev set, which has to be a
part of the training text (`task.dev_share`). A finished run is only scored. The scores are means
± deviations over seeds; "gap closed" is (student − alone) / (teacher − alone) with the teacher that
taught. The run has to train its teacher. Latency is the median of 200 calls of the Python class
with 1 × 32 tokens; each round calls every model once.
"""

import argparse
import functools
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

import tinybert_jax
from tinybert_jax.huggingface.folder import read_model
from tinybert_jax.inference.predict import READING_SETTINGS, evaluate_file
from tinybert_jax.models.params import num_parameters
from tinybert_jax.performance.flops import num_encoder_parameters
from tinybert_jax.performance.latency import measure_in_turn

NUM_ROUNDS, LENGTH = 200, 32
CLASSES = {
    "SequenceClassification": tinybert_jax.TinyBertForSequenceClassification,
    "TokenClassification": tinybert_jax.TinyBertForTokenClassification,
}


class Scores(NamedTuple):
    """The scores of the seeds of one model on the unseen text."""

    role: str
    name: str
    folder: Path  # the teacher that taught, or the first seed of a student
    values: list[float]  # one per seed
    value: float  # of the teacher that taught, or the mean over the seeds of a student

    def shown(self) -> str:
        if len(self.values) == 1:
            return f"{self.value:.4f}"
        spread = f"{statistics.mean(self.values):.4f} ± {statistics.stdev(self.values):.4f}"
        return f"{self.value:.4f} (of {spread})" if self.role == "teacher" else spread


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("data", help="labelled text that the config does not name")
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    parser.add_argument("--metric", help="default: the one that chose the checkpoints")
    args = parser.parse_intermixed_args()
    command = [sys.executable, "-m", "tinybert_jax", "run", args.config, *args.settings]
    subprocess.run(command, check=True)
    shown = subprocess.run([*command, "--print-config"], check=True, capture_output=True, text=True)
    config = yaml.safe_load(shown.stdout)
    run = Path(config["run_dir"])
    results = yaml.safe_load((run / "results.json").read_text())
    metric = args.metric or results["metric"]
    settings = {
        name: config["task"][name]
        for name in READING_SETTINGS
        if config["task"].get(name) not in (None, [])
    }

    def evaluate(folder: Path) -> float:
        return evaluate_file(str(folder), args.data, settings=settings)[metric]

    trained = [model for model in results["models"] if model["stage"] is not None]
    scores = [score(run, config["seed"], model, evaluate) for model in trained]
    print_table(scores, metric)


def score(run: Path, seed: int, model: dict, evaluate: Callable[[Path], float]) -> Scores:
    """The scores of a model of results.json that the run trained; `seed`: the first one."""
    stage = run / "models" / model["stage"]
    is_member = model["role"] != "teacher" and not stage.is_dir()
    first = stage.with_name(f"{stage.name}-{model['name']}") if is_member else stage
    seeds = [
        first.with_name(f"{first.name}-seed-{seed + i}")
        for i in range(len(model.get("by_seed", [])))
    ]
    if model["role"] != "teacher":
        seeds[:1] = [first]
    values = [evaluate(folder) for folder in seeds or [first]]
    value = evaluate(first) if model["role"] == "teacher" else statistics.mean(values)
    return Scores(model["role"], model["name"], first, values, value)


def print_table(scores: list[Scores], metric: str) -> None:
    latencies = measure_latencies([row.folder for row in scores])
    teacher = next(row for row in scores if row.role == "teacher")
    alone = {row.name: row.value for row in scores if row.role == "baseline"}
    print(f"| model | parameters | in layers | latency | {metric} | kept | gap closed |")
    print("|---|---|---|---|---|---|---|")
    for row, (milliseconds, parameters) in zip(scores, latencies, strict=True):
        kept = closed = ""
        if row.role == "student":
            kept = f"{row.value / teacher.value:.1%}"
            if row.name in alone and teacher.value > alone[row.name]:
                lost = teacher.value - alone[row.name]
                closed = f"{(row.value - alone[row.name]) / lost:.1%}"
        name = {"baseline": f"{row.name} alone"}.get(row.role, f"{row.role} {row.name}")
        layers = num_encoder_parameters(read_model(row.folder).config)
        print(
            f"| {name} | {parameters / 1e6:.2f} M | {layers / 1e6:.2f} M | {milliseconds:.2f} ms "
            f"| {row.shown()} | {kept} | {closed} |"
        )


def measure_latencies(folders: list[Path]) -> list[tuple[float, int]]:
    """Median milliseconds of a call, and the number of parameters, of each model."""
    sources = [read_model(folder) for folder in folders]
    models = [
        CLASSES[source.head.kind].from_pretrained(folder)
        for source, folder in zip(sources, folders, strict=True)
        if source.head
    ]
    ids = np.full((1, LENGTH), 7)
    calls = [functools.partial(lambda model: model(ids)["logits"], model) for model in models]
    latencies = measure_in_turn(calls, NUM_ROUNDS)
    return [
        (latency.median, num_parameters(model.params))
        for latency, model in zip(latencies, models, strict=True)
    ]


if __name__ == "__main__":
    main()
