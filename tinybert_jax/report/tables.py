"""The results of a report: the comparison table, and how models and scores are read and shown.

Takes the parsed `results.json` and returns escaped HTML. Reads no file and draws no curve.
A role (teacher, student, baseline) has the same colour everywhere on the page.
"""

import functools
import html
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

NBSP = "\u00a0"
MISSING = "–"
SAME = "same"
ROLES = ("teacher", "student", "baseline")
LOWER_IS_BETTER = frozenset({"mse", "loss", "perplexity"})
METRIC_NAMES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "mse": "mean squared error",
    "f1_micro": "micro F1",
    "f1_macro": "macro F1",
    "subset_accuracy": "subset accuracy",
}
Model = dict[str, Any]


class Row(NamedTuple):
    """A row of the comparison table.

    `read` takes a value from a model, `show` formats the value, and `relate` compares the teacher's
    value with the value of another model in words.
    """

    label: str
    read: Callable[[Model], float | None]
    show: Callable[[float], str]
    relate: Callable[[float | None, float], str]
    is_main: bool = False
    bounds: Callable[[Model], tuple[float, float] | None] = lambda model: None


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
        label = metric_name(name)
        yield Row(
            label if name in TRANSLATION_METRICS else label[0].upper() + label[1:],
            lambda m, name=name: _metric(m, name),
            functools.partial(show_score, name),
            lambda ref, v, name=name: (
                "" if ref is None else show_score(name, v - ref, sign="+").replace("-", "−")
            ),
            name == main,
            lambda m, name=name: interval_of(m, name),
        )
    yield Row(
        "Share of the teacher’s score", lambda m: share_kept(results, m), percent, lambda _, v: ""
    )
    yield Row("Gap closed", lambda m: gap_closed(results, m), percent, lambda _, v: "")

    def cost(label: str, key: str, unit: str, less: str, more: str) -> Row:
        return Row(
            label,
            lambda m: finite_number(m.get(key)),
            lambda v: format_si(v, unit),
            lambda ref, v: compare(ref, v, less, more),
        )

    yield cost("Parameters", "num_parameters", "", "fewer", "more")
    yield cost("Encoder parameters", "num_encoder_parameters", "", "fewer", "more")
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
    if all(v is None for v in values):
        return ""
    teachers = [i for i, m in enumerate(models) if m.get("role") == "teacher"]
    reference = values[teachers[0]] if teachers else None
    largest = max(v for v in values if v is not None)
    cells = ""
    for i, (model, value) in enumerate(zip(models, values, strict=True)):
        if value is None:
            cells += f"<td>{MISSING}</td>"
            continue
        width = 100 * max(value, 0) / largest if largest > 0 else 0
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
    return f'<p class="note">{" ".join(parts)}</p>{seeds}'


def choice_note(results: dict[str, Any]) -> str:
    """What the dev examples have chosen: a sentence."""
    chosen = finite_number(results.get("select_examples"))
    if chosen:
        return (
            f"Checkpoints and seeds were chosen on {chosen:,.0f} rows of the training text, so "
            "these examples chose nothing."
        )
    stages, models = mapping_of(results, "stages"), models_of(results)
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

    return (
        f'<p class="note">Scores over seeds, with the standard deviation of the '
        f"{html.escape(metric_name(metric))}: {'; '.join(described(m) for m in several)}. The "
        "exported model, the confusion matrix and the scores per class are those of the best seed."
        "</p>"
    )


def share_kept(results: dict[str, Any], model: Model) -> float | None:
    """A model's main metric divided by the teacher's; None where the ratio is meaningless.

    For a student `share_kept` of results.json comes first: the teacher may not be listed there.
    """
    recorded = results.get("share_kept")
    recorded = finite_number(
        recorded.get(model.get("name")) if isinstance(recorded, dict) else recorded
    )
    if recorded is not None and model.get("role") == "student":
        return recorded
    teacher = score_of(results, find_model(results, "teacher"))
    score = score_of(results, model)
    if results.get("metric") in LOWER_IS_BETTER or score is None or not teacher or teacher <= 0:
        return None
    return score / teacher


def compare(reference: float | None, value: float | None, less: str, more: str) -> str:
    """“8.0× fewer”: a cost compared with the reference; empty without two positive costs."""
    if reference is None or value is None or reference <= 0 or value <= 0:
        return ""
    ratio, word = (reference / value, less) if value <= reference else (value / reference, more)
    if ratio < 1.05:
        return SAME
    return (f"{ratio:.1f}×" if ratio < 100 else f"{ratio:,.0f}×") + NBSP + word


def models_of(results: dict[str, Any]) -> list[Model]:
    """The models of a run: teacher, student, baseline, then the rest."""
    models = results.get("models")
    known = [m for m in models if isinstance(m, dict)] if isinstance(models, list) else []
    return sorted(known, key=lambda m: (*ROLES, "other").index(role_of(m)))


def find_model(results: dict[str, Any], role: str) -> Model | None:
    """The model of a role with the best score, the first of equals; None without such a model."""

    def goodness(model: Model) -> float:
        score = score_of(results, model)
        if score is None:
            return -math.inf
        return -score if results.get("metric") in LOWER_IS_BETTER else score

    return max((m for m in models_of(results) if m.get("role") == role), key=goodness, default=None)


