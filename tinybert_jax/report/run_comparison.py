"""The page that compares runs: scores, paired differences, costs, settings and curves.

Reads results.json (required) of each run folder, and metrics.jsonl, config.yaml, env.json and
resamples.json (optional). The first run is the one that the others are compared with.
"""

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinybert_jax.report.charts import LARGE, Series
from tinybert_jax.report.figures import (
    Stage,
    duration,
    figure,
    make_series,
    note,
    points_of,
    seconds_of,
)
from tinybert_jax.report.settings_table import environment_table, settings_table
from tinybert_jax.report.several_runs import (
    RunFiles,
    paired_interval,
    ranked,
    read_run_files,
    short_names,
    why_not_paired,
)
from tinybert_jax.report.shell import whole_page
from tinybert_jax.report.tables import (
    LOWER_IS_BETTER,
    MISSING,
    conditions_of,
    finite_number,
    format_si,
    gap_closed,
    interval_of,
    latency_of,
    models_of,
    percent,
    role_of,
    score_of,
)

_ROLES = {
    "student": "Students",
    "teacher": "Teachers",
    "baseline": "The same students without a teacher",
    "other": "Other models",
}


def comparison_page(folders: Sequence[Path]) -> str:
    """The page; ValueError where a folder is not that of a finished run."""
    labels = short_names(folders)
    runs = [read_run_files(folder, label) for folder, label in zip(folders, labels, strict=True)]
    configs, environments = [run.config for run in runs], [run.environment for run in runs]
    settings = settings_table(labels, configs) if all(configs) else ""
    sections = [
        ("Scores", _scores(runs)),
        ("Differences", _differences(runs)),
        ("Costs", _costs(runs)),
        (
            "Settings that differ",
            (settings or note(_no_settings(configs))) + environment_table(labels, environments),
        ),
        ("Curves", _curves(runs)),
    ]
    title = f"{len(runs)} runs: {', '.join(labels)}"
    lead = _lead(runs)
    header = (
        f'<div><p class="run">{len(runs)} runs</p><h1>{_headline(runs)}</h1>'
        + (f'<p class="lead">{lead}</p>' if lead else "")
        + "</div>"
    )
    return whole_page(title, header, sections)


def _headline(runs: Sequence[RunFiles]) -> str:
    order = ranked(runs)
    if not order:
        return "The runs have no score in common."
    best = order[0]
    metric = html.escape(best.metric_name)
    word = "lowest" if best.metric in LOWER_IS_BETTER else "highest"
    return (
        f"{html.escape(best.label)} has the {word} {metric}: "
        f'<b class="{_role(best)}">{best.score:.3f}</b>.'
    )


def _lead(runs: Sequence[RunFiles]) -> str:
    """How sure the order of the best two is."""
    order = ranked(runs)
    if len(order) < 2:
        return ""
    best, second = order[:2]
    name, bounds = html.escape(second.label), paired_interval(second, best)
    if best.score == second.score:
        return f"{name} has the same."
    difference = _signed((best.score or 0) - (second.score or 0))
    if bounds is None:
        return f"{difference} against {name}. There is no paired interval for it."
    verdict = (
        "The order may be that of these examples alone: the interval holds 0."
        if bounds[0] <= 0 <= bounds[1]
        else "Other examples would hardly turn the order."
    )
    return f"{difference} {_brackets(bounds, is_signed=True)} against {name}. {verdict}"


