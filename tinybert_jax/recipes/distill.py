"""The distillation stages: general on a corpus, then intermediate and prediction on the task."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tinybert_jax.batches.batch import TokenRows
from tinybert_jax.config.models import Student
from tinybert_jax.config.run import StagePlan
from tinybert_jax.data.examples import Examples
from tinybert_jax.huggingface.encoder_decoder import start_any
from tinybert_jax.huggingface.folder import save_model
from tinybert_jax.models.heads import Model, make_encoder
from tinybert_jax.models.params import Params
from tinybert_jax.objectives.alignment import PROJECTIONS
from tinybert_jax.objectives.distillation import Options, Role, make_distill
from tinybert_jax.objectives.masked_lm import Mask, make_mask
from tinybert_jax.parallel import processes
from tinybert_jax.parallel.mesh import num_batch_shards, platform_of
from tinybert_jax.performance.flops import training_flops_per_token
from tinybert_jax.runs import teacher_logits, teacher_text
from tinybert_jax.runs.checks import make_model_factory
from tinybert_jax.runs.judges import TaskEvaluator, make_task_evaluator
from tinybert_jax.runs.run import (
    Run,
    freeze_params,
    frozen_options,
    save_task_model,
    trained_options,
    with_dropout,
)
from tinybert_jax.runs.stage import Member, Training
from tinybert_jax.runs.stage_batches import StageBatches, make_stage_batches
from tinybert_jax.runs.stage_state import Frozen
from tinybert_jax.runs.student_start import (
    encoder_of,
    make_init,
    make_random,
    projection_file,
)
from tinybert_jax.runs.used_words import train_stage
from tinybert_jax.runs.workload import count_last_layer_tokens
from tinybert_jax.settings.sizes import Sizes, depths, side_of
from tinybert_jax.terms.table import reads_of


def main(run: Run, plan: StagePlan) -> None:
    """Trains all students of one distillation stage and saves their models.

    The teacher is the pretrained one in `general` and the fine-tuned one in the other stages.
    """
    read_logits = functools.partial(teacher_logits.read, run, plan)
    read_text = functools.partial(teacher_text.read, run, plan)
    training, evaluators = _make(run, plan, read_logits, read_text)
    # A stage that trains a head saves the best parameters by score, others the last.
    trained = train_stage(run, training)
    for student in run.students:
        folders = run.seed_folders(plan, student.name)
        for folder, params in zip(folders, trained[student.name], strict=True):
            _save(run, folder, params, student.sizes, evaluators.get(student.name))


def make_training(run: Run, plan: StagePlan) -> Training:
    """The models and the batches of the stage; kept logits are zeros."""
    zeros = functools.partial(teacher_logits.zeros, run)
    return _make(run, plan, zeros, lambda: run.required_task.data.train)[0]


def _make(
    run: Run,
    plan: StagePlan,
    read_logits: Callable[[TokenRows], tuple[np.ndarray, str]],
    read_text: Callable[[], Examples],
) -> tuple[Training, dict[str, TaskEvaluator]]:
    """(training, evaluators by student); `read_logits`, `read_text`: see `make_stage_batches`."""
    terms = plan.terms
    teacher_reads, reads = reads_of(terms, of_teacher=True), reads_of(terms)

    # The frozen teacher. Its weights are loaded only if a term reads them in the step.
    make_teacher = make_model_factory(run, teacher_reads, **frozen_options(run.compute))
    teacher_apply, teacher_init = make_teacher(run.teacher)
    is_teacher_in_step = reads_of(plan.step_terms).teacher

    @functools.cache
    def load_teacher() -> Params:
        return start_any(run.teacher_of(plan), teacher_init, whole=True)

    @functools.cache
    def teacher_start() -> Mapping[str, Any]:
        """The weights that students start from: of the teacher's encoder; to translate, all."""
        if run.task is not None and run.task.kind.generates:
            return load_teacher()
        if is_teacher_in_step:
            return encoder_of(load_teacher())
        encoder = make_encoder(side_of(run.teacher, "encoder"))
        return start_any(run.teacher_of(plan), encoder.init, whole=True)

    # The teachers' logits of all examples, if they are computed before the first step; of
    # translation, what the teacher makes of their sources.
    text = read_text() if run.distillation.targets == "teacher" and plan.stage.trains_head else None
    batches = make_stage_batches(run, plan, read_logits if plan.keeps_logits else None, text)

    # The students. A student starts from an earlier stage's model if there is one.
    teacher = Role(teacher_apply, teacher_reads, *depths(run.teacher))
    make_student = make_model_factory(run, reads, **trained_options(run.compute, plan))
    made = {
        student.name: _make_member(
            run, plan, student, make_student, teacher, teacher_start, batches
        )
        for student in run.students
    }
    training = Training(
        plan=plan,
        members={name: member for name, (member, _) in made.items()},
        batches=batches,
        flops_per_token=lambda width: training_flops_per_token(
            [student.sizes for student in run.students] * len(plan.seeds),
            width,
            projection_dim=run.teacher.hidden_size if reads.projection else 0,
            teacher=run.teacher if is_teacher_in_step else None,
            num_last_layer_tokens=count_last_layer_tokens(run, plan, width),
        ),
        metric=run.required_task.metric if plan.stage.trains_head else "",
    )
    if is_teacher_in_step:
        read = functools.partial(freeze_params, run.compute)
        training = training._replace(frozen=Frozen(load_teacher, teacher_init, read))
    return training, {name: own for name, (_, own) in made.items() if own is not None}


