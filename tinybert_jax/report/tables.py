"""How the models and scores of `results.json` are read, compared and shown as text.

A role (teacher, student, baseline) has the same colour everywhere on the page.
"""

import html
import math
from collections.abc import Mapping
from typing import Any

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


def models_of(results: Mapping[str, Any]) -> list[Model]:
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
    return metric_of(model or {}, str(results.get("metric")))


def metric_name(metric: Any, results: Mapping[str, Any]) -> str:
    """The name of a metric for readers, not escaped.

    F1 of classes is that of the second of two labels, and of more labels the mean over them.
    """
    labels = results.get("label_names")
    if metric == "f1" and isinstance(labels, list | tuple) and _has_classes(results):
        return f"F1 of {labels[1]}" if len(labels) == 2 else "macro F1"
    return METRIC_NAMES.get(str(metric), str(metric).replace("_", " ") or "metric")


def _has_classes(results: Mapping[str, Any]) -> bool:
    """Whether a model has the scores of metrics.classification; spans and answers have others."""
    return any("matthews" in mapping_of(model, "metrics") for model in models_of(results))


TRANSLATION_METRICS = ("bleu", "chrf")  # from 0 to 100; other scores are at most 1


def in_points(metric: Any, value: float) -> float:
    """A score, or a difference of two, in points: hundredths of the best score."""
    return value if metric in TRANSLATION_METRICS else 100 * value


def show_score(metric: Any, value: float, digits: int = 3, sign: str = "") -> str:
    """A score as text; `digits` after the point of a score that is at most 1."""
    return f"{value:{sign}.{2 if metric in TRANSLATION_METRICS else digits}f}"


def breakable(name: Any) -> str:
    """A name as HTML that may go on in a new line after an underscore."""
    return html.escape(str(name)).replace("_", "_<wbr>")


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


def floor_not_beaten(results: Mapping[str, Any], model: Model) -> float | None:
    """The score of always giving the most frequent answer, where the model's interval reaches it.

    None where the model is above it, and where the results do not tell.
    """
    floor = finite_number(results.get("floor"))
    bounds = interval_of(model, results.get("metric"))
    return None if floor is None or bounds is None or bounds[0] > floor else floor


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


_UNSURE_LEAD = "the teacher’s lead over the student without a teacher may be chance"
_WIDEST_GAP = 2.0  # of an interval of the gap closed; a wider one tells nothing
_WIDE_GAP = f"its interval is wider than {100 * _WIDEST_GAP:.0f} points"
_NO_INTERVAL = "no interval is recorded"


def gap_closed(results: dict[str, Any], model: Model) -> float | None:
    """(student - alone) / (teacher - alone); None for other models and where chance may make it."""
    return clear_gap(_recorded_gap(results, model) or {})


def reason_without_gap(results: dict[str, Any], model: Model) -> str:
    """Why the gap that a student closes is recorded and not shown; empty for other models."""
    closed = _recorded_gap(results, model)
    return "" if closed is None else _unclear(closed)


def clear_gap(closed: Mapping[str, Any]) -> float | None:
    """The value of a gap closed whose interval is known and not too wide to mean anything."""
    return None if _unclear(closed) else finite_number(closed.get("value"))


def _recorded_gap(results: dict[str, Any], model: Model) -> dict[str, Any] | None:
    compared = mapping_of(mapping_of(results, "comparisons"), str(model.get("name")))
    is_recorded = model.get("role") == "student" and "gap_closed" in compared
    return mapping_of(compared, "gap_closed") if is_recorded else None


def _unclear(closed: Mapping[str, Any]) -> str:
    """Why the value of a gap closed means nothing; empty where it means something.

    runs.results writes the interval null where the teacher's lead is not sure.
    """
    bounds = closed.get("interval", ())
    if bounds is None:
        return _UNSURE_LEAD
    ends = [finite_number(v) for v in bounds] if isinstance(bounds, list | tuple) else []
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return _NO_INTERVAL
    return _WIDE_GAP if ends[1] - ends[0] > _WIDEST_GAP else ""


def metric_of(model: Model, name: str) -> float | None:
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
