"""Compares the models of a run: scores, sizes, FLOPs and measured latency, for `results.json`."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tinybert_jax.config.models import SOLE
from tinybert_jax.config.run import StagePlan
from tinybert_jax.config.stages import BASELINE, FINETUNE, PREDICTION
from tinybert_jax.huggingface.folder import read_model, start_params
from tinybert_jax.huggingface.hub import find_folder
from tinybert_jax.inference.scorer import make_scorer
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.params import num_parameters
from tinybert_jax.performance import flops
from tinybert_jax.runs.run import Run, make_task_model
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.tasks.task import Scored

# Metrics of the masked LM on held-out text.
HELDOUT_METRICS = ("loss", "perplexity", "masked_accuracy", "pair_accuracy")
_LATENCY_BATCH, _LATENCY_LENGTH, _LATENCY_RUNS = 1, 32, 30


def collect_results(
    run: Run, seconds: dict[str, float], command: str, heldout: dict[str, float] | None = None
) -> dict[str, Any]:
    """The content of `results.json`: every evaluated model, and each student's share of the score.

    `seconds`: wall time of each stage. `command`: the command line. `heldout`: the masked LM's
    metrics (`HELDOUT_METRICS`) on held-out text.
    """
    models = []
    if run.task is not None:
        models = [_describe(run, model) for model in _evaluated_models(run)]
    data = run.task.data if run.task else None
    summary = {
        "name": run.name,
        "metric": run.task.metric if run.task else None,
        "dev_examples": len(data.dev.text) if data else 0,
        "label_names": data.label_names if data else None,
        "models": models,
        **({"heldout": heldout} if heldout else {}),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "commands": [command] if command else [],
    }
    kept = _shares_kept(summary)
    if not kept:
        return summary
    return {**summary, "share_kept": kept if run.has_named_students else kept.popitem()[1]}


class _EvaluatedModel(NamedTuple):
    """A model with a head of the task, and one folder per seed."""

    role: str
    stage: str
    member: str
    sizes: ModelConfig
    folders: list[Path]


def _evaluated_models(run: Run) -> list[_EvaluatedModel]:
    """The finished models that have a head of the task."""
    teachers = _folders(run, FINETUNE.name, SOLE)
    section, given = run.teacher_section, run.teacher_section.finetuned
    is_read = any(p.reads_teacher for p in run.plans.values() if p.stage.teacher == "task")
    if given is None and is_read:
        given = section.path  # it has the task's head: `check_weights` refuses a folder without
    if given and not teachers:
        teachers = [Path(given)]
    models = [_EvaluatedModel("teacher", FINETUNE.name, SOLE, run.teacher, teachers)]
    for role, stage in (("student", PREDICTION.name), ("baseline", BASELINE.name)):
        for student in run.students:
            folders = _folders(run, stage, student.name)
            models.append(_EvaluatedModel(role, stage, student.name, student.sizes, folders))
    return [model for model in models if model.folders and read_model(model.folders[0]).head]


def console_summary(summary: dict[str, Any]) -> str:
    """The models, shares and held-out metrics of `results.json`, as lines for the console."""
    metric, width = summary["metric"], max((len(m["name"]) for m in summary["models"]), default=0)
    lines = [
        f"{m['role']:<9} {m['name']:<{width}}  "
        f"{metric} {m['metrics'][metric]:.4f}{_spread(metric, m)}  "
        f"{m['num_encoder_parameters'] / 1e6:.2f} M encoder parameters  "
        f"{m['latency_ms']['median']:.1f} ms"
        for m in summary["models"]
    ]
    kept = summary.get("share_kept", {})
    shares = kept if isinstance(kept, dict) else {"the student": kept}
    lines += [f"{name} keeps {share:.1%} of its teacher" for name, share in shares.items()]
    if heldout := summary.get("heldout"):
        values = (f"{name} {float(value):.4g}" for name, value in heldout.items())
        lines.append(f"pretrain  on held-out text: {', '.join(values)}")
    return "\n".join(lines)


def best_seed(summary: dict[str, Any], stage: str, member: str) -> int:
    """The index of the seed with the best dev score for a member; 0 where nothing was scored."""
    described = (m for m in summary["models"] if m["stage"] == stage)
    described = next((m for m in described if member in (SOLE, m["name"])), None)
    if described is None or "by_seed" not in described:
        return 0
    return best_index(described["by_seed"], summary["metric"])


def best_index(by_seed: Sequence[Mapping[str, float]], metric: str) -> int:
    """The index of the first highest value of `metric`."""
    return int(np.argmax([metrics[metric] for metrics in by_seed]))


def score_dev(run: Run, plan: StagePlan, params: Sequence[Any], sizes: ModelConfig) -> list[Scored]:
    """The dev set with the fp32 logits of each model in `params`."""
    task, dev, section = run.required_task.kind, run.required_task.data.dev, plan.section
    apply, _ = make_task_model(run, sizes)
    rows = task.encode(run.tokenizer, dev, section.max_length)
    score = make_scorer(apply, buckets=section.buckets(), pad_token_id=run.tokenizer.pad_token_id)
    return [Scored(score(model, rows), rows, dev) for model in params]


def measure(run: Run, scored: Scored) -> dict[str, float]:
    """The metrics by name, with the settings of the head that are best on the dev set."""
    task = run.required_task.kind
    return task.measure(scored, task.best_settings(scored))


def _spread(metric: str, model: dict[str, Any]) -> str:
    if "by_seed" not in model:
        return ""
    count, deviation = len(model["by_seed"]), model["deviation"][metric]
    if "mean" in model:
        return f" (best of {count} seeds: {model['mean'][metric]:.4f} ± {deviation:.4f})"
    return f" ± {deviation:.4f} ({count} seeds)"


def _folders(run: Run, stage: str, member: str) -> list[Path]:
    """The model folder of each seed; empty where the stage is not done."""
    return run.seed_folders(run.plans[stage], member) if run.is_done(stage) else []


def _describe(run: Run, evaluated: _EvaluatedModel) -> dict[str, Any]:
    """Sizes, scores and latency of a model.

    `flops_per_token` counts the whole model, as published figures do. `latency_ms` is measured on
    the program that runs, whose last layer computes only the tokens that the head reads.

    With several seeds `metrics` is the mean for students and the best seed's for teachers, because
    the best teacher is the one that is distilled. Details, such as the confusion matrix, are those
    of the best seed.
    """
    role, model = evaluated.role, evaluated.sizes
    weights = find_folder(evaluated.folders[0]).glob("model*.safetensors")  # one file, or shards
    apply, init = make_task_model(run, model)
    params = [start_params(folder, init, whole=True) for folder in evaluated.folders]
    scored_by_seed = score_dev(run, _evaluation_plan(run, evaluated.stage), params, model)
    by_seed = [measure(run, scored) for scored in scored_by_seed]
    best = best_index(by_seed, run.required_task.metric)
    description = {
        "role": role,
        "name": evaluated.member or _sizes(model),
        "stage": evaluated.stage,
        "num_parameters": num_parameters(params[0]),
        "num_encoder_parameters": flops.num_encoder_parameters(model),
        "flops_per_token": round(flops.forward_flops_per_token(model, _LATENCY_LENGTH)),
        "bytes_on_disk": sum(file.stat().st_size for file in weights),
        "latency_ms": _latency(
            apply, params[0], min(_LATENCY_LENGTH, model.max_position_embeddings)
        ),
        "metrics": by_seed[best] if role == "teacher" else _over_seeds(np.mean, by_seed),
    }
    if len(by_seed) > 1:
        deviation = _over_seeds(functools.partial(np.std, ddof=1), by_seed)
        description |= {"by_seed": by_seed, "deviation": deviation}
        if role == "teacher":
            description["mean"] = _over_seeds(np.mean, by_seed)
    task = run.required_task.kind
    scored = scored_by_seed[best]
    return description | task.details(scored, task.best_settings(scored))


def _evaluation_plan(run: Run, stage: str) -> StagePlan:
    """The plan whose lengths and buckets the evaluation uses: `stage`, or another of the run."""
    known = (run.plans.get(name) for name in (stage, PREDICTION.name, *run.plans))
    return next(plan for plan in known if plan is not None)


def _over_seeds(
    summarise: Callable[[list[float]], Any], by_seed: list[dict[str, float]]
) -> dict[str, float]:
    """Each metric of `by_seed` summarised over the seeds."""
    return {name: float(summarise([m[name] for m in by_seed])) for name in by_seed[0]}


def _latency(apply, params, length: int) -> dict[str, Any]:
    """Median milliseconds of one compiled forward pass of one example."""
    ids = np.ones((_LATENCY_BATCH, length), np.int32)
    forward = jax.jit(lambda params, ids: apply(params, Text(ids, ids * 0), ids > 0).logits)
    params = jax.device_put(params)
    times = []
    for _ in range(_LATENCY_RUNS + 3):
        start = time.perf_counter()
        forward(params, ids).block_until_ready()
        times.append(1000 * (time.perf_counter() - start))
    median = float(np.median(times[3:]))
    device = jax.devices()[0].device_kind
    return {
        "batch": _LATENCY_BATCH,
        "seq_len": length,
        "median": round(median, 3),
        "device": device,
    }


def _shares_kept(summary: dict[str, Any]) -> dict[str, float]:
    """Each student's score divided by the teacher's; empty without a teacher score above 0."""
    scores = [(m["role"], m["name"], m["metrics"][summary["metric"]]) for m in summary["models"]]
    teacher = next((score for role, _, score in scores if role == "teacher"), 0)
    return {name: s / teacher for role, name, s in scores if role == "student" and teacher > 0}


def _sizes(model: ModelConfig) -> str:
    depth = model.num_hidden_layers
    return f"{depth} layer{'s' if depth > 1 else ''} × {model.hidden_size}"
