"""Writes report.html: one self-contained page about a finished run, read from the run folder.

Reads results.json (required), metrics.jsonl, config.yaml and env.json (optional). The page needs no
network and no JavaScript; a short note names a missing or unreadable file. `tables`, `pareto`,
`confusion` and `per_class` show the results, `charts` draws the curves, `style` is the style sheet.
"""

import html
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinybert_jax.report.advice import advice_list
from tinybert_jax.report.calibration import calibration_section
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
from tinybert_jax.report.confusion import confusion_section
from tinybert_jax.report.console import printable
from tinybert_jax.report.differences import differences_section
from tinybert_jax.report.headline import (
    baseline_sentence,
    headline,
    heldout_sentence,
    size_figure,
)
from tinybert_jax.report.pareto import pareto_section
from tinybert_jax.report.per_class import per_class_section
from tinybert_jax.report.run_files import read_environment, read_results, read_rows, read_text
from tinybert_jax.report.style import STYLE
from tinybert_jax.report.tables import (
    LOWER_IS_BETTER,
    NBSP,
    comparison_table,
    find_model,
    finite_number,
    format_si,
    metric_name,
    percent,
    students_of,
    with_latency_device,
)

REPORT_NAME = "report.html"
NOT_A_METRIC = frozenset({"kind", "stage", "step", "time", "epoch", "seconds", "num_examples"})
# The browser may fetch nothing, whatever the names in the run's files contain.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir`/report.html and returns the path of the page.

    Raises ValueError if the folder has no readable results.json; all other files may be missing.
    """
    run_dir = Path(run_dir)
    environment = read_environment(run_dir)
    results = with_latency_device(read_results(run_dir), environment.get("device"))
    rows, num_unreadable = read_rows(run_dir / "metrics.jsonl")
    provenance = _provenance(run_dir, results, environment)
    page = _page(run_dir.name, results, _stages(rows), num_unreadable, provenance)
    path = run_dir / REPORT_NAME
    path.write_text(printable(page), encoding="utf-8")
    return path


class Stage(NamedTuple):
    """The logged lines of one stage by step; of a step logged twice (a resume) the later line."""

    name: str
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]


def _page(
    folder_name: str, results: dict, stages: list[Stage], num_unreadable: int, provenance: str
) -> str:
    name = html.escape(str(results.get("name", folder_name)))
    lead = [baseline_sentence(results)]
    if find_model(results, "teacher"):  # without a teacher this sentence is the headline
        lead.append(heldout_sentence(results))
    lead = " ".join(sentence for sentence in lead if sentence)
    sections = [
        ("What to do next", advice_list(results)),
        ("Comparison", comparison_table(results)),
        ("Score and cost", pareto_section(results)),
        per_class_section(results) or confusion_section(results),
        ("Calibration", calibration_section(results)),
        ("Where student and teacher differ", differences_section(results)),
        ("Time per stage", _time_bars(results, stages)),
        ("Training", _training(stages, results, num_unreadable)),
        ("Run", provenance),
    ]
    body = "".join(
        f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{name}: TinyBERT run</title><style>{STYLE}</style></head><body><main>"
        f'<header><div><p class="run">{name}</p><h1>{headline(results)}</h1>'
        + (f'<p class="lead">{lead}</p>' if lead else "")
        + f"</div>{size_figure(results)}</header>{body}</main></body></html>\n"
    )


def _training(stages: list[Stage], results: dict, num_unreadable: int) -> str:
    if not stages:
        return _note("No curves: metrics.jsonl is missing or holds no readable line.")
    skipped = _note(f"{num_unreadable} unreadable lines of metrics.jsonl were skipped.")
    body = "".join(_stage(i, stage, results) for i, stage in enumerate(stages))
    return (skipped if num_unreadable else "") + body


def _stage(index: int, stage: Stage, results: dict) -> str:
    figures = [f for f in (*_loss_figures(stage, results), *_small_figures(stage, results)) if f]
    if not stage.evals:
        figures.append(_note("No evaluation in this stage."))
    num_dropped = sum(
        isinstance(value, float) and not math.isfinite(value)
        for row in (*stage.train, *stage.evals)
        for value in row.values()
    )
    if num_dropped:
        figures.append(_note(f"{num_dropped} values that are not finite were left out."))
    return (
        f'<article id="stage-{index}"><h3>{html.escape(stage.name)}</h3>'
        f'{_summary(stage, results)}<div class="figures">{"".join(figures)}</div></article>'
    )


def _summary(stage: Stage, results: dict) -> str:
    """One line about a stage: steps, time, first and last loss, medians of the rates."""
    facts = []
    if stage.train:
        facts.append(("steps", f"{stage.train[-1]['step']:,.0f}"))
    seconds = _seconds(results).get(stage.name)
    if seconds is not None:
        facts.append(("time", _duration(seconds)))
    losses = _points(stage.train, "loss")
    if losses:
        facts.append(
            ("loss", f"{format_si(losses[0][1])} → {format_si(_last(_series('loss', losses)))}")
        )
    for key, label, show in (
        ("tokens_per_second", "tokens/s", format_si),
        ("padding_share", "padding", percent),
        ("mfu", "MFU", percent),
    ):
        values = [y for _, y in _points(stage.train, key)]
        if values:
            facts.append((label, show(statistics.median(values))))
    items = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts)
    return f"<dl>{items}</dl>"


def _loss_figures(stage: Stage, results: dict) -> Iterator[str]:
    """The training loss, the terms of the loss, and the evaluation loss to show overfitting.

    With several students these are means, and a second figure shows the loss of every student.
    """
    names = {f"loss/{model.get('name')}" for model in students_of(results)}
    keys = [k for k in _keys(stage.train) if k.startswith("loss/")]
    terms, by_student = [k for k in keys if k not in names], [k for k in keys if k in names]
    series = []
    for color, key in enumerate(["loss", *terms]):
        points = _points(stage.train, key)
        if points:
            total = "total" if terms else "training"
            label = total if key == "loss" else key.removeprefix("loss/")
            series.append(_series(label, points, color))
    held_out = _points(stage.evals, "loss")
    if held_out:
        series.append(Series("evaluation set", held_out, len(series) or 1))
    if series:
        yield _figure("Loss, mean over students" if by_student else "Loss", series, LARGE)
    if by_student:
        curves = [(key.removeprefix("loss/"), _points(stage.train, key)) for key in by_student]
        series = [_series(name, points, color) for color, (name, points) in enumerate(curves)]
        yield _figure("Loss per student", series, LARGE)


def _small_figures(stage: Stage, results: dict) -> Iterator[str]:
    """Evaluation metrics, the main metric first, then rates; metrics within ±1 share a chart."""
    bounded, others = [], []
    main = results.get("metric")
    for key in sorted(_keys(stage.evals), key=lambda k: k != main):
        points = _points(stage.evals, key)
        if points and key != "loss":
            is_bounded = key not in LOWER_IS_BETTER and all(-1 <= y <= 1 for _, y in points)
            (bounded if is_bounded else others).append((key, points))
    if bounded:
        yield _figure(
            "Evaluation",
            [Series(metric_name(key), points, i) for i, (key, points) in enumerate(bounded)],
            best=max(bounded[0][1], key=lambda p: p[1]) if bounded[0][0] == main else None,
        )
    for key, points in others:
        yield _figure(f"Evaluation: {metric_name(key)}", [Series(metric_name(key), points)])
    for key, title, from_zero in (
        ("tokens_per_second", "Throughput, tokens/s", True),
        ("learning_rate", "Learning rate", True),
        ("grad_norm", "Gradient norm", False),
    ):
        points = _points(stage.train, key)
        if points:
            is_schedule = key == "learning_rate"
            series = Series(title, points) if is_schedule else _series(title, points)
            yield _figure(title, [series], from_zero=from_zero)


def _figure(
    title: str,
    series: list[Series],
    frame: Frame = SMALL,
    from_zero: bool = False,
    best: Point | None = None,
) -> str:
    last = ", ".join(f"{s.label} ends at {format_si(_last(s))}" for s in series)
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
        f"<b>{format_si(_last(s))}</b></li>"
        for s in series
    )
    if best:
        label = html.escape(series[0].label)
        keys += f"<li>best {label} <b>{best[1]:.3f}</b> at step {best[0]:,.0f}</li>"
    return f"<ul>{keys}</ul>"


def _series(label: str, points: list[Point], color: int = 0) -> Series:
    mean = running_mean(points, len(points) // 25 | 1) if len(points) >= 75 else ()
    return Series(label, points, color, mean)


def _last(series: Series) -> float:
    """The last value of a curve, or of the running mean if drawn, since single steps are noisy."""
    return (series.mean or series.points)[-1][1]


def _time_bars(results: dict, stages: list[Stage]) -> str:
    seconds = _seconds(results)
    total = sum(seconds.values())
    if not total:
        return _note("No times: results.json holds no seconds per stage.")
    anchors = {stage.name: f"stage-{i}" for i, stage in enumerate(stages)}
    longest = max(seconds.values())
    rows = ""
    for name, value in seconds.items():
        label = html.escape(name)
        if name in anchors:
            label = f'<a href="#{anchors[name]}">{label}</a>'
        rows += (
            f'<tr><th scope="row">{label}</th><td class="track">'
            f'<i class="bar" style="width:{100 * value / longest:.1f}%"></i></td>'
            f'<td class="num">{_duration(value)}</td>'
            f'<td class="num soft">{percent(value / total)}</td></tr>'
        )
    return (
        f'<table class="times"><tbody>{rows}</tbody></table>'
        f'<p class="note">{_duration(total)} in total.</p>'
    )


def _provenance(run_dir: Path, results: dict, environment: dict) -> str:
    commands = results.get("commands")
    lines = "\n".join(str(c) for c in commands) if isinstance(commands, list) else ""
    parts = [f"<pre>{html.escape(lines)}</pre>" if lines else _note("No command was recorded.")]
    if environment:
        rows = "".join(
            f'<tr><th scope="row">{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>'
            for k, v in environment.items()
        )
        parts.append(f'<table class="env"><tbody>{rows}</tbody></table>')
    else:
        parts.append(_note("No environment: env.json is missing or unreadable."))
    config = read_text(run_dir / "config.yaml")
    if config:
        summary = "Resolved configuration (config.yaml)"
        parts.append(
            f"<details><summary>{summary}</summary><pre>{html.escape(config)}</pre></details>"
        )
    else:
        parts.append(_note("No configuration: config.yaml is missing or unreadable."))
    return "".join(parts)


def _stages(rows: list[dict]) -> list[Stage]:
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


def _keys(rows: Sequence[dict]) -> list[str]:
    """The fields that can be drawn as curves, in order of first appearance."""
    return [k for k in dict.fromkeys(k for row in rows for k in row) if k not in NOT_A_METRIC]


def _points(rows: Sequence[dict], key: str) -> list[Point]:
    return [
        (float(row["step"]), value)
        for row in rows
        if (value := finite_number(row.get(key))) is not None
    ]


def _seconds(results: dict) -> dict[str, float]:
    seconds = results.get("seconds")
    known = seconds.items() if isinstance(seconds, dict) else ()
    return {str(k): v for k, s in known if (v := finite_number(s)) is not None and v >= 0}


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest:02d}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60:02d}{NBSP}min"


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'
