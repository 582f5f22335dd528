"""Supervised training on the task: the teacher (`finetune`), or the student alone (`baseline`)."""

from tinybert_jax import cost, results
from tinybert_jax.convert import hf_files
from tinybert_jax.feed import stage_feed
from tinybert_jax.model.heads import make_classifier
from tinybert_jax.objectives import make_supervised
from tinybert_jax.run import Run, compute_options, dev_judge, with_dropout
from tinybert_jax.stage import Training, run_stage


def main(run: Run, stage: str = "finetune") -> None:
    """`finetune` starts from the pretrained teacher, `baseline` from a fresh student.

    Of several teachers the best on the dev set is saved last, as the stage's model.
    """
    section = run.section(stage)
    model, start = (
        (run.student_sizes, run.student_path)
        if stage == "baseline"
        else (run.teacher, run.pretrained_teacher)
    )

    # Model.
    apply, init = make_classifier(
        with_dropout(model, section), run.data.num_outputs, **compute_options(run.config)
    )

    # Train and hand on the best by dev score.
    models = run_stage(
        run,
        Training(
            name=stage,
            section=section,
            objective=make_supervised(
                apply,
                regression=run.is_regression,
                label_smoothing=section.label_smoothing,
            ),
            init_params=lambda key, _: hf_files.start_params(start, init, key),
            feed=stage_feed(run, stage),
            frozen=(),
            flops_per_token=lambda width: cost.training_flops_per_token(
                model, width, num_students=len(run.config.seeds(stage))
            ),
            judge=dev_judge(run, apply, section),
            score=run.score,
        ),
    )
    places = list(zip(run.seed_folders(stage), models, strict=True))
    if stage == "finetune" and len(models) > 1:
        logits = results.dev_logits(run, stage, models, model)
        by_seed = [results.dev_metrics(run, own) for own in logits]
        places.append((run.model_folder(stage), models[results.best_of(by_seed, run.score)]))
    for folder, params in places:
        hf_files.save_model(
            folder,
            params,
            model,
            run.tokenizer,
            label_names=run.data.label_names,
            regression=run.is_regression,
        )