def find_baseline(results: dict[str, Any]) -> Model | None:
    """The baseline with the name of the best student, else the best baseline."""
    student, baseline = find_model(results, "student"), find_model(results, "baseline")
    for model in models_of(results):
        if student and model.get("role") == "baseline" and model.get("name") == student.get("name"):
            baseline = model
    return baseline


def students_of(results: dict[str, Any]) -> list[Model]:
    return [model for model in models_of(results) if model.get("role") == "student"]


def role_of(model: Model) -> str:
    """The model's role as a CSS class; an unknown role is drawn in grey."""
    role = model.get("role")
    return role if role in ROLES else "other"


def score_of(results: dict[str, Any], model: Model | None) -> float | None:
    """A model's value of the run's main metric."""
    return _metric(model or {}, str(results.get("metric")))


def metric_name(metric: Any) -> str:
    """The name of a metric for readers, not escaped."""
    return METRIC_NAMES.get(str(metric), str(metric).replace("_", " ") or "metric")


TRANSLATION_METRICS = ("bleu", "chrf")  # from 0 to 100; other scores are at most 1


def in_points(metric: Any, value: float) -> float:
    """A score, or a difference of two, in points: hundredths of the best score."""
    return value if metric in TRANSLATION_METRICS else 100 * value


def show_score(metric: Any, value: float, digits: int = 3, sign: str = "") -> str:
    """A score as text; `digits` after the point of a score that is at most 1."""
    return f"{value:{sign}.{2 if metric in TRANSLATION_METRICS else digits}f}"


def finite_number(value: Any) -> float | None:
    """The value as a float that can be drawn: None for all but numbers up to 1e100; 0 below 1e-100.

    Sums and differences of such numbers stay finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not abs(value) <= 1e100:
        return None
    return float(value) if abs(value) >= 1e-100 else 0.0


def format_si(value: float, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: 22.7 M, 90.9 MB, 870."""
    value = float(f"{value:.3g}")
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{_three_digits(value / factor)}{NBSP}{prefix}{unit}"
    return _three_digits(value) + (NBSP + unit if unit else "")


def percent(share: float) -> str:
    """97.8 %, with a space that does not break."""
    return f"{100 * share:.1f}{NBSP}%"


def _three_digits(value: float) -> str:
    exponent = math.floor(math.log10(abs(value) or 1))
    return f"{value:.2e}" if exponent < -4 else f"{value:.{max(0, 2 - exponent)}f}"


def interval_of(model: Model, metric: Any) -> tuple[float, float] | None:
    """The 95 % interval of a model's metric; None without one."""
    bounds = mapping_of(model, "intervals").get(str(metric))
    values = [finite_number(value) for value in bounds] if isinstance(bounds, list | tuple) else []
    if len(values) != 2 or values[0] is None or values[1] is None:
        return None
    return values[0], values[1]


def difference_to(
    results: dict[str, Any], model: Model, role: str
) -> tuple[float, float, float] | None:
    """(difference, low, high): a student's score less that of the model of a role, and its 95 %
    interval; None where the results hold none.
    """
    compared = mapping_of(mapping_of(results, "comparisons"), str(model.get("name")))
    found = mapping_of(compared, role)
    bounds = found.get("interval")
    if not isinstance(bounds, list | tuple):
        return None
    values = [finite_number(value) for value in (found.get("difference"), *bounds)]
    if len(values) != 3 or any(value is None for value in values):
        return None
    return values[0], values[1], values[2]  # type: ignore[return-value]


def gap_closed(results: dict[str, Any], model: Model) -> float | None:
    """(student - alone) / (teacher - alone); None for other models and where it is not known."""
    compared = mapping_of(mapping_of(results, "comparisons"), str(model.get("name")))
    is_student = model.get("role") == "student"
    return finite_number(mapping_of(compared, "gap_closed").get("value")) if is_student else None


def _metric(model: Model, name: str) -> float | None:
    return finite_number(mapping_of(model, "metrics").get(name))


def latency_of(model: Model) -> float | None:
    return finite_number(mapping_of(model, "latency_ms").get("median"))


def conditions_of(model: Model) -> str:
    """Conditions of the latency measurement, not escaped: “CPU, batch 1, 32 tokens”."""
    latency = mapping_of(model, "latency_ms")
    device = latency.get("device")
    words = [] if device is None else ["CPU" if device == "cpu" else str(device)]
    words += [f"batch {latency.get('batch', '?')}", f"{latency.get('seq_len', '?')} tokens"]
    return ", ".join(words)


def with_latency_device(results: dict[str, Any], device: Any) -> dict[str, Any]:
    """The results with `device`, that of env.json, for all latencies that name no device."""
    if device is None:
        return results

    def named(model: Model) -> Model:
        latency = model.get("latency_ms")
        if not isinstance(latency, dict):
            return model
        return {**model, "latency_ms": {"device": device, **latency}}

    return {**results, "models": [named(model) for model in models_of(results)]}


def mapping_of(model: Model, key: str) -> dict[str, Any]:
    value = model.get(key)
    return value if isinstance(value, dict) else {}
