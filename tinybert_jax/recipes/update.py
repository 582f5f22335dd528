"""Further training of a classifier on new rows, so that it keeps what it had right.

Old rows are trained on again beside the new ones; the old model teaches where it is right; the
trained weights are the mean of several seeds, which differ in dropout alone (after Wortsman et al.
2022, arXiv 2203.05482, whose models differ in more); and of the weights between the old and the
trained ones those are taken that break fewest old rows (Wortsman et al. 2022, arXiv 2109.01903). A
paired test of the old and the new model is the gate.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.config.models import Student
from tinybert_jax.config.run import StagePlan
from tinybert_jax.data.examples import Examples
from tinybert_jax.huggingface.folder import read_model, start_params
from tinybert_jax.inference.compare import NUM_SHOWN, differing_rows
from tinybert_jax.inference.scorer import make_scorer
from tinybert_jax.losses.pointwise import negative_log_likelihood, softmax_cross_entropy
from tinybert_jax.metrics.paired import count_pairs, mcnemar, upper_bound
from tinybert_jax.models.params import Params, sha256
from tinybert_jax.objectives.distillation import Options, Role, make_distill
from tinybert_jax.objectives.linear_probe import fit_head
from tinybert_jax.parallel.mesh import num_batch_shards
from tinybert_jax.performance.flops import training_flops_per_token
from tinybert_jax.runs import teacher_logits
from tinybert_jax.runs.judges import TaskEvaluator, make_task_evaluator
from tinybert_jax.runs.run import (
    Run,
    make_task_model,
    save_task_model,
    trained_options,
    with_dropout,
)
from tinybert_jax.runs.scoring import score
from tinybert_jax.runs.stage import Member, Training
from tinybert_jax.runs.stage_batches import StageBatches, make_stage_batches
from tinybert_jax.runs.used_words import train_stage
from tinybert_jax.runs.workload import count_last_layer_tokens
from tinybert_jax.tasks.task import Scored
from tinybert_jax.terms.term import Reads

RECORD = "update.json"  # in the model folder: the sweep, and the counts that the gate reads
_ABSENT = -1e4  # the old model's logit of a label that it does not know
_HEAD_C = 10.0  # of the fit of new labels, see `fit_head`: with 1 hardly any row gets one of them
_SURE = 0.05  # p-value of McNemar's test below which a model is worse


def main(run: Run, plan: StagePlan) -> None:
    """Trains the student of the run from its folder, the old model, and saves the best mixture."""
    section, task = plan.section, run.required_task
    (student,) = run.students
    old = _read_old(run, student)

    # The old model's answers, and a start that knows the new labels.
    rows = task.kind.encode(run.tokenizer, task.data.train, section.max_length)
    features = _features(run, plan, student, old)
    assert rows.labels is not None
    num_labels = task.data.num_outputs
    head = _grown_head(old, features, rows.labels, num_labels)
    start = {**old.params, "classifier": head}
    teacher = {**old.params, "classifier": _padded_head(old, num_labels)}
    run.log.say(f"update: {num_labels - len(old.label_names)} new labels join the head")
    logits = features @ teacher["classifier"]["kernel"] + teacher["classifier"]["bias"]
    batches = make_stage_batches(run, plan, lambda _: (logits, sha256(old.params)))

    # Train.
    training, evaluator = _make(run, plan, batches, start)
    trained = train_stage(run, training)[student.name]
    end = _mean([params["student"] for params in trained])
    if len(trained) > 1:
        run.log.say(f"update: the weights are the mean of {len(trained)} seeds{_alike(trained)}")

    # Choose how far to go from the old weights to the trained ones, and count what breaks.
    judge_rows, data = _make_judge(run, plan, student), task.data
    points = _sweep(judge_rows, start, teacher, end, section, data.selection)
    chosen = _choose(points)
    mixed = _between(start, end, chosen["share"])
    before, after = (judge_rows(params, data.dev) for params in (teacher, mixed))
    counts = _count(before, after, data.dev)
    assert data.dev.labels is not None
    has_new_label = data.dev.labels >= len(old.label_names)
    if has_new_label.any():
        counts["new_labels"] = _count_side(before, after, has_new_label)
    record = {"share": chosen["share"], "chosen_on": data.selection_name, "sweep": points}
    record |= {"dev": counts, "seeds": list(plan.seeds)}
    run.log.say(f"{plan.name}: {_describe(points, chosen, data.selection_name)}")
    extra = {RECORD: functools.partial(_write, record)}
    (folder,) = run.seed_folders(plan, student.name)
    save_task_model(run, folder, mixed, student.sizes, evaluator.tune(mixed), extra)


def make_training(run: Run, plan: StagePlan) -> Training:
    """The model and the batches of the stage; the old model's logits are zeros."""
    read_logits = functools.partial(teacher_logits.zeros, run)
    return _make(run, plan, make_stage_batches(run, plan, read_logits), {})[0]


