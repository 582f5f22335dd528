"""TinyBERT's distillation: general on a corpus, then intermediate and prediction on the task."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from tinybert_jax import cost, distill
from tinybert_jax.convert import hf_files
from tinybert_jax.data.pipeline import tokenize_task
from tinybert_jax.feed import Feed, corpus_feed, rows_feed
from tinybert_jax.model.heads import make_classifier, make_encoder
from tinybert_jax.objectives import make_distill_layers, make_distill_prediction
from tinybert_jax.run import Run, compute_options, dev_judge, with_dropout
from tinybert_jax.stage import Training, run_stage

_PROJECTION = "projection.safetensors"


def general(run: Run) -> None:
    """Layers of the pretrained teacher, on the corpus."""
    assert run.pretrained_teacher is not None  # open_run refuses a random teacher
    _layers(run, "general", corpus_feed(run, "general"), run.pretrained_teacher)


def intermediate(run: Run) -> None:
    """Layers of the fine-tuned teacher, on the task's text."""
    _layers(run, "intermediate", _task_feed(run, "intermediate"), run.task_teacher)


def prediction(run: Run) -> None:
    """Logits of the fine-tuned teacher, on the task's text."""
    section, options = run.section("prediction"), compute_options(run.config)
    feed = _task_feed(run, "prediction")

    # Teacher and student.
    teacher_apply, teacher_init = make_classifier(run.teacher, run.data.num_outputs, **options)
    teacher = hf_files.start_params(run.task_teacher, teacher_init, whole=True)
    apply, init = make_classifier(
        with_dropout(run.student_sizes, section), run.data.num_outputs, **options
    )

    def init_params(key: jax.Array, student: int):
        start = run.latest("intermediate", "general", student=student) or run.student_path
        params = hf_files.start_params(start, init, key)
        if start is None and run.starts_from_embeddings:
            encoder, _ = distill.start_from_teacher_embeddings(
                params["encoder"], teacher["encoder"]
            )
            params = {**params, "encoder": encoder}
        return params

    # Train and hand on the best by dev score, of each seed.
    students = run_stage(
        run,
        Training(
            name="prediction",
            section=section,
            objective=make_distill_prediction(
                apply,
                teacher_apply,
                run.config.distillation,
                regression=run.is_regression,
            ),
            init_params=init_params,
            feed=feed,
            frozen=teacher,
            flops_per_token=lambda width: cost.training_flops_per_token(
                run.student_sizes,
                width,
                teacher=run.teacher,
                num_students=run.config.num_seeds,
            ),
            judge=dev_judge(run, apply, section),
            score=run.score,
        ),
    )
    for student, params in enumerate(students):
        hf_files.save_model(
            run.model_folder("prediction", student),
            params,
            run.student_sizes,
            run.tokenizer,
            label_names=run.data.label_names,
            regression=run.is_regression,
        )


def _layers(run: Run, stage: str, feed: Feed, teacher_folder: str | Path) -> None:
    section, options = run.section(stage), compute_options(run.config)

    # Teacher, frozen; student with its projection, from the stage before where there is one.
    teacher_apply, teacher_init = make_encoder(run.teacher, **options)
    teacher = hf_files.start_params(teacher_folder, teacher_init, whole=True)
    student_apply, student_init = make_encoder(with_dropout(run.student_sizes, section), **options)

    def init_params(key: jax.Array, number: int):
        before = run.latest("general", student=number) if stage == "intermediate" else None
        start = before or run.student_path
        student_key, projection_key = jax.random.split(key)
        student = hf_files.start_params(start, student_init, student_key)
        num_projections = 1
        if run.config.distillation.projection == "per_layer":
            num_projections = run.student_sizes.num_hidden_layers + 1
        projection = distill.init_projection(
            projection_key, run.student_sizes.hidden_size, run.teacher.hidden_size, num_projections
        )
        if start is not None and (Path(start) / _PROJECTION).is_file():
            projection = _load_projection(Path(start) / _PROJECTION, projection)
        elif start is None and run.starts_from_embeddings:
            student, directions = distill.start_from_teacher_embeddings(student, teacher)
            projection["kernel"] = jnp.tile(directions.T[None], (num_projections, 1, 1))
        return {"student": student, "projection": projection}

    # Train and hand on the last: there is no dev score without a head.
    students = run_stage(
        run,
        Training(
            name=stage,
            section=section,
            objective=make_distill_layers(
                student_apply,
                teacher_apply,
                distill.make_layer_map(
                    run.config.distillation.layer_map,
                    run.student_sizes.num_hidden_layers,
                    run.teacher.num_hidden_layers,
                ),
                run.config.distillation,
            ),
            init_params=init_params,
            feed=feed,
            frozen=teacher,
            flops_per_token=lambda width: cost.training_flops_per_token(
                run.student_sizes,
                width,
                projection_dim=run.teacher.hidden_size,
                teacher=run.teacher,
                num_students=run.config.num_seeds,
            ),
        ),
    )
    for number, params in enumerate(students):
        hf_files.save_model(
            run.model_folder(stage, number),
            params["student"],
            run.student_sizes,
            run.tokenizer,
            extra={_PROJECTION: functools.partial(save_file, params["projection"])},
        )


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


def _task_feed(run: Run, stage: str) -> Feed:
    """All text that the teacher can label."""
    rows = tokenize_task(run.tokenizer, run.data.distilled, run.section(stage).max_length)
    run.log.say(
        f"{stage}: {len(rows.lengths):,} rows, {len(rows.ids):,} tokens, {rows.num_truncated:,} cut"
    )
    return rows_feed(run, stage, rows)
