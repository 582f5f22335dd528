"""Scores the finished models of a run on its dev set, each seed, with resamples for intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinybert_jax.config.models import SOLE
from tinybert_jax.config.run import StagePlan
from tinybert_jax.config.stages import BASELINE, FINETUNE, PREDICTION, UPDATE
from tinybert_jax.data.examples import Examples
from tinybert_jax.huggingface.encoder_decoder import start_any
from tinybert_jax.huggingface.folder import read_model
from tinybert_jax.inference.scorer import make_scorer
from tinybert_jax.metrics.intervals import mean_over_seeds
from tinybert_jax.models.params import Apply, Params
from tinybert_jax.runs.judges import score_generated
from tinybert_jax.runs.run import Run, make_task_model
from tinybert_jax.settings.sizes import Sizes
from tinybert_jax.tasks import linear
from tinybert_jax.tasks.task import Scored, Settings


class EvaluatedModel(NamedTuple):
    """A model with a head of the task, and its folders: one for each seed, or for their mean."""

    role: str
    stage: str
    member: str
    sizes: Sizes
    folders: list[Path]


class SeedScores(NamedTuple):
    """The scores of all seeds of a model."""

    by_seed: list[dict[str, float]]  # metrics on the dev set
    selection: list[dict[str, float]]  # metrics on the examples that choose; maybe the dev set
    best: int  # index of the seed with the best score on the examples that choose
    scored: Scored  # the dev set, by the best seed
    settings: Settings  # of the best seed's head
    # Metric -> [resamples] of the dev set: of the best seed of a teacher, else the mean over seeds.
    resampled: dict[str, np.ndarray]


def evaluated_models(run: Run) -> list[EvaluatedModel]:
    """The finished models that have a head of the task."""
    teachers = _folders(run, FINETUNE.name, SOLE)
    section, given = run.teacher_section, run.teacher_section.finetuned
    is_read = any(p.reads_teacher for p in run.plans.values() if p.stage.teacher == "task")
    if given is None and is_read:
        given = section.path  # it has the task's head: `check_weights` refuses a folder without
    if given and not teachers:
        teachers = [Path(given)]
    models = [EvaluatedModel("teacher", FINETUNE.name, SOLE, run.teacher, teachers)]
    for role, stage in (
        ("student", PREDICTION.name),
        ("student", UPDATE.name),
        ("baseline", BASELINE.name),
    ):
        for student in run.students:
            folders = _folders(run, stage, student.name)
            models.append(EvaluatedModel(role, stage, student.name, student.sizes, folders))
    has_head = run.required_task.kind.hf_head is not None
    found = (model for model in models if model.folders)
    return [own for own in found if not has_head or read_model(own.folders[0]).head]


def _folders(run: Run, stage: str, member: str) -> list[Path]:
    """The folders of the model's seeds; empty where the stage is not done."""
    return run.seed_folders(run.plans[stage], member) if run.is_done(stage) else []


def score_seeds(run: Run, model: EvaluatedModel) -> tuple[SeedScores, Apply, Params]:
    """(scores of all seeds, apply, parameters of the first seed)."""
    apply, init = make_task_model(run, model.sizes)
    params = [start_any(folder, init, whole=True) for folder in model.folders]
    plan, data = _evaluation_plan(run, model.stage), run.required_task.data
    chosen = score(run, plan, params, model.sizes, data.selection)
    dev = chosen if data.select is None else score(run, plan, params, model.sizes, data.dev)
    return _scores(run, chosen, dev, is_best_alone=model.role == "teacher"), apply, params[0]


def score_linear(run: Run) -> tuple[SeedScores, int]:
    """(scores, number of parameters) of the linear model on the same examples."""
    task, data = run.required_task.kind, run.required_task.data
    plan = next(iter(run.plans.values()))
    examples = [data.selection, data.dev]
    logits, num_parameters = linear.fit(task, data.train, *examples)
    chosen, dev = (
        Scored(own, task.encode(run.tokenizer, part, plan.section.max_length), part)
        for own, part in zip(logits, examples, strict=True)
    )
    return _scores(run, [chosen], [dev], is_best_alone=True), num_parameters


def _scores(
    run: Run, chosen: Sequence[Scored], dev: Sequence[Scored], *, is_best_alone: bool
) -> SeedScores:
    task, names = run.required_task.kind, run.required_task.data.label_names or ()
    settings = [task.best_settings(own) for own in chosen]
    selection = [task.measure(own, given) for own, given in zip(chosen, settings, strict=True)]
    outcomes = [task.outcomes(own, given) for own, given in zip(dev, settings, strict=True)]
    best = best_index(selection, run.required_task.metric)

    seeds = [best] if is_best_alone else range(len(dev))
    return SeedScores(
        by_seed=[task.metrics(own, names) for own in outcomes],
        selection=selection,
        best=best,
        scored=dev[best],
        settings=settings[best],
        resampled=mean_over_seeds([task.resampled(outcomes[seed], names) for seed in seeds]),
    )


def score(
    run: Run,
    plan: StagePlan,
    params: Sequence[Any],
    sizes: Sizes,
    examples: Examples,
    num_outputs: int | None = None,
) -> list[Scored]:
    """The examples with the fp32 logits of each model in `params`.

    `num_outputs`: of the heads of these models; None: those of the run's task.
    """
    section = plan.section
    task = run.required_task
    if task.kind.generates:
        return [score_generated(run, model, sizes, section, examples) for model in params]
    apply, _ = task.kind.make_head(sizes, num_outputs or task.data.num_outputs)
    rows = task.kind.encode(run.tokenizer, examples, section.max_length)
    logits = make_scorer(apply, buckets=section.buckets(), pad_token_id=run.tokenizer.pad_token_id)
    return [Scored(logits(model, rows), rows, examples) for model in params]


def best_index(by_seed: Sequence[Mapping[str, float]], metric: str) -> int:
    """The index of the first highest value of `metric`."""
    return int(np.argmax([metrics[metric] for metrics in by_seed]))


def _evaluation_plan(run: Run, stage: str) -> StagePlan:
    """The plan whose lengths and buckets the evaluation uses: `stage`, or another of the run."""
    known = (run.plans.get(name) for name in (stage, PREDICTION.name, *run.plans))
    return next(plan for plan in known if plan is not None)