def _scores(runs: Sequence[RunFiles]) -> str:
    """A row for each model with its score, the 95 % interval drawn on one scale for all."""
    rows: dict[str, list[tuple[str, float, tuple[float, float] | None]]] = {}
    metrics: set[str] = set()
    for run in runs:
        for model in models_of(run.results):
            score = score_of(run.results, model)
            if score is not None:
                name = f"{run.label}: {model.get('name', '')}"
                bounds = interval_of(model, run.metric)
                rows.setdefault(role_of(model), []).append((name, score, bounds))
                metrics.add(run.metric_name)
    if not rows:
        return note("No model of these runs has a score.")
    metric, *others = sorted(metrics)
    if others:
        names = ", ".join([metric, *others])
        return note(f"The runs have different metrics ({names}), so there is no common scale.")
    ends = [v for own in rows.values() for _, score, bounds in own for v in (bounds or (score,))]
    low, high = min(ends), max(ends)
    pad = 0.04 * (high - low) or 0.01
    low, high = low - pad, high + pad
    parts = []
    for role, title in _ROLES.items():
        if role in rows:
            body = "".join(_score_row(role, *row, low, high) for row in rows[role])
            parts.append(
                f'<h3>{title}</h3><table class="times scores"><tbody>{body}</tbody></table>'
            )
    count = {finite_number(run.results.get("dev_examples")) for run in runs}
    total = count.pop() if len(count) == 1 else None
    examples = f" of {total:,.0f} examples" if total else ""
    text = (
        f"{metric[0].upper()}{metric[1:]} on the dev set{examples}, with the 95 % interval over "
        f"resamples of its examples. The scale runs from {low:.3f} to {high:.3f}."
    )
    return "".join(parts) + note(text)


def _score_row(
    role: str,
    name: str,
    score: float,
    bounds: tuple[float, float] | None,
    low: float,
    high: float,
) -> str:
    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    drawn = f'<i class="point {role}" style="left:{place(score):.1f}%"></i>'
    if bounds:
        left, width = place(bounds[0]), place(bounds[1]) - place(bounds[0])
        drawn = f'<i class="range {role}" style="left:{left:.1f}%;width:{width:.1f}%"></i>{drawn}'
    return (
        f'<tr><th scope="row">{html.escape(name)}</th><td class="track">'
        f'<span class="whisker">{drawn}</span></td><td class="num"><b>{score:.3f}</b> '
        f"{_brackets(bounds)}</td></tr>"
    )


