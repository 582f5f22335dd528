"""What the pages about runs share: logged stages, curves with their keys, notes and durations.

Takes parsed rows and returns escaped HTML. Reads no file.
"""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

from tinybert_jax.report.charts import (
    LARGE,
    SMALL,
    Frame,
    Point,
    Series,
    line_chart,
    running_mean,
    wants_log,
)
from tinybert_jax.report.tables import NBSP, finite_number, format_si

NOT_A_METRIC = frozenset({"kind", "stage", "step", "time", "epoch", "seconds", "num_examples"})


class Stage(NamedTuple):
    """The logged lines of one stage by step; of a step logged twice (a resume) the later line."""

    name: str
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]


def read_stages(rows: list[dict]) -> list[Stage]:
    by_stage: dict[str, dict[str, dict[float, dict]]] = {}
    for row in rows:
        kind, step = row.get("kind"), finite_number(row.get("step"))
        if kind in ("train", "eval") and step is not None:
            stage = by_stage.setdefault(str(row.get("stage", "run")), {"train": {}, "eval": {}})
            stage[kind][step] = row
    return [
        Stage(name, *([kinds[k][step] for step in sorted(kinds[k])] for k in ("train", "eval")))
        for name, kinds in by_stage.items()
    ]


def figure(
    title: str,
    series: list[Series],
    frame: Frame = SMALL,
    from_zero: bool = False,
    best: Point | None = None,
) -> str:
    last = ", ".join(f"{s.label} ends at {format_si(last_value(s))}" for s in series)
    chart = line_chart(
        series, description=f"{title} by step: {last}", from_zero=from_zero, frame=frame, best=best
    )
    wide = ' class="wide"' if frame is LARGE else ""
    is_log = not from_zero and wants_log([y for s in series for _, y in s.points])
    remarks = ["log scale"] if is_log else []
    if frame is LARGE and series[0].mean:
        remarks.append("faint: logged, bold: running mean")
    aside = f" <small>{'; '.join(remarks)}</small>" if remarks else ""
    return (
        f"<figure{wide}><figcaption>{html.escape(title)}{aside}</figcaption>{chart}"
        f"{_legend(series, best) if len(series) > 1 or best else ''}</figure>"
    )


def _legend(series: list[Series], best: Point | None) -> str:
    """One key per curve with the curve's last value, and the best point of the first curve."""
    keys = "".join(
        f'<li><i class="key {s.color_class}"></i>{html.escape(s.label)} '
        f"<b>{format_si(last_value(s))}</b></li>"
        for s in series
    )
    if best:
        label = html.escape(series[0].label)
        keys += f"<li>best {label} <b>{best[1]:.3f}</b> at step {best[0]:,.0f}</li>"
    return f"<ul>{keys}</ul>"


def make_series(label: str, points: list[Point], color: int = 0) -> Series:
    mean = running_mean(points, len(points) // 25 | 1) if len(points) >= 75 else ()
    return Series(label, points, color, mean)


def last_value(series: Series) -> float:
    """The last value of a curve, or of the running mean if drawn, since single steps are noisy."""
    return (series.mean or series.points)[-1][1]


def keys_of(rows: Sequence[dict]) -> list[str]:
    """The fields that can be drawn as curves, in order of first appearance."""
    return [k for k in dict.fromkeys(k for row in rows for k in row) if k not in NOT_A_METRIC]


def points_of(rows: Sequence[dict], key: str) -> list[Point]:
    return [
        (float(row["step"]), value)
        for row in rows
        if (value := finite_number(row.get(key))) is not None
    ]


def seconds_of(results: dict) -> dict[str, float]:
    seconds = results.get("seconds")
    known = seconds.items() if isinstance(seconds, dict) else ()
    return {str(k): v for k, s in known if (v := finite_number(s)) is not None and v >= 0}


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest:02d}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60:02d}{NBSP}min"


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'
