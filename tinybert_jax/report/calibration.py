"""The calibration of teacher, student and baseline in a report, as a curve.

Takes the parsed `results.json` and returns escaped HTML. A model may hold `calibration`: {"error",
"confidence", "accuracy", "count"}, lists over bins.
"""

import html
from typing import Any

from tinybert_jax.report.tables import (
    Model,
    find_baseline,
    find_model,
    finite_number,
    mapping_of,
    percent,
    role_of,
)

_SIDE = 220
_FEWEST = 5  # texts of a bin; the share of right answers of fewer is mostly chance
# Role -> radius of its dots, in the order of drawing: no curve or dot covers a later one.
_RADII = {"teacher": 6, "baseline": 4.5, "student": 3}


def calibration_section(results: dict[str, Any]) -> str:
    """Accuracy against confidence, with the error of each model; empty where none holds it."""
    best = find_model(results, "teacher"), find_model(results, "student"), find_baseline(results)
    known = [m for m in best if m and _error(m) is not None]
    curves = {role_of(m): points for m in known if (points := _points(m))}
    if not curves:
        return ""
    lines = "".join(_drawn(role, curves[role]) for role in _RADII if role in curves)
    shown = "; ".join(
        f"{role}: " + ", ".join(f"{y:.2f} at {x:.2f}" for x, y in points)
        for role, points in curves.items()
    )
    keys = "".join(
        f'<li><i class="key {role_of(m)}"></i>{html.escape(role_of(m))} '
        f"<b>{percent(_error(m) or 0)}</b></li>"
        for m in known
        if role_of(m) in curves
    )
    return (
        f'<figure class="calibration"><svg viewBox="-4 -4 {_SIDE + 8} {_SIDE + 8}" role="img" '
        f'aria-label="Accuracy by confidence, {html.escape(shown)}">'
        f'<rect x="0" y="0" width="{_SIDE}" height="{_SIDE}"/>'
        f'<polyline class="diagonal" points="0,{_SIDE} {_SIDE},0"/>{lines}</svg>'
        f"<figcaption>Accuracy (upwards) of predictions by their probability (to the right), both "
        f"from 0 to 1</figcaption><ul>{keys}</ul></figure>"
        '<p class="note">On the diagonal a probability of 0.8 is right in 80 % of the cases. '
        f"A point stands for at least {_FEWEST} texts. "
        "The figures are the expected calibration errors: the mean distance from the diagonal.</p>"
    )


def _drawn(role: str, points: list[tuple[float, float]]) -> str:
    """A curve with a dot for each bin, so that a curve of one bin is seen too."""
    placed = [(f"{_SIDE * x:.1f}", f"{_SIDE * (1 - y):.1f}") for x, y in points]
    dots = "".join(
        f'<circle class="dot {role}" cx="{x}" cy="{y}" r="{_RADII[role]}"/>' for x, y in placed
    )
    line = " ".join(f"{x},{y}" for x, y in placed)
    return f'<polyline class="{role}" points="{line}"/>{dots}'


def _points(model: Model) -> list[tuple[float, float]]:
    held = mapping_of(model, "calibration")
    lists = [held.get(name) for name in ("confidence", "accuracy", "count")]
    if not all(isinstance(own, list) for own in lists):
        return []
    bins = zip(*([finite_number(v) for v in own or ()] for own in lists), strict=False)
    return [
        (x, y)
        for x, y, count in bins
        if x is not None and y is not None and count is not None and count >= _FEWEST
    ]


def _error(model: Model) -> float | None:
    return finite_number(mapping_of(model, "calibration").get("error"))
