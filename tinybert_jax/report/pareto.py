"""The plots of score against cost in a report: one dot per model, and the Pareto front.

Takes the parsed `results.json` and returns escaped HTML. A run with one student has no such plot.
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
    finite_number,
    format_si,
    latency_of,
    metric_name,
    models_of,
    role_of,
    score_of,
    students_of,
)


def pareto_section(results: dict[str, Any]) -> str:
    """The main metric against measured latency and against encoder parameters."""
    if len(students_of(results)) < 2:
        return ""
    conditions = {conditions_of(m) for m in models_of(results) if latency_of(m) is not None}
    figures = [_figure(results, "encoder parameters", _num_encoder_parameters)]
    if len(conditions) == 1:  # times measured under different conditions cannot be compared
        figures.insert(0, _figure(results, f"latency in ms ({conditions.pop()})", latency_of))
    return (
        f'<div class="figures">{"".join(figures)}</div>'
        '<p class="note">Dashed line: the Pareto front. For every other model, a model on the '
        "front scores at least as well at no higher cost.</p>"
    )


def pareto_front(points: Sequence[Point], *, lower_is_better: bool = False) -> list[Point]:
    """The (cost, score) points that no other point matches or beats in both, by rising cost."""
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
            role = role_of(model)
            # A baseline has the name of a student and is drawn below it, so it gets no label.
            dots.append(Dot(str(model.get("name")), (cost, score), role, role != "baseline"))
    if not dots:
        return ""
    is_lower = results.get("metric") in LOWER_IS_BETTER
    front = pareto_front([dot.point for dot in dots], lower_is_better=is_lower)
    values = ", ".join(
        f"{d.kind} {d.label}: {d.point[1]:.3f} at {format_si(d.point[0])}" for d in dots
    )
    metric = metric_name(results.get("metric"), results)
    chart = scatter_chart(
        dots, front, description=f"{metric} against {title}: {values}", x_label=title
    )
    roles = [role for role in (*ROLES, "other") if role in {dot.kind for dot in dots}]
    keys = "".join(f'<li><i class="key {role}"></i>{role}</li>' for role in roles)
    caption = html.escape(f"{metric[0].upper()}{metric[1:]} against {title}")
    return f'<figure class="wide"><figcaption>{caption}</figcaption>{chart}<ul>{keys}</ul></figure>'


def _num_encoder_parameters(model: Model) -> float | None:
    return finite_number(model.get("num_encoder_parameters"))
