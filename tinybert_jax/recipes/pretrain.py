"""Masked-LM pretraining of the teacher, from random weights or from a given folder."""

import jax

from tinybert_jax.batches.loader import segment_rows
from tinybert_jax.batches.tokenize import tokenize_corpus
from tinybert_jax.config.models import SOLE
from tinybert_jax.config.run import StagePlan
from tinybert_jax.config.stages import HELDOUT_SALT
from tinybert_jax.data.wordpiece import is_continuation
from tinybert_jax.huggingface.folder import save_model, start_params
from tinybert_jax.inference.scorer import Evaluator, make_masked_lm_scorer
from tinybert_jax.models.heads import make_masked_lm
from tinybert_jax.models.params import Apply
from tinybert_jax.objectives.masked_lm import make_mlm
from tinybert_jax.parallel import processes
from tinybert_jax.parallel.mesh import num_batch_shards
from tinybert_jax.performance import flops
from tinybert_jax.runs.run import Run, trained_options, with_dropout
from tinybert_jax.runs.stage import Member, Training, run_stage
from tinybert_jax.runs.stage_batches import make_stage_batches
from tinybert_jax.runs.workload import count_last_layer_tokens
from tinybert_jax.settings.sizes import side_of


def main(run: Run, plan: StagePlan) -> None:
    """Trains the teacher, evaluates it on held-out text if there is any, and saves it."""
    trained = run_stage(run, make_training(run, plan))
    if processes.is_main():
        sizes = side_of(run.teacher, "encoder")
        save_model(run.model_folder(plan.name), trained[SOLE][0], sizes, run.tokenizer)


def make_training(run: Run, plan: StagePlan) -> Training:
    """The model and the batches of the stage."""
    section, tokenizer = plan.section, run.tokenizer

    # Model.
    apply, init = make_masked_lm(
        side_of(with_dropout(run.teacher, section), "encoder"),
        pair_head=section.pair_weight > 0,
        position_init=section.position_init,
        **trained_options(run.compute, plan),
    )
    continuations = None if section.mask_unit == "token" else is_continuation(tokenizer)

    teacher = Member(
        make_mlm(
            apply,
            mask_rate=section.mask_rate,
            mask_rate_end=section.mask_rate_end,
            unit=section.mask_unit,
            is_continuation=continuations,
            max_chunk_size=section.loss_chunk_size,
            num_shards=num_batch_shards(run.mesh),
            **run.mask_ids,
            pair_weight=section.pair_weight,
        ),
        init,
        lambda key, _: start_params(run.teacher_section.path, init, key),
        _make_heldout_evaluator(run, plan, apply),
    )
    return Training(
        plan=plan,
        members={SOLE: teacher},
        batches=make_stage_batches(run, plan),
        flops_per_token=lambda width: flops.training_flops_per_token(
            [run.teacher],
            width,
            num_last_layer_tokens=count_last_layer_tokens(run, plan, width),
        ),
    )


def _make_heldout_evaluator(run: Run, plan: StagePlan, apply: Apply) -> Evaluator | None:
    """The evaluator of loss, perplexity and accuracies on held-out text; None without such text."""
    section = plan.section
    if run.heldout_store:
        rows = segment_rows(run.heldout_store)
    elif run.heldout:
        rows = tokenize_corpus(run.tokenizer, run.heldout, section.max_length)
    else:
        return None
    run.log.say(f"{plan.name}: {len(rows.lengths):,} rows, {len(rows.ids):,} tokens held out")
    score = make_masked_lm_scorer(
        apply,
        key=jax.random.fold_in(jax.random.key(run.seed), HELDOUT_SALT),
        **run.mask_ids,
        buckets=section.buckets(),
        pad_token_id=run.tokenizer.pad_token_id,
        packed=not section.pair_weight and (bool(run.heldout_store) or section.batching == "pack"),
        chunk_size=section.loss_chunk_size,
        mesh=run.mesh,
    )
    return Evaluator(lambda params: score(params, rows), rows.fingerprint())
