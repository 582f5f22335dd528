"""The comparison table of a report, and the notes below it: what the scores rest on.

Takes the parsed `results.json` and returns escaped HTML.
"""

import functools
import html
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tinybert_jax.report.tables import (
    LOWER_IS_BETTER,
    MISSING,
    NBSP,
    TRANSLATION_METRICS,
    Model,
    compare,
    conditions_of,
    finite_number,
    format_si,
    gap_closed,
    interval_of,
    latency_of,
    mapping_of,
    metric_name,
    metric_of,
    models_of,
    percent,
    reason_without_gap,
    role_of,
    share_kept,
    show_score,
)


class Row(NamedTuple):
    """A row of the comparison table.

    `read` takes a value from a model, `show` formats the value, and `relate` compares the teacher's
    value with the value of another model in words. `missing` says why a model has no value.
    """

    label: str
    read: Callable[[Model], float | None]
    show: Callable[[float], str]
    relate: Callable[[float | None, float], str]
    is_main: bool = False
    bounds: Callable[[Model], tuple[float, float] | None] = lambda model: None
    full_bar: float | None = None  # the value of a whole bar; None: the largest of the row
    missing: Callable[[Model], str] = lambda model: ""


def comparison_table(results: dict[str, Any]) -> str:
    """A table with a column per model, a row per quantity and a bar to scale under every number."""
    models = models_of(results)
    if not models:
        return '<p class="note">results.json lists no models, so there is nothing to compare.</p>'
    head = "".join(
        f'<th scope="col" class="{role_of(m)}"><span>{html.escape(str(m.get("role", "model")))}'
        f"</span>{html.escape(str(m.get('name', '')))}</th>"
        for m in models
    )
    rows = "".join(_table_row(row, models) for row in _rows(results, models))
    return (
        '<div class="scroll"><table class="compare">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        + _uncertainty_note(results)
    )


def _rows(results: dict[str, Any], models: list[Model]) -> Iterator[Row]:
    main = results.get("metric")
    names = list(dict.fromkeys(k for m in models for k in mapping_of(m, "metrics")))
    for name in sorted(names, key=lambda n: n != main):
        label = metric_name(name, results)
        yield Row(
            label if name in TRANSLATION_METRICS else label[0].upper() + label[1:],
            lambda m, name=name: metric_of(m, name),
            functools.partial(show_score, name),
            lambda ref, v, name=name: (
                "" if ref is None else show_score(name, v - ref, sign="+").replace("-", "−")
            ),
            name == main,
            lambda m, name=name: interval_of(m, name),
            None if name in LOWER_IS_BETTER else 100 if name in TRANSLATION_METRICS else 1,
        )
    yield Row(
        "Share of the teacher’s score",
        lambda m: share_kept(results, m),
        percent,
        lambda _, v: "",
        full_bar=1,
    )
    yield Row(
        "Gap closed",
        lambda m: gap_closed(results, m),
        percent,
        lambda _, v: "",
        full_bar=1,
        missing=lambda m: reason_without_gap(results, m),
    )

    def cost(label: str, key: str, unit: str, less: str, more: str) -> Row:
        return Row(
            label,
            lambda m: finite_number(m.get(key)),
            lambda v: format_si(v, unit),
            lambda ref, v: compare(ref, v, less, more),
        )

    yield cost("Parameters", "num_parameters", "", "fewer", "more")
    yield cost(
        "Encoder parameters, without embeddings", "num_encoder_parameters", "", "fewer", "more"
    )
    yield cost("FLOPs per token", "flops_per_token", "", "fewer", "more")
    yield cost("Size on disk", "bytes_on_disk", "B", "smaller", "larger")
    conditions = {conditions_of(m) for m in models if latency_of(m) is not None}
    is_comparable = len(conditions) == 1
    yield Row(
        f"Latency ({conditions.pop() if is_comparable else 'conditions differ'})",
        latency_of,
        lambda v: f"{v:.3g}{NBSP}ms",
        lambda ref, v: compare(ref, v, "faster", "slower") if is_comparable else "",
    )


