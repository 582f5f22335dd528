"""Compares a run's models: scores, sizes, FLOPs, measured latency. Feeds `results.json`."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tinybert_jax import cost, metrics
from tinybert_jax.convert import hf_files, hf_folder
from tinybert_jax.data.pipeline import tokenize_task
from tinybert_jax.evaluate import make_scorer, task_metrics
from tinybert_jax.model.heads import make_classifier
from tinybert_jax.run import Run
from tinybert_jax.sections import ModelConfig
from tinybert_jax.tree import num_parameters

_LATENCY_BATCH, _LATENCY_LENGTH, _LATENCY_RUNS = 1, 32, 30


def collect(run: Run, seconds: dict[str, float], command: str) -> dict[str, Any]:
    """The content of `results.json`: every judged model of the run, and what the student kept."""
    models = []
    if run.task is not None:
        teacher = run.latest("finetune") or run.config.teacher.finetuned
        if teacher is None and run.learns_task(run.config.stages):
            teacher = run.config.teacher.path  # it has the task's head, or the run had refused it
        places = [
            ("teacher", "finetune", [teacher] if teacher else [], run.teacher),
            ("student", "prediction", _folders(run, "prediction"), run.student),
            ("baseline", "baseline", _folders(run, "baseline"), run.student),
        ]
        models = [
            _describe(run, role, stage, [Path(folder) for folder in folders], model)
            for role, stage, folders, model in places
            if folders and hf_files.has_classifier(folders[0])
        ]
    summary = {
        "name": run.config.name,
        "metric": run.score if run.task else None,
        "dev_examples": len(run.task.dev.text) if run.task else 0,
        "label_names": run.task.label_names if run.task else None,
        "models": models,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "commands": [command] if command else [],
    }
    kept = _share_kept(summary)
    return summary if kept is None else {**summary, "share_kept": kept}


def headline(summary: dict[str, Any]) -> str:
    """One line a model for the console."""
    lines = [
        f"{m['role']:<9} {summary['metric']} {m['metrics'][summary['metric']]:.4f}"
        f"{_spread(summary['metric'], m)}  "
        f"{m['num_encoder_parameters'] / 1e6:.2f} M encoder parameters  "
        f"{m['latency_ms']['median']:.1f} ms"
        for m in summary["models"]
    ]
    if "share_kept" in summary:
        lines.append(f"the student keeps {summary['share_kept']:.1%} of its teacher")
    return "\n".join(lines)


def best_seed(summary: dict[str, Any], stage: str) -> int:
    """The number of the model with the best dev score among a stage's seeds; 0 where unjudged."""
    described = next((m for m in summary["models"] if m["stage"] == stage), None)
    if described is None or "by_seed" not in described:
        return 0
    return _best(described["by_seed"], summary["metric"])


def _spread(metric: str, model: dict[str, Any]) -> str:
    if "by_seed" not in model:
        return ""
    return f" ± {model['deviation'][metric]:.4f} ({len(model['by_seed'])} seeds)"


def _folders(run: Run, stage: str) -> list[Path]:
    """The model of each seed of a stage, where it is done."""
    seeds = run.config.seeds(stage) if run.is_done(stage) else ()
    return [run.model_folder(stage, number) for number, _ in enumerate(seeds)]


def _describe(
    run: Run, role: str, stage: str, folders: list[Path], model: ModelConfig
) -> dict[str, Any]:
    """Sizes and scores; of several seeds `metrics` is the mean, `confusion` the best one's."""
    known = (getattr(run.config, name) for name in (stage, "prediction", *run.config.stages))
    section = next(section for section in known if section is not None)
    weights = hf_folder.find_folder(folders[0]).glob("model*.safetensors")  # one, or shards
    apply, init = make_classifier(model, run.data.num_outputs)
    params = [hf_files.start_params(folder, init, whole=True) for folder in folders]
    rows = tokenize_task(run.tokenizer, run.data.dev, section.max_length)
    score = make_scorer(apply, buckets=section.buckets(), pad_token_id=run.tokenizer.pad_token_id)
    logits, labels = [score(own, rows) for own in params], run.data.dev_labels
    by_seed = [task_metrics(own, labels, regression=run.is_regression) for own in logits]
    description = {
        "role": role,
        "name": f"{model.num_hidden_layers} layers × {model.hidden_size}",
        "stage": stage,
        "num_parameters": num_parameters(params[0]),
        "num_encoder_parameters": cost.num_encoder_parameters(model),
        "flops_per_token": cost.forward_flops_per_token(model, _LATENCY_LENGTH),
        "bytes_on_disk": sum(file.stat().st_size for file in weights),
        "latency_ms": _latency(
            apply, params[0], min(_LATENCY_LENGTH, model.max_position_embeddings)
        ),
        "metrics": _over_seeds(np.mean, by_seed),
    }
    if len(by_seed) > 1:
        deviation = _over_seeds(functools.partial(np.std, ddof=1), by_seed)
        description |= {"by_seed": by_seed, "deviation": deviation}
    if run.data.label_names:
        chosen = logits[_best(by_seed, run.score)].argmax(-1)
        counts = metrics.confusion_matrix(chosen, labels, run.data.num_outputs)
        description["confusion"] = counts.tolist()
    return description


def _best(by_seed: list[dict[str, float]], metric: str) -> int:
    return int(np.argmax([own[metric] for own in by_seed]))


def _over_seeds(
    summarise: Callable[[list[float]], Any], by_seed: list[dict[str, float]]
) -> dict[str, float]:
    return {name: float(summarise([own[name] for own in by_seed])) for name in by_seed[0]}


def _latency(apply, params, length: int) -> dict[str, Any]:
    """Median milliseconds of one compiled forward pass of one example."""
    ids = np.ones((_LATENCY_BATCH, length), np.int32)
    forward = jax.jit(lambda params, *inputs: apply(params, *inputs).logits)
    params = jax.device_put(params)
    times = []
    for _ in range(_LATENCY_RUNS + 3):
        start = time.perf_counter()
        forward(params, ids, ids > 0, ids * 0).block_until_ready()
        times.append(1000 * (time.perf_counter() - start))
    median = float(np.median(times[3:]))
    return {"batch": _LATENCY_BATCH, "seq_len": length, "median": round(median, 3)}


def _share_kept(summary: dict[str, Any]) -> float | None:
    scores = {m["role"]: m["metrics"][summary["metric"]] for m in summary["models"]}
    if not {"teacher", "student"} <= scores.keys() or scores["teacher"] <= 0:
        return None
    return scores["student"] / scores["teacher"]