def _make(
    run: Run, plan: StagePlan, batches: StageBatches, start: Params
) -> tuple[Training, TaskEvaluator]:
    """(training, evaluator); `start`: the initial parameters."""
    section, task, (student,) = plan.section, run.required_task, run.students
    apply, init = make_task_model(
        run, with_dropout(student.sizes, section), **trained_options(run.compute, plan)
    )
    role = Role(apply, Reads(task_logits=True), student.sizes.num_hidden_layers)
    options = Options(form=task.kind.form, num_shards=num_batch_shards(run.mesh))
    evaluator = make_task_evaluator(run, apply, section, student.sizes)
    measured = evaluator.as_evaluator()
    measured = measured._replace(measure=lambda params: evaluator.measure(params["student"]))
    member = Member(
        make_distill(role, role, section.terms, options),
        lambda key: {"student": init(key)},
        lambda key, seed: {"student": start},
        measured,
    )
    training = Training(
        plan=plan,
        members={student.name: member},
        batches=batches,
        flops_per_token=lambda width: training_flops_per_token(
            [student.sizes] * len(plan.seeds),
            width,
            num_last_layer_tokens=count_last_layer_tokens(run, plan, width),
        ),
        metric=task.metric,
    )
    return training, evaluator


class _Old(NamedTuple):
    params: Params
    label_names: tuple[str, ...]


def _read_old(run: Run, student: Student) -> _Old:
    path = student.section.path
    assert path is not None  # the config check requires it
    model = read_model(path)
    assert model.head is not None  # the checks refuse a folder without
    names = model.head.label_names
    _, init = run.required_task.kind.make_head(student.sizes, len(names))
    return _Old(start_params(path, init, whole=True), names)


def _features(run: Run, plan: StagePlan, student: Student, old: _Old) -> np.ndarray:
    """fp32 [rows, dim]: what the head of the old model reads of the training rows."""
    size = student.sizes.hidden_size
    identity = {"kernel": np.eye(size, dtype=np.float32), "bias": np.zeros(size, np.float32)}
    params = {**old.params, "classifier": identity}
    (scored,) = score(
        run, plan, [params], student.sizes, run.required_task.data.train, num_outputs=size
    )
    return scored.logits


def _padded_head(old: _Old, num_outputs: int) -> dict[str, np.ndarray]:
    """The old head with outputs for all labels; it never answers one that it does not know."""
    given: Any = old.params["classifier"]
    kernel, bias = (np.asarray(given[name]) for name in ("kernel", "bias"))
    num_new = num_outputs - len(old.label_names)
    return {
        "kernel": np.pad(kernel, ((0, 0), (0, num_new))),
        "bias": np.pad(bias, (0, num_new), constant_values=_ABSENT),
    }


