"""Writes report.html: one self-contained page about a finished run, read from the run folder.

Reads results.json (required), metrics.jsonl, config.yaml and env.json (optional). The page needs no
network and no JavaScript; a short note names a missing or unreadable file. `tables`, `pareto`,
`confusion` and `per_class` show the results, `charts` draws the curves, `style` is the style sheet.
"""

import html
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from tinybert_jax.report.advice import advice_list
from tinybert_jax.report.calibration import calibration_section
from tinybert_jax.report.charts import LARGE, Point, Series
from tinybert_jax.report.confusion import confusion_section
from tinybert_jax.report.console import printable
from tinybert_jax.report.differences import differences_section, translations_section
from tinybert_jax.report.figures import (
    Stage,
    duration,
    figure,
    keys_of,
    last_value,
    make_series,
    note,
    points_of,
    read_stages,
    seconds_of,
)
from tinybert_jax.report.gate import gate_section, gate_sentence
from tinybert_jax.report.headline import (
    baseline_sentence,
    headline,
    heldout_sentence,
    size_figure,
)
from tinybert_jax.report.pareto import pareto_section
from tinybert_jax.report.per_class import per_class_section
from tinybert_jax.report.provenance import provenance
from tinybert_jax.report.run_files import read_environment, read_results, read_rows
from tinybert_jax.report.score_table import comparison_table
from tinybert_jax.report.shell import whole_page
from tinybert_jax.report.tables import (
    LOWER_IS_BETTER,
    find_model,
    format_si,
    metric_name,
    percent,
    students_of,
    with_latency_device,
)

REPORT_NAME = "report.html"


def write_report(run_dir: Path, output: str | Path | None = None) -> Path:
    """Writes the page to `output`, by default `run_dir`/report.html, and returns its path.

    Raises ValueError if the folder has no readable results.json; all other files may be missing.
    """
    run_dir = Path(run_dir)
    environment = read_environment(run_dir)
    results = with_latency_device(read_results(run_dir), environment.get("device"))
    rows, num_unreadable = read_rows(run_dir / "metrics.jsonl")
    begun = provenance(run_dir, results, environment)
    page = _page(run_dir.name, results, read_stages(rows), num_unreadable, begun)
    path = run_dir / REPORT_NAME if output is None else Path(output)
    path.write_text(printable(page), encoding="utf-8")
    return path


def _page(
    folder_name: str, results: dict, stages: list[Stage], num_unreadable: int, begun: str
) -> str:
    name = html.escape(str(results.get("name", folder_name)))
    lead = [baseline_sentence(results)]
    if find_model(results, "teacher"):  # without a teacher this sentence is the headline
        lead.append(heldout_sentence(results))
    lead = " ".join(sentence for sentence in lead if sentence)
    sections = [
        ("What to do next", advice_list(results)),
        ("Old and new model", gate_section(results)),
        ("Comparison", comparison_table(results)),
        ("Score and cost", pareto_section(results)),
        _details(results),
        ("Calibration", calibration_section(results)),
        ("Where student and teacher differ", differences_section(results)),
        ("Time per stage", _time_bars(results, stages)),
        ("Training", _training(stages, results, num_unreadable)),
        ("Run", begun),
    ]
    header = (
        f'<div><p class="run">{name}</p><h1>{gate_sentence(results) or headline(results)}</h1>'
        + (f'<p class="lead">{lead}</p>' if lead else "")
        + f"</div>{size_figure(results)}"
    )
    return whole_page(f"{results.get('name', folder_name)}: TinyBERT run", header, sections)


def _details(results: dict) -> tuple[str, str]:
    """Title and section of what the task shows beside its scores."""
    made = translations_section(results)
    return made if made[1] else per_class_section(results) or confusion_section(results)


def _training(stages: list[Stage], results: dict, num_unreadable: int) -> str:
    if not stages:
        return note("No curves: metrics.jsonl is missing or holds no readable line.")
    skipped = note(f"{num_unreadable} unreadable lines of metrics.jsonl were skipped.")
    body = "".join(_stage(i, stage, results) for i, stage in enumerate(stages))
    return (skipped if num_unreadable else "") + body


def _stage(index: int, stage: Stage, results: dict) -> str:
    figures = [f for f in (*_loss_figures(stage, results), *_small_figures(stage, results)) if f]
    if not stage.evals:
        figures.append(note("No evaluation in this stage."))
    num_dropped = sum(
        isinstance(value, float) and not math.isfinite(value)
        for row in (*stage.train, *stage.evals)
        for value in row.values()
    )
    if num_dropped:
        figures.append(note(f"{num_dropped} values that are not finite were left out."))
    return (
        f'<article id="stage-{index}"><h3>{html.escape(stage.name)}</h3>'
        f'{_summary(stage, results)}<div class="figures">{"".join(figures)}</div></article>'
    )