def _table_row(row: Row, models: list[Model]) -> str:
    values = [row.read(m) for m in models]
    reasons = [row.missing(m) for m in models]
    if all(v is None for v in values) and not any(reasons):
        return ""
    teachers = [i for i, m in enumerate(models) if m.get("role") == "teacher"]
    reference = values[teachers[0]] if teachers else None
    full = row.full_bar or max((v for v in values if v is not None), default=0)
    cells = ""
    for i, (model, value) in enumerate(zip(models, values, strict=True)):
        if value is None:
            title = f' title="{html.escape(reasons[i])}"' if reasons[i] else ""
            cells += f"<td{title}>{MISSING}</td>"
            continue
        width = 100 * min(max(value, 0) / full, 1) if full > 0 else 0
        bar = f'<i class="bar {role_of(model)}" style="width:{width:.1f}%"></i>'
        relation = "" if i in teachers[:1] else row.relate(reference, value)
        bounds, shown = row.bounds(model), ""
        if bounds:
            ends = ", ".join(map(row.show, bounds))
            shown = f' <span class="soft">[{ends}]</span>'
        cells += (
            f'<td title="{value:,.10g}"><b>{row.show(value)}</b>{shown}'
            f"{bar if len(models) > 1 else ''}<small>{relation}</small></td>"
        )
    main = ' class="main"' if row.is_main else ""
    return f'<tr{main}><th scope="row">{html.escape(row.label)}</th>{cells}</tr>'


def _uncertainty_note(results: dict[str, Any]) -> str:
    """What the brackets are, what chose the models, what the gap is, and a note about seeds."""
    seeds = _seeds_note(results)
    count = finite_number(results.get("dev_examples"))
    if not count or count < 1:
        return seeds
    parts = [f"Measured on {count:,.0f} examples of the dev set."]
    if any(interval_of(m, results.get("metric")) for m in models_of(results)):
        parts.append("In brackets: the 95 % interval over resamples of these examples (bootstrap).")
    parts.append(choice_note(results))
    if any(gap_closed(results, m) is not None for m in models_of(results)):
        parts.append(
            "Gap closed: the share of the way from the student without a teacher to the teacher."
        )
    reasons = dict.fromkeys(reason_without_gap(results, m) for m in models_of(results))
    parts += [f"Gap closed, {MISSING}: {reason}." for reason in reasons if reason]
    if len(models_of(results)) > 1:  # one model has no bars
        parts.append("A whole bar is a score or a share of 100 %, or the largest cost of its row.")
    return f'<p class="note">{" ".join(parts)}</p>{seeds}'


def choice_note(results: dict[str, Any]) -> str:
    """What the dev examples have chosen: a sentence."""
    chosen = finite_number(results.get("select_examples"))
    stages, models = mapping_of(results, "stages"), models_of(results)
    if chosen:
        what = "seeds" if "update" not in stages else "the mixture of old and trained weights"
        return (
            f"Checkpoints and {what} were chosen on {chosen:,.0f} rows of the training text, so "
            "these examples chose nothing."
        )
    is_last = all(mapping_of(stages, name).get("num_evals") == 1 for name in stages)
    # The score of several teachers is that of the best one, that of students is a mean.
    is_best = any("by_seed" in model and role_of(model) == "teacher" for model in models)
    is_fitted = any("settings" in model for model in models) or results.get("export") == "best"
    if not stages or not is_last or is_best or is_fitted:
        return (
            "A model trained in this run is the checkpoint with the best score on these same "
            "examples, which flatters it; task.select_share sets other rows apart for the choice."
        )
    if any("by_seed" in model for model in models):
        return (
            "Every model is that of its last step, and scores are means over seeds: these examples "
            "chose only which seed is exported."
        )
    return "Every model is that of its last step, so these examples chose nothing."


def _seeds_note(results: dict[str, Any]) -> str:
    """The models trained with several seeds, with the mean and standard deviation of the scores."""
    several = [m for m in models_of(results) if isinstance(m.get("by_seed"), list)]
    if not several:
        return ""
    metric = str(results.get("metric"))

    def described(model: Model) -> str:
        words = (str(model.get("role", "model")), str(model.get("name", "")))
        subject, count = html.escape(" ".join(words)), len(model["by_seed"])
        deviation = finite_number(mapping_of(model, "deviation").get(metric)) or 0
        mean = finite_number(mapping_of(model, "mean").get(metric))
        if mean is None:
            return f"{subject}: mean of {count} seeds, ± {deviation:.4f}"
        return f"{subject}: best of {count} seeds, mean {mean:.4f} ± {deviation:.4f}"

    shown = "; ".join(described(m) for m in several)
    return (
        f'<p class="note">Scores over seeds, with the standard deviation of the '
        f"{html.escape(metric_name(metric, results))}: {shown}. The "
        "exported model, the confusion matrix and the scores per class are those of the best seed."
        "</p>"
    )
