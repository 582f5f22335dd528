"""Supervised training on the task: the teacher (`finetune`), or the students alone (`baseline`)."""

from pathlib import Path

from tinybert_jax.config.models import SOLE
from tinybert_jax.huggingface.folder import save_model, start_params
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.objectives.supervised import make_supervised
from tinybert_jax.performance import flops
from tinybert_jax.runs.results import best_of, dev_logits, dev_metrics
from tinybert_jax.runs.run import Run, compute_options, dev_judge, with_dropout
from tinybert_jax.runs.stage import Member, Training, run_stage
from tinybert_jax.runs.stage_batches import stage_feed
from tinybert_jax.runs.workload import tokens_read
from tinybert_jax.settings.sizes import ModelConfig


def main(run: Run, stage: str = "finetune") -> None:
    """`finetune` starts from the pretrained teacher, `baseline` from fresh students.

    Of several teachers the best on the dev set is saved last, as the stage's model.
    """
    section, num_seeds = run.section(stage), len(run.config.seeds(stage))
    sizes, starts = {SOLE: run.teacher}, {SOLE: run.pretrained_teacher}
    if stage == "baseline":
        sizes = {student.name: student.sizes for student in run.students}
        starts = {student.name: student.section.path for student in run.students}

    # Train and hand on the best by dev score.
    trained = run_stage(
        run,
        Training(
            name=stage,
            section=section,
            members={name: _member(run, stage, sizes[name], starts[name]) for name in sizes},
            feed=stage_feed(run, stage),
            frozen=(),
            flops_per_token=lambda width: flops.training_flops_per_token(
                [*sizes.values()] * num_seeds, width, num_read=tokens_read(run, stage, width)
            ),
            score=run.score,
        ),
    )
    for name, models in trained.items():
        places = list(zip(run.seed_folders(stage, name), models, strict=True))
        if stage == "finetune" and len(models) > 1:
            logits = dev_logits(run, stage, models, sizes[name])
            by_seed = [dev_metrics(run, own) for own in logits]
            places.append((run.model_folder(stage), models[best_of(by_seed, run.score)]))
        for folder, params in places:
            save_model(
                folder,
                params,
                sizes[name],
                run.tokenizer,
                label_names=run.data.label_names,
                regression=run.is_regression,
            )


def _member(run: Run, stage: str, sizes: ModelConfig, start: str | Path | None) -> Member:
    section = run.section(stage)
    apply, init = make_classifier(
        with_dropout(sizes, section), run.data.num_outputs, **compute_options(run.config, stage)
    )
    return Member(
        make_supervised(
            apply, regression=run.is_regression, label_smoothing=section.label_smoothing
        ),
        lambda key, _: start_params(start, init, key, label_names=run.data.label_names),
        dev_judge(run, apply, section),
    )
