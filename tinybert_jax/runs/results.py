"""Compares the models of a run: scores, sizes, FLOPs and measured latency, for `results.json`."""

import filecmp
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tinybert_jax.config.models import SOLE
from tinybert_jax.config.stages import PRETRAIN
from tinybert_jax.data.splits import data_notes
from tinybert_jax.huggingface.hub import find_folder
from tinybert_jax.inference.seq2seq import TinyBertForConditionalGeneration
from tinybert_jax.metrics.intervals import interval
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.params import Apply, Params, num_parameters
from tinybert_jax.performance import flops
from tinybert_jax.performance.latency import measure_in_turn
from tinybert_jax.report.advice import advice
from tinybert_jax.runs import identity
from tinybert_jax.runs.environment import device_kind
from tinybert_jax.runs.run import Run, RunTask
from tinybert_jax.runs.scoring import (
    EvaluatedModel,
    SeedScores,
    evaluated_models,
    score_linear,
    score_seeds,
)
from tinybert_jax.settings.sizes import EncoderDecoderConfig, Sizes
from tinybert_jax.tasks import linear
from tinybert_jax.tasks.task import Task

# Metrics of the masked LM on held-out text.
HELDOUT_METRICS = ("loss", "perplexity", "masked_accuracy", "pair_accuracy")
LINEAR = "TF-IDF, linear"  # the name of the linear model
_LATENCY_BATCH, _LATENCY_LENGTH = 1, 32
_TAIL = 0.2  # of the steps
_NUMBERS = {"square": "value", "similarity": "similarity"}  # form -> key of an answer's number
_NUM_SHOWN = 20  # texts on which student and teacher differ


