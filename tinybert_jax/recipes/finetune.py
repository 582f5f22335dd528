"""Supervised training on the task: of the teacher (`finetune`) or of the students (`baseline`)."""

from pathlib import Path

import jax
import numpy as np

from tinybert_jax.config.models import SOLE
from tinybert_jax.config.run import StagePlan
from tinybert_jax.config.stages import SupervisedSection
from tinybert_jax.config.tasks import EmbeddingsTask
from tinybert_jax.huggingface.encoder_decoder import start_any
from tinybert_jax.models.params import Apply, Params
from tinybert_jax.objectives.objective import Objective
from tinybert_jax.objectives.similarity import make_similarity
from tinybert_jax.objectives.supervised import make_supervised
from tinybert_jax.parallel.mesh import num_batch_shards
from tinybert_jax.performance.flops import training_flops_per_token
from tinybert_jax.runs.head_init import init_head
from tinybert_jax.runs.judges import TaskEvaluator, make_task_evaluator
from tinybert_jax.runs.run import (
    Run,
    make_task_model,
    save_task_model,
    trained_options,
    with_dropout,
)
from tinybert_jax.runs.scoring import best_index, score
from tinybert_jax.runs.stage import Member, Training
from tinybert_jax.runs.stage_batches import StageBatches, make_stage_batches
from tinybert_jax.runs.used_words import train_stage
from tinybert_jax.runs.workload import count_last_layer_tokens
from tinybert_jax.settings.sizes import Sizes


def main(run: Run, plan: StagePlan) -> None:
    """Trains the teacher, or the students without a teacher, and saves the best parameters.

    The teacher starts from its pretrained weights, a student from its folder or at random. Of
    several teachers the one with the best score is saved again as the stage's model.
    """
    sizes, training, evaluators = _make(run, plan)
    trained = train_stage(run, training)
    for name, models in trained.items():
        to_save = list(zip(run.seed_folders(plan, name), models, strict=True))
        if plan.stage.role == "teacher" and len(models) > 1:
            task = run.required_task
            scored = score(run, plan, models, sizes[name], task.data.selection)
            by_seed = [task.kind.measure(own, task.kind.best_settings(own)) for own in scored]
            best = models[best_index(by_seed, task.metric)]
            to_save.append((run.model_folder(plan.name), best))
        for folder, params in to_save:
            save_task_model(run, folder, params, sizes[name], evaluators[name].tune(params))


def make_training(run: Run, plan: StagePlan) -> Training:
    """The models and the batches of the stage."""
    return _make(run, plan)[1]


def _make(run: Run, plan: StagePlan) -> tuple[dict[str, Sizes], Training, dict[str, TaskEvaluator]]:
    """(sizes, training, evaluators); sizes and evaluators by member."""
    sizes, starts = {SOLE: run.teacher}, {SOLE: run.pretrained_teacher}
    if plan.stage.role == "student":
        sizes = {student.name: student.sizes for student in run.students}
        starts = {student.name: student.section.path for student in run.students}
    batches = make_stage_batches(run, plan)
    made = {name: _make_member(run, plan, sizes[name], starts[name], batches) for name in sizes}
    training = Training(
        plan=plan,
        members={name: member for name, (member, _) in made.items()},
        batches=batches,
        flops_per_token=lambda width: training_flops_per_token(
            [*sizes.values()] * len(plan.seeds) * plan.num_passes,
            width,
            num_last_layer_tokens=count_last_layer_tokens(run, plan, width),
        ),
        metric=run.required_task.metric,
    )
    return sizes, training, {name: evaluator for name, (_, evaluator) in made.items()}


def _make_member(
    run: Run,
    plan: StagePlan,
    sizes: Sizes,
    start: str | Path | None,
    batches: StageBatches,
) -> tuple[Member, TaskEvaluator]:
    """(member, its evaluator); `start`: a folder or hub id, None for random weights."""
    section, task = plan.section, run.required_task
    apply, init = make_task_model(
        run, with_dropout(sizes, section), **trained_options(run.compute, plan)
    )
    evaluator = make_task_evaluator(run, apply, section, sizes)

    def init_params(key: jax.Array, seed: int) -> Params:
        names = task.data.label_names
        params = start_any(start, init, key, label_names=names, is_quiet=seed > 0)
        if section.head_init == "linear_probe":
            return init_head(run, plan.name, apply, params, batches, is_quiet=seed > 0)
        return params

    objective = _make_objective(run, section, apply)
    member = Member(objective, init, init_params, evaluator.as_evaluator())
    return member, evaluator


def _make_objective(run: Run, section: SupervisedSection, apply: Apply) -> Objective:
    task = run.required_task
    if isinstance(task.section, EmbeddingsTask):
        return make_similarity(
            apply,
            num_texts=task.texts_per_example,
            has_scores=task.section.rows == "scored_pairs",
            temperature=task.section.temperature,
            widths=task.section.widths,
        )
    return make_supervised(
        apply,
        form=task.kind.form,
        label_smoothing=section.label_smoothing,
        class_weights=_class_weights(run, section),
        r_drop=section.r_drop,
        num_shards=num_batch_shards(run.mesh),
    )


def _class_weights(run: Run, section: SupervisedSection) -> np.ndarray | None:
    """[classes]: the inverse numbers of units, scaled to a mean of 1 over the units; see config."""
    if section.class_weights is None:
        return None
    task = run.required_task
    counts = task.kind.count_labels(task.data.train)
    num_classes = np.count_nonzero(counts)
    return np.where(counts > 0, counts.sum() / (num_classes * np.maximum(counts, 1)), 0.0)