def _make_member(
    run: Run,
    plan: StagePlan,
    student: Student,
    make_student: Callable[[Sizes], Model],
    teacher: Role,
    teacher_start: Callable[[], Mapping[str, Any]],
    batches: StageBatches,
) -> tuple[Member, TaskEvaluator | None]:
    """(member, its evaluator where the stage trains a head)."""
    reads = reads_of(plan.terms)
    apply, init = make_student(with_dropout(student.sizes, plan.section))
    objective = make_distill(
        Role(apply, reads, *depths(student.sizes)),
        teacher,
        plan.terms,
        Options(
            normalisation=run.distillation.normalisation,
            form=run.task.kind.form if run.task else "softmax",
            num_shards=num_batch_shards(run.mesh),
            num_texts=run.task.texts_per_example if run.task else 1,
            widths=getattr(run.task.section, "widths", ()) if run.task else (),
            fuses_scores=run.compute.attention == "triton",
            reads_maps=platform_of(run.mesh) == "cpu",
        ),
        _make_mask(run, plan),
    )
    member = Member(
        objective,
        make_random(run, plan, student, init),
        make_init(run, plan, student, (apply, init), teacher_start, batches),
    )
    if not plan.stage.trains_head:
        return member, None
    task_evaluator = make_task_evaluator(run, apply, plan.section, student.sizes)
    evaluator = task_evaluator.as_evaluator()
    evaluator = evaluator._replace(measure=_without_projection(evaluator.measure))
    return member._replace(evaluator=evaluator), task_evaluator


def _without_projection(measure: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """measure(params) that reads only the student in `params`, not the projection."""
    return lambda params: measure(params["student"])


def _save(
    run: Run,
    folder: Path,
    params: dict[str, Any],
    sizes: Sizes,
    evaluator: TaskEvaluator | None,
) -> None:
    """Saves a student; `evaluator`: of a stage that trains the head of the task."""
    extra: dict[str, Callable[[Path], None]] = {}
    for name in (name for name in PROJECTIONS.values() if name in params):
        extra[projection_file(name)] = functools.partial(save_file, _rows(params[name]))
    student = params["student"]
    if evaluator is None and processes.is_main():
        save_model(folder, student, side_of(sizes, "encoder"), run.tokenizer, extra=extra)
    elif evaluator is not None:
        save_task_model(run, folder, student, sizes, evaluator.tune(student), extra)


def _rows(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays in memory by rows, as safetensors writes them: a TPU may store them transposed."""
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _make_mask(run: Run, plan: StagePlan) -> Mask | None:
    if plan.masking is None:
        return None
    return make_mask(mask_rate=plan.masking.rate, **run.mask_ids)