def _grown_head(
    old: _Old, features: np.ndarray, labels: np.ndarray, num_outputs: int
) -> dict[str, np.ndarray]:
    """The old head, and beside it outputs for new labels that are fitted to the old model.

    `features` [rows, dim] and `labels` [rows]: of old and new rows.
    """
    head, num_old = _padded_head(old, num_outputs), len(old.label_names)
    num_new = num_outputs - num_old
    if not num_new:
        return head
    known = features @ head["kernel"][:, :num_old] + head["bias"][:num_old]
    empty = {"kernel": jnp.zeros((features.shape[1], num_new)), "bias": jnp.zeros(num_new)}
    targets = np.concatenate([labels[:, None].astype(np.float32), known], axis=1)
    fitted = fit_head(empty, features, targets, _beside_old, _HEAD_C)
    return {
        "kernel": np.concatenate([head["kernel"][:, :num_old], np.asarray(fitted["kernel"])], 1),
        "bias": np.concatenate([head["bias"][:num_old], np.asarray(fitted["bias"])]),
    }


def _beside_old(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy over old labels, whose logits are in `targets` after the gold, and new ones."""
    whole = jnp.concatenate([targets[:, 1:], logits], axis=1)
    return softmax_cross_entropy(whole, targets[:, 0].astype(jnp.int32), jnp.ones(len(logits)))


def _mean(models: Sequence[Params]) -> Params:
    """The mean of the weights of models that started from the same ones, fp32 on the host."""
    if len(models) == 1:
        return models[0]

    def mean(*arrays: Any) -> np.ndarray:  # in fp64: a weight that no seed changed keeps its bits
        return np.mean(arrays, 0, dtype=np.float64).astype(np.float32)

    return jax.tree.map(mean, *models)


def _alike(models: Sequence[Params]) -> str:
    """What is to be said of seeds that trained to the same weights."""
    is_alike = len({sha256(params) for params in models}) == 1
    return ", which are all the same (no dropout): num_seeds=1 is enough" if is_alike else ""


def _between(start: Params, end: Params, share: float) -> Params:
    """The weights at this share of the way from `start` to `end`, fp32 on the host."""

    def mix(one: Any, two: Any) -> np.ndarray:
        one, two = np.asarray(one, np.float32), np.asarray(two, np.float32)
        return two if share == 1 else one + np.float32(share) * (two - one)

    return jax.tree.map(mix, start, end)


class _Judged(NamedTuple):
    """How well a model knows the labels of some rows."""

    is_right: np.ndarray  # bool [n]
    losses: np.ndarray  # fp32 [n], cross-entropy
    answers: np.ndarray  # int [n], the label with the highest logit


Judge = Callable[[Params, Examples], _Judged]


def _make_judge(run: Run, plan: StagePlan, student: Student) -> Judge:
    """judge_rows(params, examples), for any weights of the student."""
    task, section = run.required_task.kind, plan.section
    apply, _ = make_task_model(run, student.sizes)
    score_rows = make_scorer(  # one for all models, so that it compiles once
        apply, buckets=section.buckets(), pad_token_id=run.tokenizer.pad_token_id
    )

    def judge_rows(params: Params, examples: Examples) -> _Judged:
        rows = task.encode(run.tokenizer, examples, section.max_length)
        logits = score_rows(params, rows)
        losses = negative_log_likelihood(jnp.asarray(logits), jnp.asarray(examples.labels))
        is_right = task.is_right(Scored(logits, rows, examples), {})
        return _Judged(is_right, np.asarray(losses), logits.argmax(-1))

    return judge_rows


def _sweep(
    judge_rows: Judge,
    start: Params,
    teacher: Params,
    end: Params,
    section: Any,
    examples: Examples,
) -> list[dict[str, Any]]:
    """What each interpolation has right and breaks among the examples that choose."""
    before = judge_rows(teacher, examples)
    points = []
    for share in sorted({*section.interpolations, 1.0}):
        after = judge_rows(_between(start, end, share), examples)
        points.append({"share": share, **_count(before, after, examples)})
    return points


def _count(old: _Judged, new: _Judged, examples: Examples) -> dict[str, Any]:
    """The counts of the old and of the new rows; see `_count_side`."""
    assert examples.is_old is not None
    sides = {"old": examples.is_old, "new": ~examples.is_old}
    return {name: _count_side(old, new, own) for name, own in sides.items()}


def _count_side(old: _Judged, new: _Judged, own: np.ndarray) -> dict[str, Any]:
    """Pairs, share that broke with its bound, McNemar's p, mean loss of the rows `own` (bool [n]).

    The loss is that of the new model.
    """
    pairs = count_pairs(old.is_right[own], new.is_right[own])
    return {
        **pairs._asdict(),
        "loss": float(new.losses[own].mean()),
        "num_examples": pairs.total,
        "broken_share": pairs.broken / pairs.total,
        "broken_bound": upper_bound(pairs.broken, pairs.total),
        "mcnemar_p": mcnemar(pairs.fixed, pairs.broken),
    }


def _num_right(counts: dict[str, Any]) -> int:
    return counts["both"] + counts["fixed"]


def _choose(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The point that breaks fewest old rows, of those no worse on new rows than the last one.

    No worse means as many rows right and no higher mean loss. The loss decides too, because few
    new rows leave many points with equal counts. Among equals the point is taken that has the
    lowest loss on old and new rows.
    """
    last = points[-1]["new"]
    good = [
        point
        for point in points[:-1]
        if _num_right(point["new"]) >= _num_right(last) and point["new"]["loss"] <= last["loss"]
    ]
    return min(
        [*good, points[-1]], key=lambda p: (p["old"]["broken"], p["old"]["loss"] + p["new"]["loss"])
    )


def _describe(points: Sequence[dict[str, Any]], chosen: dict[str, Any], selection_name: str) -> str:
    last, own = points[-1], chosen["old"]
    return (
        f"{chosen['share']:.0%} of the way from the old weights to the trained ones: on "
        f"{selection_name} it breaks {own['broken']} of {own['num_examples']:,} old rows "
        f"(trained: {last['old']['broken']}) and has {_num_right(chosen['new'])} of "
        f"{chosen['new']['num_examples']:,} new rows right (trained: {_num_right(last['new'])})"
    )


def _write(record: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def judge(run: Run, plan: StagePlan) -> dict[str, Any]:
    """What the trained model mends and breaks on dev, and the reasons against it.

    The entry `update` of `results.json`, which report.gate reads.
    """
    (student,), data = run.students, run.required_task.data
    (folder,) = run.seed_folders(plan, student.name)
    dev = json.loads((folder / RECORD).read_text(encoding="utf-8"))["dev"]
    limit, reasons = plan.section.max_regressions, []
    for name, own in dev.items():
        if own["broken"] > own["fixed"] and own["mcnemar_p"] < _SURE:
            reasons.append(f"it is worse on {name} rows, p = {own['mcnemar_p']:.2g}")
    bound = dev["old"]["broken_bound"]
    if limit is not None and bound > limit:
        reasons.append(f"up to {bound:.2%} of the old rows may be broken, allowed are {limit:.2%}")
    found = {"old": student.section.path, "max_regressions": limit, "dev": dev, "reasons": reasons}
    return found | _wrong_rows(run, plan, folder, data.dev)


def _wrong_rows(
    run: Run, plan: StagePlan, folder: Path, examples: Examples
) -> dict[str, list[dict[str, str]]]:
    """The first old rows that broke (`broken`) and new rows that are wrong (`wrong`), with answers.

    They are scored here again, because texts of dev must not lie in the model's folder.
    """
    (student,), kind = run.students, run.required_task.kind
    names, num_labels = examples.label_names, examples.num_outputs
    assert examples.is_old is not None and names is not None
    old, judge_rows = _read_old(run, student), _make_judge(run, plan, student)
    _, init = kind.make_head(student.sizes, num_labels)
    models = [
        {**old.params, "classifier": _padded_head(old, num_labels)},
        start_params(folder, init, whole=True),
    ]
    before, after = (judge_rows(model, examples) for model in models)
    said = [[names[label] for label in side.answers] for side in (before, after)]
    chosen = {
        "broken": before.is_right & ~after.is_right & examples.is_old,
        "wrong": ~after.is_right & ~examples.is_old,
    }
    return {
        name: differing_rows(kind, examples, np.flatnonzero(own)[:NUM_SHOWN].tolist(), said)
        for name, own in chosen.items()
    }
