"""How a run judges models of its task: on the examples that choose, and against no learning."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinybert_jax.config.stages import StageSection
from tinybert_jax.data.errors import GateError
from tinybert_jax.data.examples import Examples
from tinybert_jax.inference.scorer import Evaluator, Scorer, make_scorer
from tinybert_jax.inference.seq2seq import TinyBertForConditionalGeneration, translate
from tinybert_jax.metrics.paired import needed_examples, upper_bound
from tinybert_jax.models.params import Apply, Params, restack_layers
from tinybert_jax.parallel import sharding
from tinybert_jax.runs.run import Run, load_frozen, place_frozen_params
from tinybert_jax.settings.sizes import EncoderDecoderConfig, Sizes
from tinybert_jax.tasks.task import Scored, Settings, Task


class TaskEvaluator(NamedTuple):
    """Scores the parameters of one model on the examples that choose checkpoints."""

    score: Any  # parameters -> Scored: those examples with the model's logits
    task: Task
    fingerprint: str  # SHA-256 of the tokenised rows

    def measure(self, params: Any) -> dict[str, float]:
        """The metrics by name, with the settings that are best on the same examples."""
        scored = self.score(params)
        return self.task.measure(scored, self.task.best_settings(scored))

    def tune(self, params: Any) -> Settings:
        """The settings of the head, such as a threshold, that are best on these examples."""
        return self.task.best_settings(self.score(params)) if self.task.tune else {}

    def as_evaluator(self) -> Evaluator:
        return Evaluator(self.measure, self.fingerprint)


def make_stage_scorer(run: Run, apply: Apply, section: StageSection) -> Scorer:
    """score(params, rows): the logits of all rows, in the stage's buckets, on all devices."""
    return make_scorer(
        apply,
        buckets=section.buckets(),
        pad_token_id=run.tokenizer.pad_token_id,
        packed=section.batching == "pack",
        mesh=run.mesh,
    )


def score_generated(
    run: Run, params: Params, sizes: Sizes, section: StageSection, examples: Examples
) -> Scored:
    """The examples with the texts that a model makes of them, greedily."""
    rows = run.required_task.kind.encode(run.tokenizer, examples, section.max_length)
    texts = generated(run, params, sizes, section, examples)
    return Scored(np.zeros((len(texts), 0), np.float32), rows, examples, texts)


def generated(
    run: Run, params: Params, sizes: Sizes, section: StageSection, examples: Examples, **how: Any
) -> list[str]:
    """The texts that a model makes of the sources; `how`: settings of `generate`, or greedy."""
    assert isinstance(sizes, EncoderDecoderConfig)
    whole = restack_layers(sharding.fetch(params))
    model = TinyBertForConditionalGeneration(sizes, whole, run.tokenizers)
    most = {"max_length": section.max_length, "max_new_tokens": section.max_length}
    return translate(model, examples.text, **most, **how).lines


def make_task_evaluator(
    run: Run, apply: Apply, section: StageSection, sizes: Sizes
) -> TaskEvaluator:
    """The evaluator that chooses checkpoints, with rows and buckets of the stage's lengths."""
    task, examples = run.required_task.kind, run.required_task.data.selection
    rows = task.encode(run.tokenizer, examples, section.max_length)
    if task.generates:
        make = lambda params: score_generated(run, params, sizes, section, examples)  # noqa: E731
        return TaskEvaluator(make, task, rows.fingerprint())
    score = make_stage_scorer(run, apply, section)
    return TaskEvaluator(
        lambda params: Scored(score(params, rows), rows, examples), task, rows.fingerprint()
    )


def check_teacher(run: Run, path: str | Path, sizes: Sizes) -> None:
    """Raises GateError for a teacher that has learnt nothing.

    Its score on the examples that choose has to be `distillation.teacher_margin` above the score of
    always answering the most frequent class.
    """
    margin, task = run.distillation.teacher_margin, run.required_task.kind
    data = run.required_task.data
    floor = task.floor(data.selection)
    if floor is None or margin == -1:
        return
    plans = reversed([*run.plans.values()])
    plan = next(plan for plan in plans if plan.stage.teacher == "task")
    apply, params = load_frozen(run, path, sizes)
    evaluator = make_task_evaluator(run, apply, plan.section, sizes)
    metrics = evaluator.measure(place_frozen_params(run, params))
    got, needed = metrics[task.floor_metric], min(floor + margin, 1.0)
    if got < needed:
        raise GateError(
            f"teacher: expected a {data.selection_name} {task.floor_metric} of at least "
            f"{needed:.4f} (a model that learnt nothing has {floor:.4f}), got {got:.4f} from "
            f"{path}; check the order of its labels, fine-tune it on the task, or for longer (in "
            "another run_dir), or accept it with distillation.teacher_margin=-1"
        )


def check_gate(limit: float | None, dev: Examples) -> None:
    """Raises ValueError for a limit that no model passes, because dev has too few old rows."""
    if limit is None:
        return
    assert dev.is_old is not None
    count, needed = int(dev.is_old.sum()), needed_examples(limit)
    if count < needed:
        least = math.ceil(1000 * upper_bound(0, count)) / 1000
        raise ValueError(
            f"update.max_regressions: expected at least {needed:,} old rows in dev for a limit of "
            f"{100 * limit:.3g} % (--max-regressions), got {count:,}, so that no model could pass; "
            f"give more old rows, or allow {least:.1%} or more, which passes if none breaks"
        )
