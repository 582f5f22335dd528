"""Compares a run's models: scores, sizes, FLOPs, measured latency. Feeds `results.json`."""

import time
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
        if teacher is None and {"intermediate", "prediction"} & set(run.config.stages):
            teacher = run.config.teacher.path  # it has the task's head, or the run had refused it
        places = [
            ("teacher", "finetune", teacher, run.teacher),
            ("student", "prediction", run.latest("prediction"), run.student),
            ("baseline", "baseline", run.latest("baseline"), run.student),
        ]
        models = [
            _describe(run, role, stage, Path(folder), model)
            for role, stage, folder, model in places
            if folder is not None and hf_files.has_classifier(folder)
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
        f"{m['role']:<9} {summary['metric']} {m['metrics'][summary['metric']]:.4f}  "
        f"{m['num_encoder_parameters'] / 1e6:.2f} M encoder parameters  "
        f"{m['latency_ms']['median']:.1f} ms"
        for m in summary["models"]
    ]
    if "share_kept" in summary:
        lines.append(f"the student keeps {summary['share_kept']:.1%} of its teacher")
    return "\n".join(lines)


def _describe(run: Run, role: str, stage: str, folder: Path, model: ModelConfig) -> dict[str, Any]:
    known = (getattr(run.config, name) for name in (stage, "prediction", *run.config.stages))
    section = next(section for section in known if section is not None)
    weights = hf_folder.find_folder(folder).glob("model*.safetensors")  # one, or shards
    apply, init = make_classifier(model, run.data.num_outputs)
    params = hf_files.start_params(folder, init, whole=True)
    rows = tokenize_task(run.tokenizer, run.data.dev, section.max_length)
    score = make_scorer(apply, buckets=section.buckets(), pad_token_id=run.tokenizer.pad_token_id)
    logits, labels = score(params, rows), run.data.dev_labels
    description = {
        "role": role,
        "name": f"{model.num_hidden_layers} layers × {model.hidden_size}",
        "stage": stage,
        "num_parameters": num_parameters(params),
        "num_encoder_parameters": cost.num_encoder_parameters(model),
        "flops_per_token": cost.forward_flops_per_token(model, _LATENCY_LENGTH),
        "bytes_on_disk": sum(file.stat().st_size for file in weights),
        "latency_ms": _latency(apply, params, min(_LATENCY_LENGTH, model.max_position_embeddings)),
        "metrics": task_metrics(logits, labels, regression=run.is_regression),
    }
    if run.data.label_names:
        counts = metrics.confusion_matrix(logits.argmax(-1), labels, run.data.num_outputs)
        description["confusion"] = counts.tolist()
    return description


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