def collect_results(
    run: Run,
    lines: Sequence[dict[str, Any]],
    command: str,
    export: str,
    update: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `results.json`: every evaluated model, and how the students compare.

    With a task its entry `resamples` is the content of a file of its own: see `_resamples`.
    `lines`: those of metrics.jsonl. `command`: the command line. `export`: see `RunConfig`.
    `update`: what one mends and breaks.
    """
    heldout = _heldout(lines)
    data = run.task.data if run.task else None
    summary = {
        "name": run.name,
        "metric": run.task.metric if run.task else None,
        "train_examples": len(data.train.text) if data else 0,
        "dev_examples": len(data.dev.text) if data else 0,
        "select_examples": len(data.select.text) if data and data.select else 0,
        "unlabelled_examples": len(data.unlabelled.text) if data and data.unlabelled else 0,
        "label_names": data.label_names if data else None,
        **({"floor": _floor(run.task)} if run.task else {}),
        "export": export,
        **({"data": identity.sources(run.task.section)} if run.task else {}),
        "max_length": {name: plan.section.max_length for name, plan in run.plans.items()},
        **(_evaluate(run) if run.task else {"models": []}),
        **({"heldout": heldout} if heldout else {}),
        **({"update": update} if update else {}),
        "stages": _learning(run, lines),
        "seconds": _seconds(lines),
        "commands": [command] if command else [],
    }
    kept = _shares_kept(summary)
    if kept:
        summary["share_kept"] = kept if run.has_named_students else kept.popitem()[1]
    notes = []
    if run.task:
        task = run.task.kind
        notes = data_notes(run.task.data, task.count_labels, task.unit)
    return {**summary, "advice": [*notes, *advice(summary)]}


def _floor(task: RunTask) -> float | None:
    """The main metric on dev of always giving the most frequent answer; None where not known."""
    return task.kind.floor(task.data.dev) if task.metric == task.kind.floor_metric else None


def _seconds(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Wall time of each finished stage in seconds, without the time before a kill."""
    return {row["stage"]: round(row["seconds"], 1) for row in lines if row["kind"] == "stage"}


def _heldout(lines: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """The last metrics of pretraining on held-out text; None without such text."""
    rows = [row for row in lines if row["kind"] == "eval" and row["stage"] == PRETRAIN.name]
    if not rows:
        return None
    return {name: rows[-1][name] for name in HELDOUT_METRICS if name in rows[-1]}


def _learning(run: Run, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How each stage that trains a head went: its length, and the scores that tell when it learnt.

    `score`: at the last evaluation, the mean over models; `tail_score`: at the last evaluation
    before the last fifth of the steps.
    """
    found = {}
    for name, plan in run.plans.items():
        of_stage = [row for row in lines if row.get("stage") == name]
        evals = [row for row in of_stage if row["kind"] == "eval"]
        if not (plan.stage.trains_head and evals and run.task):
            continue
        scores = {row["step"]: row[run.task.metric] for row in evals}
        last = max(scores)
        before = [step for step in scores if step <= (1 - _TAIL) * last]
        losses = [row["loss"] for row in of_stage if row["kind"] == "train"]
        losses = [loss for loss in losses if isinstance(loss, float)]  # text where not finite
        found[name] = {
            "num_epochs": plan.section.num_epochs,
            "num_steps": plan.section.num_steps,
            "step": last,
            "num_evals": len(scores),
            "best_step": max(scores, key=lambda step: (scores[step], -step)),
            "score": scores[last],
            "tail_score": scores[max(before)] if before else None,
            "last_loss": losses[-1] if losses else None,
        }
    return found


def _evaluate(run: Run) -> dict[str, Any]:
    """The entries `models`, `comparisons`, `differing` and `resamples` of a summary."""
    task, descriptions, timed, resampled = run.required_task, [], [], {}
    by_role: dict[str, tuple[str, SeedScores]] = {}  # the best model of each role
    for model in evaluated_models(run):
        scores, apply, params = score_seeds(run, model)
        descriptions.append(_describe(run, model, scores, num_parameters(params)))
        timed.append(_one_call(apply, params, model.sizes))
        name = descriptions[-1]["name"]
        resampled[model.role, name] = scores.resampled[task.metric]
        best = by_role.get(model.role)
        if best is None or _best_score(scores, task.metric) > _best_score(best[1], task.metric):
            by_role[model.role] = name, scores
    for description, latency in zip(descriptions, _latencies(run, timed), strict=True):
        description["latency_ms"] = latency
    if descriptions and linear.can_fit(task.kind):
        missing = linear.missing_requirement(task.data.train)
        if missing is None:
            scores, size = score_linear(run)
            descriptions.append(_describe_linear(task.kind, scores, size))
            resampled["linear", LINEAR] = scores.resampled[task.metric]
        else:
            run.log.say(f"no linear model (TF-IDF) beside the models: it needs {missing}")
    comparisons = compare_students(descriptions, resampled, task.metric)
    found = {"models": descriptions, "comparisons": comparisons}
    found["resamples"] = _resamples(run, resampled)
    if "teacher" in by_role and "student" in by_role:
        name, student = by_role["student"]
        found["differing"] = {
            "student": name,
            **_differing(task.kind, by_role["teacher"][1], student),
        }
    return found


def _resamples(run: Run, resampled: dict[tuple[str, str], np.ndarray]) -> dict[str, Any]:
    """What another run on the same dev rows needs for paired differences.

    The main metric of each model on each resample of these rows; null where a resample has none.
    """
    models = [
        {
            "role": role,
            "name": name,
            "values": [float(f"{v:.9g}") if np.isfinite(v) else None for v in values],
        }
        for (role, name), values in resampled.items()
    ]
    dev = identity.lineage(run)["data"]["task.dev"]
    return {"metric": run.required_task.metric, "dev": dev, "models": models}


def _best_score(scores: SeedScores, metric: str) -> float:
    return scores.selection[scores.best][metric]


def _differing(task: Task, teacher: SeedScores, student: SeedScores) -> dict[str, Any]:
    """How many dev texts have different answers, and the first `_NUM_SHOWN` of them.

    Those that the teacher alone has right come first; predicted numbers come by their distance.
    """
    sides = [task.answers(own.scored, own.settings) for own in (teacher, student)]
    said = [[task.in_words(answer) for answer in side] for side in sides]
    examples = teacher.scored.examples
    true = task.truth(examples)
    right = [task.is_right(own.scored, own.settings) for own in (teacher, student)]
    is_other = np.array([a != b for a, b in zip(*said, strict=True)])
    order = np.argsort(~(right[0] & ~right[1]), kind="stable")
    number = _NUMBERS.get(task.form)
    if number:
        one, other = (np.array([answer[number] for answer in side]) for side in sides)
        order = np.argsort(-np.abs(one - other), kind="stable")
    places = [int(place) for place in order if is_other[place]]
    texts = [
        {
            "text": examples.shown(place, is_pair=not task.generates),
            "label": true[place],
            "teacher": said[0][place],
            "student": said[1][place],
        }
        for place in places[:_NUM_SHOWN]
    ]
    numbers = {"num_texts": len(places)}
    if not number:
        numbers |= {
            "num_teacher_right": int(right[0][places].sum()),
            "num_student_right": int(right[1][places].sum()),
        }
    return {**numbers, "texts": texts}


class BestSeed(NamedTuple):
    """The seed of a member of a stage that scored best on the examples that choose."""

    stage: str
    index: int
    score: float  # -inf where nothing was scored


def best_seed(summary: dict[str, Any], stage: str, member: str) -> BestSeed:
    """The best seed of a member; the first where nothing was scored."""
    described = (m for m in summary["models"] if m["stage"] == stage)
    described = next((m for m in described if member in (SOLE, m["name"])), None)
    if described is None:
        return BestSeed(stage, 0, -np.inf)
    return BestSeed(stage, described.get("best_seed", 0), described["selection_score"])


def _describe(
    run: Run, evaluated: EvaluatedModel, scores: SeedScores, num_params: int
) -> dict[str, Any]:
    """Sizes and scores of a model.

    `flops_per_token` counts the whole model, as published figures do.

    With several seeds `metrics` is the mean for students and the best seed's for teachers, because
    the best teacher is the one that is distilled. Details, such as the confusion matrix, are those
    of the best seed.
    """
    model, by_seed, task = evaluated.sizes, scores.by_seed, run.required_task.kind
    is_teacher = evaluated.role == "teacher"
    weights = find_folder(evaluated.folders[0]).glob("model*.safetensors")  # one file, or shards
    description = {
        "role": evaluated.role,
        "name": evaluated.member or _sizes(model),
        "stage": evaluated.stage,
        "num_parameters": num_params,
        "num_encoder_parameters": flops.num_encoder_parameters(model),
        "flops_per_token": round(flops.forward_flops_per_token(model, _LATENCY_LENGTH)),
        "bytes_on_disk": sum(file.stat().st_size for file in weights),
        "metrics": by_seed[scores.best] if is_teacher else _over_seeds(np.mean, by_seed),
        "intervals": _intervals(scores),
    }
    if evaluated.role == "student":
        (section,) = (s.section for s in run.students if s.name == evaluated.member)
        description["start"] = section.path or section.init
    if len(by_seed) > 1:
        deviation = _over_seeds(functools.partial(np.std, ddof=1), by_seed)
        description |= {"by_seed": by_seed, "deviation": deviation, "best_seed": scores.best}
        description["has_equal_seeds"] = _have_equal_weights(evaluated.folders)
        if is_teacher:
            description["mean"] = _over_seeds(np.mean, by_seed)
    chosen_by = scores.selection[scores.best]
    description["selection_score"] = chosen_by[run.required_task.metric]
    return description | task.details(scores.scored, scores.settings)


def _have_equal_weights(folders: Sequence[str | Path]) -> bool:
    """Whether the weights of all folders have the same bits."""
    files = [sorted(find_folder(own).glob("model*.safetensors")) for own in folders]
    pairs = [zip(files[0], own, strict=True) for own in files[1:]]
    return all(filecmp.cmp(ours, theirs, shallow=False) for pair in pairs for ours, theirs in pair)


def _describe_linear(task: Task, scores: SeedScores, size: int) -> dict[str, Any]:
    return {
        "role": "linear",
        "name": LINEAR,
        "stage": None,
        "num_parameters": size,
        "metrics": scores.by_seed[0],
        "intervals": _intervals(scores),
        **task.details(scores.scored, scores.settings),
    }


def _intervals(scores: SeedScores) -> dict[str, tuple[float, float]]:
    return {name: interval(values) for name, values in scores.resampled.items()}


def compare_students(
    models: list[dict[str, Any]], resampled: dict[tuple[str, str], np.ndarray], metric: str
) -> dict[str, Any]:
    """By student: differences to the other models with intervals, and the gap closed.

    The gap closed is (student - alone) / (teacher - alone): the share of the teacher's lead over
    the same student without a teacher. It is left out where the teacher does not lead, and has no
    interval where that lead may be 0, because the interval of such a quotient means nothing.
    """
    values = {(m["role"], m["name"]): m["metrics"][metric] for m in models}
    found: dict[str, Any] = {}
    for role, name in values:
        if role != "student":
            continue
        own, drawn, alone = values[role, name], resampled[role, name], ("baseline", name)
        others = {key[0]: key for key in values if key[0] in ("teacher", "linear") or key == alone}
        found[name] = {
            other: {
                "difference": own - values[key],
                "interval": interval(drawn - resampled[key]),
            }
            for other, key in others.items()
        }
        teacher = others.get("teacher")
        if teacher and alone in values and values[teacher] > values[alone]:
            lead = resampled[teacher] - resampled[alone]
            is_sure = interval(lead)[0] > 0
            with np.errstate(divide="ignore", invalid="ignore"):
                shares = (drawn - resampled[alone]) / lead
            found[name]["gap_closed"] = {
                "value": (own - values[alone]) / (values[teacher] - values[alone]),
                "interval": interval(shares) if is_sure else None,
            }
    return found


def _over_seeds(
    summarise: Callable[[list[float]], Any], by_seed: list[dict[str, float]]
) -> dict[str, float]:
    """Each metric of `by_seed` summarised over the seeds."""
    return {name: float(summarise([m[name] for m in by_seed])) for name in by_seed[0]}


def _one_call(apply: Apply, params: Params, sizes: Sizes) -> tuple[Callable[[], Any], int]:
    """(a compiled forward pass of one example, its number of tokens).

    The last layer computes only the tokens that the head reads. Of translation: a greedy one.
    """
    length = min(_LATENCY_LENGTH, sizes.max_position_embeddings)
    ids = np.ones((_LATENCY_BATCH, length), np.int32)
    if isinstance(sizes, EncoderDecoderConfig):
        # It ends where the model ends, as in use; the source is one that means nothing.
        model = TinyBertForConditionalGeneration(sizes, params)
        return functools.partial(model.generate, ids, max_new_tokens=length), length
    forward = jax.jit(lambda params, ids: apply(params, Text(ids, ids * 0), ids > 0).logits)
    return functools.partial(forward, jax.device_put(params), ids), length


def _latencies(run: Run, timed: list[tuple[Callable[[], Any], int]]) -> list[dict[str, Any]]:
    """Milliseconds of a call of each model, measured in turn, with quartiles."""
    measured = measure_in_turn([call for call, _ in timed]) if timed else []
    return [
        {
            "batch": _LATENCY_BATCH,
            "seq_len": length,
            **{name: round(value, 3) for name, value in latency._asdict().items()},
            "device": device_kind(run.mesh),
        }
        for latency, (_, length) in zip(measured, timed, strict=True)
    ]


def _shares_kept(summary: dict[str, Any]) -> dict[str, float]:
    """Each student's score divided by the teacher's; empty without a teacher score above 0."""
    scores = [(m["role"], m["name"], m["metrics"][summary["metric"]]) for m in summary["models"]]
    teacher = next((score for role, _, score in scores if role == "teacher"), 0)
    return {name: s / teacher for role, name, s in scores if role == "student" and teacher > 0}


def _sizes(model: Sizes) -> str:
    depth = model.num_hidden_layers
    return f"{depth} layer{'s' if depth > 1 else ''} × {model.hidden_size}"
