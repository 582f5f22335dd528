"""The distillation stages: general on a corpus, then intermediate and prediction on the task."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from tinybert_jax.config.models import Student
from tinybert_jax.config.objectives import model_kind, needs_projection, teaches
from tinybert_jax.huggingface.folder import save_model, start_params
from tinybert_jax.models.heads import make_classifier, make_encoder, make_masked_lm
from tinybert_jax.models.params import Apply, Params
from tinybert_jax.objectives.alignment import (
    init_projection,
    start_from_teacher_embeddings,
    start_from_teacher_layers,
)
from tinybert_jax.objectives.distillation import Options, Role, make_distill
from tinybert_jax.objectives.masked_lm import Mask, make_mask
from tinybert_jax.parallel.mesh import num_batch_shards
from tinybert_jax.performance import flops
from tinybert_jax.runs import teacher_logits
from tinybert_jax.runs.run import Run, as_read, compute_options, dev_judge, with_dropout
from tinybert_jax.runs.stage import Member, Training, run_stage
from tinybert_jax.runs.stage_batches import stage_feed
from tinybert_jax.runs.workload import tokens_read
from tinybert_jax.settings.layer_maps import make_layer_pairs
from tinybert_jax.settings.sizes import ModelConfig

_PROJECTION = "projection.safetensors"


def general(run: Run) -> None:
    """The pretrained teacher, on the corpus."""
    main(run, "general", ())


def intermediate(run: Run) -> None:
    """The fine-tuned teacher, on the task's text."""
    main(run, "intermediate", ("general",))


def prediction(run: Run) -> None:
    """The fine-tuned teacher, on the task's text, to the best dev score."""
    main(run, "prediction", ("intermediate", "general"))


def main(run: Run, stage: str, before: tuple[str, ...]) -> None:
    section, terms = run.section(stage), run.config.distillation.terms(stage)
    is_judged = stage == "prediction"

    # Teacher, frozen; it is there only if a term reads it in the step.
    teacher_kind = model_kind(terms, of_teacher=True)
    teacher_apply, teacher_init = _make_model(run, teacher_kind, run.teacher)
    is_taught = teaches(run.config.step_terms(stage))
    teacher: Any = ()
    read_frozen: Callable[[Any], Any] = lambda frozen: frozen  # noqa: E731
    if is_taught:
        teacher = start_params(_teacher_folder(run, stage), teacher_init, whole=True)
        read_frozen = functools.partial(as_read, run.config)

    @functools.cache
    def teacher_encoder() -> Mapping[str, Any]:
        """What students start from, where the steps read it or not."""
        if teacher:
            return _encoder(teacher)
        _, init = make_encoder(run.teacher)
        return start_params(_teacher_folder(run, stage), init, whole=True)

    # Students, each from a stage before where there is one.
    members, kind = {}, model_kind(terms)
    for student in run.students:
        apply, init = _make_model(run, kind, with_dropout(student.sizes, section), stage)
        objective = make_distill(
            Role(apply, kind, student.sizes.num_hidden_layers),
            Role(teacher_apply, teacher_kind, run.teacher.num_hidden_layers),
            terms,
            Options(
                normalisation=run.config.distillation.normalisation,
                regression=run.is_regression,
                num_shards=num_batch_shards(run.mesh),
            ),
            _make_mask(run) if stage == "general" else None,
        )
        init_params = _make_init(run, stage, before, student, init, teacher_encoder)
        judge = _judge(run, apply) if is_judged else None
        members[student.name] = Member(objective, init_params, judge)

    # What the teachers say of each example, where that is made beforehand.
    teach = None
    if run.config.makes_logits_first(stage):
        teach = functools.partial(teacher_logits.read, run, stage)

    # Train; the last is handed on, or the best by dev score where a head is trained.
    trained = run_stage(
        run,
        Training(
            name=stage,
            section=section,
            members=members,
            feed=stage_feed(run, stage, teach),
            frozen=teacher,
            read_frozen=read_frozen,
            flops_per_token=lambda width: flops.training_flops_per_token(
                [student.sizes for student in run.students] * run.config.num_seeds,
                width,
                projection_dim=run.teacher.hidden_size if needs_projection(terms) else 0,
                teacher=run.teacher if is_taught else None,
                num_read=tokens_read(run, stage, width),
            ),
            score=run.score if is_judged else "",
        ),
    )
    for student in run.students:
        folders = run.seed_folders(stage, student.name)
        for folder, params in zip(folders, trained[student.name], strict=True):
            _save(run, folder, params, student.sizes, is_judged)


