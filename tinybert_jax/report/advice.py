"""What a run's numbers say about what to do next: one line each, from `results.json`.

Every line names the numbers that it rests on and a setting to change. A run whose numbers give no
reason for a line has none.
"""

import html
import math
from typing import Any

from tinybert_jax.report.gate import sides_of
from tinybert_jax.report.tables import (
    LOWER_IS_BETTER,
    TRANSLATION_METRICS,
    Model,
    difference_to,
    finite_number,
    floor_not_beaten,
    in_points,
    interval_of,
    mapping_of,
    metric_name,
    models_of,
    show_score,
)

_NEAR_CHANCE = 0.8  # of the loss of guessing
_WIDE = 3.0  # points, half of an interval; wider ones tell few models apart
_WANTED = 2.0
_MOST_DEV = 0.3  # of the rows; the others are needed to train on
_TAIL = 0.2  # of the steps: a score that rose in them was still rising


def advice(results: dict[str, Any]) -> list[str]:
    """The lines in the order of their weight; empty where there is nothing to say."""
    if results.get("metric") in LOWER_IS_BETTER:
        return []
    if mapping_of(results, "data").get("builtin"):
        return [
            "built-in text shows that the pipeline works, not what distillation brings: take a "
            "table of your own (tinybert run --data) and a pretrained --teacher"
        ]
    lines = [_guessing_teacher(results), _nothing_new(results)]
    for student in (m for m in models_of(results) if m.get("role") == "student"):
        lines += [_no_better_than_one_answer(results, student)]
        lines += [_beaten_by_itself(results, student), _beaten_by_linear(results, student)]
        lines.append(_equal_seeds(student))
    lines += [_still_learning(results, "finetune", "the teacher")]
    lines += [_still_learning(results, "prediction", "the student"), _few_rows(results)]
    return [line for line in lines if line]


def advice_list(results: dict[str, Any]) -> str:
    """The lines that results.json holds as an HTML list; empty without any."""
    held = results.get("advice")
    held = held if isinstance(held, list) else []
    lines = "".join(f"<li>{html.escape(str(line))}</li>" for line in held)
    return f"<ul>{lines}</ul>" if lines else ""


def _guessing_teacher(results: dict[str, Any]) -> str:
    loss = finite_number(_stage(results, "finetune").get("last_loss"))
    labels = results.get("label_names") or ()
    is_softmax = "accuracy" in _metrics(results)
    if loss is None or len(labels) < 2 or not is_softmax:
        return ""
    chance = math.log(len(labels))
    if loss < _NEAR_CHANCE * chance:
        return ""
    return (
        f"the teacher has hardly learnt: its loss ended at {loss:.2f}, and guessing has "
        f"{chance:.2f}; a student cannot learn more from it: {_longer(results, 'finetune')}, or "
        "raise finetune.learning_rate"
    )


def _nothing_new(results: dict[str, Any]) -> str:
    """Where an update has no more of the new rows right than the model before it."""
    new = next((side for side in sides_of(results) if side.name == "new"), None)
    if new is None or new.after > new.before or new.before == new.total:
        return ""
    return (
        f"the update has no more of the new rows of dev right than the old model: {new.after:,} "
        f"of {new.total:,}, and {new.before:,} before: give more new rows, or "
        f"{_longer(results, 'update')}"
    )


def _no_better_than_one_answer(results: dict[str, Any], student: Model) -> str:
    floor = floor_not_beaten(results, student)
    if floor is None:
        return ""
    metric = results.get("metric")
    name, shown = metric_name(metric, results), show_score(metric, floor)
    return (
        f"{student.get('name')} scores not clearly higher than always giving the most frequent "
        f"answer, whose {name} is {shown}: it has hardly learnt the task, whatever share of its "
        "teacher it keeps; train for longer, or on more rows"
    )


def _beaten_by_itself(results: dict[str, Any], student: Model) -> str:
    compared = difference_to(results, student, "baseline")
    if compared is None or compared[1] > 0:
        return ""
    difference, low, high = _in_points(results, *compared)
    verdict = "lower than" if difference < 0 else "not clearly higher than"
    found = mapping_of(mapping_of(results, "comparisons"), str(student.get("name")))
    if "teacher" in found and not mapping_of(found, "gap_closed").get("interval"):
        return (
            f"{student.get('name')} scores {verdict} the same student without a teacher "
            f"({difference:+.1f} points {_bracket(low, high)}), and its teacher is not clearly "
            "ahead of that one either, so these dev rows do not tell what distillation brings: "
            "give task.dev a larger file; if it stays so, take the student without a teacher, or a "
            "better teacher"
        )
    is_translation = results.get("metric") in TRANSLATION_METRICS
    stages = ("prediction",) if is_translation else ("intermediate", "prediction")
    init = "teacher_layers, or teacher_reduced for a narrower one"
    changes = [f"distil for longer ({', '.join(f'{stage}.num_epochs' for stage in stages)})"]
    if student.get("start") in (None, "random", "teacher_embeddings"):
        init = "teacher_layers" if is_translation else init
        changes.append(f"start the student from the teacher's layers (init: {init})")
    if not is_translation:
        more = "more " if results.get("unlabelled_examples") else ""
        changes.append(f"give {more}task.unlabelled text")
    if results.get("export") != "best" and difference < 0:
        changes.append("take the better one with export=best")
    return (
        f"{student.get('name')} scores {verdict} the same student without a teacher "
        f"({difference:+.1f} points {_bracket(low, high)}): {', or '.join(changes)}"
    )