def _summary(stage: Stage, results: dict) -> str:
    """One line about a stage: steps, time, first and last loss, medians of the rates."""
    facts = []
    if stage.train:
        facts.append(("steps", f"{stage.train[-1]['step']:,.0f}"))
    seconds = seconds_of(results).get(stage.name)
    if seconds is not None:
        facts.append(("time", duration(seconds)))
    losses = points_of(stage.train, "loss")
    if losses:
        last = last_value(make_series("loss", losses))
        facts.append(("loss", f"{format_si(losses[0][1])} → {format_si(last)}"))
    for key, label, show in (
        ("tokens_per_second", "tokens/s", format_si),
        ("padding_share", "padding", percent),
        ("mfu", "MFU", percent),
    ):
        values = [y for _, y in points_of(stage.train, key)]
        if values:
            facts.append((label, show(statistics.median(values))))
    items = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts)
    return f"<dl>{items}</dl>"


def _loss_figures(stage: Stage, results: dict) -> Iterator[str]:
    """The training loss, the terms of the loss, and the evaluation loss to show overfitting.

    With several students these are means, and a second figure shows the loss of every student.
    """
    names = {f"loss/{model.get('name')}" for model in students_of(results)}
    keys = [k for k in keys_of(stage.train) if k.startswith("loss/")]
    terms, by_student = [k for k in keys if k not in names], [k for k in keys if k in names]
    series = []
    for color, key in enumerate(["loss", *terms]):
        points = points_of(stage.train, key)
        if points:
            total = "total" if terms else "training"
            label = total if key == "loss" else key.removeprefix("loss/")
            series.append(make_series(label, points, color))
    held_out = points_of(stage.evals, "loss")
    if held_out:
        series.append(Series("evaluation set", held_out, len(series) or 1))
    if series:
        yield figure("Loss, mean over students" if by_student else "Loss", series, LARGE)
    if by_student:
        curves = [(key.removeprefix("loss/"), points_of(stage.train, key)) for key in by_student]
        series = [make_series(name, points, color) for color, (name, points) in enumerate(curves)]
        yield figure("Loss per student", series, LARGE)


def _small_figures(stage: Stage, results: dict) -> Iterator[str]:
    """Evaluation metrics, the main metric first, then rates; metrics within ±1 share a chart."""
    bounded, others = [], []
    main = results.get("metric")
    for key in sorted(keys_of(stage.evals), key=lambda k: k != main):
        points = points_of(stage.evals, key)
        if points and key != "loss":
            is_bounded = key not in LOWER_IS_BETTER and all(-1 <= y <= 1 for _, y in points)
            (bounded if is_bounded else others).append((key, points))
    if bounded:
        yield figure(
            "Evaluation",
            [
                Series(metric_name(key, results), points, i)
                for i, (key, points) in enumerate(bounded)
            ],
            best=_best(bounded[0][1]) if bounded[0][0] == main else None,
        )
    for key, points in others:
        yield figure(
            f"Evaluation: {metric_name(key, results)}", [Series(metric_name(key, results), points)]
        )
    for key, title, from_zero in (
        ("tokens_per_second", "Throughput, tokens/s", True),
        ("learning_rate", "Learning rate", True),
        ("grad_norm", "Gradient norm", False),
    ):
        points = points_of(stage.train, key)
        if points:
            is_schedule = key == "learning_rate"
            series = Series(title, points) if is_schedule else make_series(title, points)
            yield figure(title, [series], from_zero=from_zero)


def _best(points: list[Point]) -> Point | None:
    """The point with the highest score; None of a single one, which is not the best of any."""
    return max(points, key=lambda point: point[1]) if len(points) > 1 else None


def _time_bars(results: dict, stages: list[Stage]) -> str:
    seconds = seconds_of(results)
    total = sum(seconds.values())
    if not total:
        return note("No times: results.json holds no seconds per stage.")
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
            f'<td class="num">{duration(value)}</td>'
            f'<td class="num soft">{percent(value / total)}</td></tr>'
        )
    return (
        f'<table class="times"><tbody>{rows}</tbody></table>'
        f'<p class="note">{duration(total)} in total; of a stage that was stopped, the time since '
        "it went on.</p>"
    )
