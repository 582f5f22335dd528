"""Owns a report's plots of what models score for what they cost: dots, and the front of the best.

Takes the parsed `results.json` and returns escaped HTML; a run with one student has no such plot.
"""

import html
from collections.abc import Callable, Sequence
from typing import Any

from tinybert_jax.report.charts import Dot, Point, scatter_chart
from tinybert_jax.report.tables import (
    LOWER_IS_BETTER,
    ROLES,
    Model,
    conditions_of,
    latency_of,
    metric_name,
    models_of,
    number,
    role_of,
    score_of,
    si,
    students_of,
)


def pareto_section(results: dict[str, Any]) -> str:
    """The main score against measured latency and against encoder parameters, a dot a model."""
    if len(students_of(results)) < 2:
        return ""
    conditions = {conditions_of(m) for m in models_of(results) if latency_of(m) is not None}
    figures = [_figure(results, "encoder parameters", _num_encoder_parameters)]
    if len(conditions) == 1:  # else the times do not compare
        figures.insert(0, _figure(results, f"CPU latency in ms, {conditions.pop()}", latency_of))
    return (
        f'<div class="figures">{"".join(figures)}</div>'
        '<p class="note">Dashed: the front. A model off it has one on it that scores as well or '
        "better at the same cost or less.</p>"
    )


def pareto_front(points: Sequence[Point], *, lower_is_better: bool = False) -> list[Point]:
    """Those of (cost, score) that no other one equals or beats in both, ascending in cost."""
    sign = -1 if lower_is_better else 1
    front: list[Point] = []
    for cost, score in sorted(set(points), key=lambda p: (p[0], -sign * p[1])):
        if not front or sign * score > sign * front[-1][1]:
            front.append((cost, score))
    return front


def _figure(results: dict[str, Any], title: str, cost_of: Callable[[Model], float | None]) -> str:
    dots = []
    for model in models_of(results):
        cost, score = cost_of(model), score_of(results, model)
        if cost is not None and cost > 0 and score is not None:
            role = role_of(model)  # a baseline stands right under its student, of the same name
            dots.append(Dot(str(model.get("name")), (cost, score), role, role != "baseline"))
    if not dots:
        return ""
    is_lower = results.get("metric") in LOWER_IS_BETTER
    front = pareto_front([dot.point for dot in dots], lower_is_better=is_lower)
    said = ", ".join(f"{d.kind} {d.label}: {d.point[1]:.3f} at {si(d.point[0])}" for d in dots)
    metric = metric_name(results.get("metric"))
    chart = scatter_chart(
        dots, front, description=f"{metric} against {title}: {said}", x_label=title
    )
    roles = [role for role in (*ROLES, "other") if role in {dot.kind for dot in dots}]
    keys = "".join(f'<li><i class="key {role}"></i>{role}</li>' for role in roles)
    caption = html.escape(f"{metric[0].upper()}{metric[1:]} against {title}")
    return f'<figure class="wide"><figcaption>{caption}</figcaption>{chart}<ul>{keys}</ul></figure>'


def _num_encoder_parameters(model: Model) -> float | None:
    return number(model.get("num_encoder_parameters"))