def _brackets(bounds: tuple[float, float] | None, *, is_signed: bool = False) -> str:
    if bounds is None:
        return ""
    low, high = (_signed(v) if is_signed else f"{v:.3f}" for v in bounds)
    return f'<span class="soft">[{low}, {high}]</span>'


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _differences(runs: Sequence[RunFiles]) -> str:
    """Each run against the first: the difference of their best models on the same dev rows."""
    first, *others = runs
    rows, reasons = "", []
    for run in others:
        cells = MISSING
        is_same = run.metric_name == first.metric_name
        if run.score is not None and first.score is not None and is_same:
            bounds, reason = paired_interval(first, run), why_not_paired(first, run)
            cells = f"<b>{_signed(run.score - first.score)}</b> {_brackets(bounds, is_signed=True)}"
            reasons += [f"{run.label}: {reason}"] if reason else []
        rows += (
            f'<tr><th scope="row">{html.escape(run.label)}</th><td>{cells}</td>'
            f"<td>{_verdict(first, run)}</td></tr>"
        )
    head = f"Against {html.escape(first.label)}"
    table = (
        f'<div class="scroll"><table class="pairs"><thead><tr><td></td><th scope="col">{head}</th>'
        f'<th scope="col">The interval</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )
    text = (
        "The best students, else the best models. Both are scored on the same resamples of the "
        "same dev rows, so this interval is narrower than those of the two scores suggest. It "
        "does not hold what other seeds would give."
    )
    return table + note(" ".join([text, *(f"No interval for {reason}." for reason in reasons)]))


def _verdict(first: RunFiles, run: RunFiles) -> str:
    bounds = paired_interval(first, run)
    if bounds is None:
        return MISSING
    return "holds 0" if bounds[0] <= 0 <= bounds[1] else "does not hold 0"


def _costs(runs: Sequence[RunFiles]) -> str:
    """Sizes, latency and times of each run, for its best model."""
    conditions = {conditions_of(run.model or {}) for run in runs if latency_of(run.model or {})}
    is_comparable = len(conditions) == 1
    columns: dict[str, Callable[[RunFiles], str]] = {
        "Model": lambda run: html.escape(str((run.model or {}).get("name", MISSING))),
        "Gap closed": lambda run: _number(gap_closed(run.results, run.model or {}), percent),
        "Encoder parameters, without embeddings": lambda run: _number(
            _of(run, "num_encoder_parameters"), format_si
        ),
        "On disk": lambda run: _number(_of(run, "bytes_on_disk"), lambda v: format_si(v, "B")),
        "Latency": lambda run: _number(latency_of(run.model or {}), lambda v: f"{v:.3g} ms"),
        "Time of the stages": lambda run: _number(
            sum(seconds_of(run.results).values()) or None, duration
        ),
    }
    head = "".join(f'<th scope="col">{title}</th>' for title in columns)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(run.label)}</th>'
        + "".join(f"<td>{show(run)}</td>" for show in columns.values())
        + "</tr>"
        for run in runs
    )
    table = (
        f'<div class="scroll"><table class="pairs"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    if not conditions:
        return table
    text = f"Latency: {next(iter(conditions))}. Measured in each run on its own"
    if not is_comparable:
        text = f"Latencies were measured in different conditions ({'; '.join(sorted(conditions))})"
    return table + note(f"{text}: trust a ratio of two models of one run more than these.")


def _number(value: float | None, show: Callable[[float], str]) -> str:
    return MISSING if value is None else html.escape(show(value))


def _of(run: RunFiles, key: str) -> float | None:
    return finite_number((run.model or {}).get(key))


def _role(run: RunFiles) -> str:
    return role_of(run.model or {})


def _no_settings(configs: Sequence[Any]) -> str:
    if not all(configs):
        return "A run has no readable config.yaml."
    return "All settings are the same but for the names of the run and its folder."


def _curves(runs: Sequence[RunFiles]) -> str:
    """The loss and the main metric of each stage, a curve for each run."""
    names = list(dict.fromkeys(name for run in runs for name in run.stages))
    parts = []
    for number, name in enumerate(names):
        having = [run for run in runs if name in run.stages]
        figures = "".join(
            figure(title, series, LARGE)
            for title, series in (
                ("Loss", _series_of(runs, name, "train", "loss")),
                (_evaluation_title(having), _series_of(runs, name, "eval", None)),
            )
            if series
        )
        remarks = []
        if len(having) < len(runs):
            remarks.append(f"Only {', '.join(run.label for run in having)} has this stage.")
        terms = {tuple(_terms(run.stages[name])) for run in having}
        if len(terms) > 1:
            remarks.append("The losses have different terms, so their heights do not compare.")
        parts.append(
            f'<article id="stage-{number}"><h3>{html.escape(name)}</h3>'
            f'<div class="figures">{figures}</div>'
            f"{note(' '.join(remarks)) if remarks else ''}</article>"
        )
    return "".join(parts) or note("No curves: no run has a readable metrics.jsonl.")


def _evaluation_title(runs: Sequence[RunFiles]) -> str:
    return f"Evaluation: {', '.join(sorted({run.metric_name for run in runs}))}"


def _series_of(runs: Sequence[RunFiles], name: str, kind: str, key: str | None) -> list[Series]:
    """A curve for each run that has the stage; `key` None: its main metric."""
    found = []
    for color, run in enumerate(runs):
        stage = run.stages.get(name)
        rows = [] if stage is None else stage.train if kind == "train" else stage.evals
        points = points_of(rows, key or run.metric)
        if points:
            series = make_series(run.label, points, color)
            found.append(series._replace(points=series.mean or series.points, mean=()))
    return found


def _terms(stage: Stage) -> list[str]:
    return sorted(key for row in stage.train[-1:] for key in row if key.startswith("loss/"))
