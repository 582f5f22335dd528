"""The results of a report: headline, size figure and comparison table.

Takes the parsed `results.json` and returns escaped HTML. Reads no file and draws no curve.
A role (teacher, student, baseline) has the same colour everywhere on the page.
"""

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


def headline(results: dict[str, Any]) -> str:
    """The result of the run in one sentence, without the parts that `results.json` lacks."""
    teacher, student = find_model(results, "teacher"), find_model(results, "student")
    metric = html.escape(metric_name(results.get("metric")))
    model = student or next(iter(models_of(results)), None)
    score = score_of(results, model)
    if model is None or score is None:
        name = html.escape(str(results.get("name", "This run")))
        return heldout_sentence(results) or f"{name} has no scored model."
    subject = html.escape(str(model.get("name", "The model")))
    if student:
        count = len(students_of(results))
        subject = f"The best of {count} students, {subject}," if count > 1 else "The student"
    kept = share_kept(results, model) if student else None
    if kept is None:
        sentence = f"{subject} reaches {_figure(f'{score:.3f}', role_of(model))} {metric}"
    else:
        verb = "keeps" if kept <= 1 else "reaches"
        sentence = f"{subject} {verb} {_figure(percent(kept))} of its teacher’s {metric}"
    return sentence + (_savings(teacher, student) if teacher and student else "") + "."


def _savings(teacher: Model, student: Model) -> str:
    """“ with 8.0× fewer encoder parameters and runs 4.1× faster”, as far as both are known."""
    sizes = [finite_number(m.get("num_encoder_parameters")) for m in (teacher, student)]
    size = compare(sizes[0], sizes[1], "fewer", "more")
    times = [latency_of(m) for m in (teacher, student)]
    speed = compare(times[0], times[1], "faster", "slower")
    sentence = f" with {_figure(size)} encoder parameters" if size not in ("", SAME) else ""
    if speed not in ("", SAME) and conditions_of(teacher) == conditions_of(student):
        sentence += f" and runs {_figure(speed)}"
    return sentence


def baseline_sentence(results: dict[str, Any]) -> str:
    """The baseline's score and the gain by distillation; empty where a score is missing."""
    student, baseline = find_model(results, "student"), find_baseline(results)
    score, student_score = score_of(results, baseline), score_of(results, student)
    if baseline is None or score is None or student_score is None:
        return ""
    points = 100 * (student_score - score)
    if results.get("metric") in LOWER_IS_BETTER:
        verdict = f"the student reaches {student_score:.3f}"
    else:
        verdict = f"distillation {'adds' if points >= 0 else 'costs'} {abs(points):.1f} points"
    name = html.escape(str(baseline.get("name", "baseline")))
    return f"The baseline, {name}, reaches {_figure(f'{score:.3f}', 'baseline')}: {verdict}."


def heldout_sentence(results: dict[str, Any]) -> str:
    """The pretrained model's perplexity on held-out text; empty without one."""
    perplexity = finite_number(_mapping(results, "heldout").get("perplexity"))
    if perplexity is None:
        return ""
    figure = _figure(f"{perplexity:.1f}", "teacher")
    return f"The pretrained model’s perplexity on held-out text is {figure}."


def size_figure(results: dict[str, Any]) -> str:
    """Nested squares whose areas are the encoder parameters of teacher and student."""
    teacher, student = find_model(results, "teacher"), find_model(results, "student")
    sizes = [finite_number((m or {}).get("num_encoder_parameters")) for m in (teacher, student)]
    if not sizes[0] or not sizes[1] or min(sizes[0], sizes[1]) <= 0:
        return ""
    largest = max(sizes[0], sizes[1])
    squares = sorted(zip(sizes, ("teacher", "student"), strict=True), reverse=True)
    marks = ""
    for size, role in squares:
        side = 158 * math.sqrt((size or 0) / largest)
        marks += (
            f'<rect class="{role}" x="1" y="{159 - side:.1f}" '
            f'width="{side:.1f}" height="{side:.1f}"/>'
        )
    return (
        '<figure class="mark"><svg viewBox="0 0 160 160" role="img" '
        f'aria-label="Encoder parameters: teacher {format_si(sizes[0])}, '
        f'student {format_si(sizes[1])}">'
        f"{marks}</svg><figcaption>Encoder parameters, drawn to scale:<br>"
        f'<b class="teacher">{format_si(sizes[0])}</b> to '
        f'<b class="student">{format_si(sizes[1])}</b>'
        "</figcaption></figure>"
    )


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
    names = list(dict.fromkeys(k for m in models for k in _mapping(m, "metrics")))
    for name in sorted(names, key=lambda n: n != main):
        label = metric_name(name)
        yield Row(
            label[0].upper() + label[1:],
            lambda m, name=name: _metric(m, name),
            lambda v: f"{v:.3f}",
            lambda ref, v: "" if ref is None else f"{v - ref:+.3f}".replace("-", "−"),
            name == main,
        )
    yield Row(
        "Share of the teacher’s score", lambda m: share_kept(results, m), percent, lambda _, v: ""
    )

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
        cells += (
            f'<td title="{value:,.10g}"><b>{row.show(value)}</b>'
            f"{bar if len(models) > 1 else ''}<small>{relation}</small></td>"
        )
    main = ' class="main"' if row.is_main else ""
    return f'<tr{main}><th scope="row">{html.escape(row.label)}</th>{cells}</tr>'


def _uncertainty_note(results: dict[str, Any]) -> str:
    """The standard error of the student's accuracy, and a note about seeds."""
    seeds = _seeds_note(results)
    count = finite_number(results.get("dev_examples"))
    accuracy = _metric(find_model(results, "student") or {}, "accuracy")
    if not count or count < 1 or accuracy is None or not 0 <= accuracy <= 1:
        return seeds
    error = math.sqrt(accuracy * (1 - accuracy) / count)
    return (
        f'<p class="note">Measured on {count:,.0f} examples: one standard error of the student’s '
        f"accuracy is {error:.3f}. A model trained in this run is the checkpoint with the best "
        f"score on these same examples.</p>{seeds}"
    )


def _seeds_note(results: dict[str, Any]) -> str:
    """The models trained with several seeds, with the mean and standard deviation of the scores."""
    several = [m for m in models_of(results) if isinstance(m.get("by_seed"), list)]
    if not several:
        return ""
    metric = str(results.get("metric"))

    def described(model: Model) -> str:
        words = (str(model.get("role", "model")), str(model.get("name", "")))
        subject, count = html.escape(" ".join(words)), len(model["by_seed"])
        deviation = finite_number(_mapping(model, "deviation").get(metric)) or 0
        mean = finite_number(_mapping(model, "mean").get(metric))
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


def finite_number(value: Any) -> float | None:
    """The value as a float, or None for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


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


def _figure(text: str, role: str = "student") -> str:
    return f'<b class="{role}">{text}</b>'


def _metric(model: Model, name: str) -> float | None:
    return finite_number(_mapping(model, "metrics").get(name))


def latency_of(model: Model) -> float | None:
    return finite_number(_mapping(model, "latency_ms").get("median"))


def conditions_of(model: Model) -> str:
    """Conditions of the latency measurement, not escaped: “CPU, batch 1, 32 tokens”."""
    latency = _mapping(model, "latency_ms")
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


def _mapping(model: Model, key: str) -> dict[str, Any]:
    value = model.get(key)
    return value if isinstance(value, dict) else {}