def _save(run: Run, folder: Path, params: Any, sizes: ModelConfig, is_judged: bool) -> None:
    extra: dict[str, Callable[[Path], None]] = {}
    if "projection" in params:
        extra[_PROJECTION] = functools.partial(save_file, params["projection"])
    save_model(
        folder,
        params["student"],
        sizes,
        run.tokenizer,
        label_names=run.data.label_names if is_judged else None,
        regression=is_judged and run.is_regression,
        extra=extra,
    )


def _make_model(
    run: Run, kind: str, sizes: ModelConfig, stage: str | None = None
) -> tuple[Apply, Callable[[jax.Array], Params]]:
    options = compute_options(run.config, stage)
    if kind == "classifier":
        return make_classifier(sizes, run.data.num_outputs, **options)
    return {"encoder": make_encoder, "masked_lm": make_masked_lm}[kind](sizes, **options)


def _teacher_folder(run: Run, stage: str) -> str | Path | None:
    return run.pretrained_teacher if stage == "general" else run.task_teacher


def _make_init(
    run: Run,
    stage: str,
    before: tuple[str, ...],
    student: Student,
    init: Callable[[jax.Array], Params],
    teacher_encoder: Callable[[], Mapping[str, Any]],
) -> Callable[[jax.Array, int], dict[str, Any]]:
    """A student's start, from a stage before or its folder, and of a projection if it needs one."""

    def init_params(key: jax.Array, seed: int) -> dict[str, Any]:
        done = [run.latest(name, member=student.name, seed=seed) for name in before]
        folders = [*(folder for folder in done if folder is not None), student.section.path]
        start = functools.partial(_start, run, student, folders[0], init, teacher_encoder)
        if not needs_projection(run.config.distillation.terms(stage)):
            return {"student": start(key)[0]}
        student_key, projection_key = jax.random.split(key)
        params, directions = start(student_key)
        projection = _start_projection(run, student, folders, projection_key, directions)
        return {"student": params, "projection": projection}

    return init_params


def _start(
    run: Run,
    student: Student,
    start: str | Path | None,
    init: Callable[[jax.Array], Params],
    teacher_encoder: Callable[[], Mapping[str, Any]],
    key: jax.Array,
) -> tuple[Params, np.ndarray | None]:
    """(student, the directions of its embeddings in the teacher's, where it starts from them)."""
    label_names = run.task.label_names if run.task else None
    params = start_params(start, init, key, label_names=label_names)
    if start is not None or student.section.init == "random":
        return params, None
    own, directions = _encoder(params), None
    if student.section.init == "teacher_layers":
        layers = make_layer_pairs(
            student.section.init_layers,
            student.sizes.num_hidden_layers,
            run.teacher.num_hidden_layers,
        )
        own = start_from_teacher_layers(own, teacher_encoder(), [g for _, g in layers])
    else:
        own, directions = start_from_teacher_embeddings(own, teacher_encoder())
    return ({**params, "encoder": own} if "encoder" in params else own), directions


def _encoder(params: Mapping[str, Any]) -> Mapping[str, Any]:
    return params.get("encoder", params)


def _start_projection(
    run: Run,
    student: Student,
    folders: Sequence[str | Path | None],
    key: jax.Array,
    directions: np.ndarray | None,
) -> dict[str, Any]:
    """The one that the first of the folders keeps, else a fresh one."""
    num_projections = 1
    if run.config.distillation.projection == "per_layer":
        num_projections = student.sizes.num_hidden_layers + 1
    projection: dict[str, Any] = init_projection(
        key, student.sizes.hidden_size, run.teacher.hidden_size, num_projections
    )
    files = (Path(folder) / _PROJECTION for folder in folders if folder is not None)
    kept = next((file for file in files if file.is_file()), None)
    if kept is not None:
        return _load_projection(kept, projection)
    if directions is not None:
        projection["kernel"] = jnp.tile(directions.T[None], (num_projections, 1, 1))
    return projection


def _load_projection(file: Path, expected: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    loaded = load_file(file)
    for name, array in expected.items():
        if name not in loaded or loaded[name].shape != array.shape:
            got = list(loaded[name].shape) if name in loaded else "none"
            raise ValueError(
                f"{file}: expected {name} of shape {list(array.shape)}, got {got}; set "
                "distillation.projection as it was, or remove the file for a fresh projection"
            )
    return loaded


def _make_mask(run: Run) -> Mask | None:
    rate = run.config.distillation.general_mask_rate
    if not rate:
        return None
    return make_mask(mask_rate=rate, **run.mask_ids)


def _judge(run: Run, apply: Apply):
    """The dev set's, of the student without what stands beside it."""
    judge = dev_judge(run, apply, run.section("prediction"))
    return judge._replace(measure=lambda params: judge.measure(params["student"]))