def _beaten_by_linear(results: dict[str, Any], student: Model) -> str:
    compared = difference_to(results, student, "linear")
    if compared is None or compared[1] > 0 or sides_of(results):  # whose model is in use already
        return ""
    difference, low, high = _in_points(results, *compared)
    name = student.get("name")
    change = "a larger student, or train for longer"
    if high >= 0:
        return (
            f"{name} scores not clearly higher than TF-IDF with a linear model "
            f"({difference:+.1f} points {_bracket(low, high)}), which costs next to nothing: "
            f"take that, or {change}"
        )
    return (
        f"TF-IDF with a linear model scores higher than {name} ({-difference:.1f} points "
        f"{_bracket(-high, -low)}) and costs next to nothing: take that, or {change}"
    )


def _equal_seeds(student: Model) -> str:
    by_seed = student.get("by_seed")
    if not student.get("has_equal_seeds") or not isinstance(by_seed, list):
        return ""
    return (
        f"the {len(by_seed)} seeds of {student.get('name')} gave the same weights, as nothing of "
        "it is random (no dropout, no random start): num_seeds=1 is enough"
    )


def _in_points(results: dict[str, Any], *differences: float) -> list[float]:
    return [in_points(results.get("metric"), difference) for difference in differences]


def _bracket(low: float, high: float) -> str:
    return f"[{low:+.1f}, {high:+.1f}]"


def _still_learning(results: dict[str, Any], name: str, subject: str) -> str:
    """Where the score rose in the last fifth of the steps by more than its standard error."""
    stage = _stage(results, name)
    first, last, step = (finite_number(stage.get(key)) for key in ("tail_score", "score", "step"))
    role = "teacher" if name == "finetune" else "student"
    bounds = [interval_of(m, results.get("metric")) for m in models_of(results)]
    widths = [
        bound[1] - bound[0]
        for bound, model in zip(bounds, models_of(results), strict=True)
        if bound and model.get("role") == role
    ]
    widths = [width for width in widths if width > 0]
    if first is None or last is None or step is None or not widths:
        return ""
    # The scores are of the rows that choose, the intervals of dev: fewer rows have a larger error.
    num_dev, num_select = (
        finite_number(results.get(name)) or 0 for name in ("dev_examples", "select_examples")
    )
    scale = math.sqrt(num_dev / num_select) if num_dev and num_select else 1.0
    if stage.get("best_step") != step or last - first <= scale * min(widths) / 4:
        return ""
    first, last = (show_score(results.get("metric"), score) for score in (first, last))
    metric = metric_name(results.get("metric"), results)
    return (
        f"{subject} was still learning: its {metric} rose from "
        f"{first} to {last} over its last evaluations and was best at the end, after "
        f"{step:,.0f} steps: {_longer(results, name)}"
    )


def _few_rows(results: dict[str, Any]) -> str:
    count = finite_number(results.get("dev_examples"))
    student = next((m for m in models_of(results) if m.get("role") == "student"), None)
    bounds = interval_of(student or {}, results.get("metric"))
    if not count or bounds is None:
        return ""
    half = in_points(results.get("metric"), (bounds[1] - bounds[0]) / 2)
    if half <= _WIDE:
        return ""
    wanted = count * (half / _WANTED) ** 2
    others = (finite_number(results.get(f"{part}_examples")) or 0 for part in ("train", "select"))
    share = "raise task.dev_share, or " if wanted < _MOST_DEV * (count + sum(others)) else ""
    fix = f"{share}give task.dev a larger file"
    if sides_of(results):
        fix = "give more rows, or compare both models on a file of its own"
    return (
        f"{count:,.0f} dev rows tell two models apart only where they differ by several points "
        f"(the student's score is known to ± {half:.1f} points); ± {_WANTED:.0f} points take about "
        f"{wanted:,.0f} rows: {fix}"
    )


def _longer(results: dict[str, Any], name: str) -> str:
    stage = _stage(results, name)
    for key in ("num_epochs", "num_steps"):
        if (value := finite_number(stage.get(key))) is not None:
            return f"train longer, {name}.{key}={2 * value:g} (in another run_dir)"
    return f"train longer ({name}.num_epochs)"


def _stage(results: dict[str, Any], name: str) -> dict[str, Any]:
    stages = results.get("stages")
    stage = stages.get(name) if isinstance(stages, dict) else None
    return stage if isinstance(stage, dict) else {}


def _metrics(results: dict[str, Any]) -> set[str]:
    models = models_of(results)
    found = models[0].get("metrics") if models else None
    return set(found) if isinstance(found, dict) else set()
