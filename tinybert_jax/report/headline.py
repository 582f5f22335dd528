"""The top of a report: the result in a sentence, what to compare it with, and the sizes drawn.

Takes the parsed `results.json` and returns escaped HTML.
"""

import functools
import html
import math
from typing import Any

from tinybert_jax.report.tables import (
    LOWER_IS_BETTER,
    SAME,
    Model,
    compare,
    conditions_of,
    difference_to,
    find_baseline,
    find_model,
    finite_number,
    floor_not_beaten,
    format_si,
    in_points,
    latency_of,
    mapping_of,
    metric_name,
    models_of,
    percent,
    role_of,
    score_of,
    share_kept,
    show_score,
    students_of,
)


def headline(results: dict[str, Any]) -> str:
    """The result of the run in one sentence, without the parts that `results.json` lacks."""
    teacher, student = find_model(results, "teacher"), find_model(results, "student")
    metric = html.escape(metric_name(results.get("metric"), results))
    model = student or next(iter(models_of(results)), None)
    score = score_of(results, model)
    if model is None or score is None:
        name = html.escape(str(results.get("name", "This run")))
        return heldout_sentence(results) or f"{name} has no scored model."
    subject = html.escape(str(model.get("name", "The model")))
    if student:
        count = len(students_of(results))
        subject = f"The best of {count} students, {subject}," if count > 1 else "The student"
    show = functools.partial(show_score, results.get("metric"))
    kept, reached = share_kept(results, model) if student else None, show(score)
    alone = _baseline_not_beaten(results, student) if student else None
    if alone is not None and student:
        place = "behind" if _is_behind(results, student) else "not clearly ahead of"
        return (
            f"{subject} reaches {reached} {metric} and is {place} the same student "
            f"without a teacher, which reaches {_coloured(show(alone), 'baseline')}."
        )
    floor = floor_not_beaten(results, student) if student else None
    if floor is not None:
        return (
            f"{subject} reaches {reached} {metric}, not clearly above the {show(floor)} of always "
            "giving the most frequent answer."
        )
    if kept is not None and kept > 1 and student and not _is_ahead(results, student, "teacher"):
        sentence = f"{subject} is level with its teacher at {_coloured(reached)} {metric}"
    elif kept is None:
        sentence = f"{subject} reaches {_coloured(reached, role_of(model))} {metric}"
    else:
        verb = "keeps" if kept <= 1 else "reaches"
        sentence = f"{subject} {verb} {_coloured(percent(kept))} of its teacher’s {metric}"
    return sentence + (_savings(teacher, student) if teacher and student else "") + "."


def _baseline_not_beaten(results: dict[str, Any], student: Model) -> float | None:
    """The score of the student's baseline where the student is not ahead of it by more than chance.

    None where it is ahead, or where the results hold no interval of the difference.
    """
    is_beaten = _is_ahead(results, student, "baseline")
    return None if is_beaten else score_of(results, find_baseline(results))


def _is_behind(results: dict[str, Any], student: Model) -> bool:
    """Whether the student is behind its baseline by more than chance."""
    difference = difference_to(results, student, "baseline")
    return difference is not None and difference[2] < 0


def _is_ahead(results: dict[str, Any], student: Model, role: str) -> bool:
    """Whether the student is ahead by more than chance, as far as the results tell."""
    difference = difference_to(results, student, role)
    return difference is None or difference[1] > 0


def _savings(teacher: Model, student: Model) -> str:
    """“ with 8.0× fewer encoder parameters and runs 4.1× faster”, as far as both are known."""
    sizes = [finite_number(m.get("num_encoder_parameters")) for m in (teacher, student)]
    size = compare(sizes[0], sizes[1], "fewer", "more")
    times = [latency_of(m) for m in (teacher, student)]
    speed = compare(times[0], times[1], "faster", "slower")
    sentence = f" with {_coloured(size)} encoder parameters" if size not in ("", SAME) else ""
    if speed not in ("", SAME) and conditions_of(teacher) == conditions_of(student):
        sentence += f" and runs {_coloured(speed)}"
    return sentence


def baseline_sentence(results: dict[str, Any]) -> str:
    """The baseline's score and the gain by distillation; empty where a score is missing.

    Where chance may explain the gain, it is a difference with its interval, as in the headline.
    """
    student, baseline = find_model(results, "student"), find_baseline(results)
    score, student_score = score_of(results, baseline), score_of(results, student)
    if baseline is None or score is None or student_score is None:
        return ""
    show = functools.partial(show_score, results.get("metric"))
    compared = difference_to(results, student, "baseline") if student else None
    points = in_points(results.get("metric"), student_score - score)
    if results.get("metric") in LOWER_IS_BETTER:
        verdict = f"the student reaches {show(student_score)}"
    else:
        verdict = f"distillation {'adds' if points >= 0 else 'costs'} {abs(points):.1f} points"
    if compared and results.get("metric") not in LOWER_IS_BETTER:
        low, high = (in_points(results.get("metric"), bound) for bound in compared[1:])
        if low <= 0 <= high:
            verdict = f"a difference of {points:+.1f} points"
        verdict += f", 95 % interval [{low:+.1f}, {high:+.1f}]"
    name = html.escape(str(baseline.get("name", "baseline")))
    return f"The baseline, {name}, reaches {_coloured(show(score), 'baseline')}: {verdict}."


def heldout_sentence(results: dict[str, Any]) -> str:
    """The pretrained model's perplexity on held-out text; empty without one."""
    perplexity = finite_number(mapping_of(results, "heldout").get("perplexity"))
    if perplexity is None:
        return ""
    perplexity_shown = _coloured(f"{perplexity:.1f}", "teacher")
    return f"The pretrained model’s perplexity on held-out text is {perplexity_shown}."


def size_figure(results: dict[str, Any]) -> str:
    """Nested squares whose areas are the encoder parameters of teacher and student."""
    teacher, student = find_model(results, "teacher"), find_model(results, "student")
    sizes = [finite_number((m or {}).get("num_encoder_parameters")) for m in (teacher, student)]
    if not sizes[0] or not sizes[1] or min(sizes[0], sizes[1]) <= 0:
        return ""
    largest = max(sizes[0], sizes[1])
    squares = sorted(zip(sizes, ("teacher", "student"), strict=True), reverse=True)
    marks = ""
    for size, role in squares:
        side = 158 * math.sqrt((size or 0) / largest)
        marks += (
            f'<rect class="{role}" x="1" y="{159 - side:.1f}" '
            f'width="{side:.1f}" height="{side:.1f}"/>'
        )
    files = [finite_number((m or {}).get("bytes_on_disk")) for m in (teacher, student)]
    disk = f"<br>On disk: {_from_to(files[0], files[1], 'B')}" if files[0] and files[1] else ""
    return (
        '<figure class="mark"><svg viewBox="0 0 160 160" role="img" '
        f'aria-label="Encoder parameters: teacher {format_si(sizes[0])}, '
        f'student {format_si(sizes[1])}">'
        f"{marks}</svg><figcaption>Encoder parameters, without embeddings, drawn to scale:<br>"
        f"{_from_to(sizes[0], sizes[1])}{disk}</figcaption></figure>"
    )


def _from_to(teacher: float, student: float, unit: str = "") -> str:
    return (
        f'<b class="teacher">{format_si(teacher, unit)}</b> to '
        f'<b class="student">{format_si(student, unit)}</b>'
    )


def _coloured(text: str, role: str = "student") -> str:
    """The text in bold, in the colour of a role."""
    return f'<b class="{role}">{text}</b>'
