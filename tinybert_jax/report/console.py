"""The results of a run as lines for the console, from `results.json`; text that is safe to show."""

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tinybert_jax.report.gate import gate_lines
from tinybert_jax.report.tables import clear_gap, show_score

# Control characters but tab and line break, characters that turn the direction of writing, and
# halves of characters (lone surrogates), which no file holds.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def nothing() -> None:
    """No view is drawn."""


close_view: Callable[[], None] = nothing  # erases the live view of a run, before a message


def printable(text: str) -> str:
    """The text with such characters as `\\x1b`, so that no name in it steers a terminal."""
    return _HIDDEN.sub(lambda match: repr(match[0])[1:-1], text)


def json_line(value: Any) -> str:
    """The value as one line of JSON, with such characters as `\\u001b`; ValueError for NaN."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _HIDDEN_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


_HIDDEN_IN_JSON = re.compile(f"{_HIDDEN.pattern[:-1]}\u2028\u2029]")


def console_summary(summary: dict[str, Any]) -> str:
    """The models, comparisons and held-out metrics of `results.json`, as lines for the console."""
    metric, width = summary["metric"], max((len(m["name"]) for m in summary["models"]), default=0)
    show = functools.partial(show_score, metric, digits=4)
    lines = [
        f"{m['role']:<9} {m['name']:<{width}}  "
        f"{metric} {show(m['metrics'][metric])}{_spread(metric, m)}"
        f"{_shown(metric, m['intervals'][metric])}"
        f"{_costs(m)}"
        for m in summary["models"]
    ]
    if lines:
        lines.insert(0, _legend(summary))
    kept = summary.get("share_kept", {})
    shares = kept if isinstance(kept, dict) else {"the student": kept}
    comparisons = summary.get("comparisons", {})
    for name, share in shares.items():
        compared = comparisons[name] if name in comparisons else next(iter(comparisons.values()))
        line = f"{name} keeps {share:.1%} of its teacher"
        closed = compared.get("gap_closed", {})
        if (value := clear_gap(closed)) is not None:
            low, high = closed["interval"]
            line += (
                f" and closes {value:.0%} [{low:.0%}, {high:.0%}] of the gap between itself "
                "without a teacher and the teacher"
            )
        lines.append(line)
    for name, compared in comparisons.items():
        differences = ", ".join(
            f"{show(found['difference'], sign='+')}{_shown(metric, found['interval'])} "
            f"{_OTHERS[other]}"
            for other, found in compared.items()
            if other in _OTHERS
        )
        if differences:
            lines.append(f"{name}: {metric} {differences}")
    if heldout := summary.get("heldout"):
        values = (f"{name} {float(value):.4g}" for name, value in heldout.items())
        lines.append(f"pretrain  on held-out text: {', '.join(values)}")
    lines += gate_lines(summary)
    lines += [f"advice: {line}" for line in summary.get("advice", ())]
    return "\n".join(lines)


def _legend(summary: dict[str, Any]) -> str:
    """What the numbers of the models are."""
    measured = [m["latency_ms"] for m in summary["models"] if "latency_ms" in m]
    length = f"; milliseconds for a text of {measured[0]['seq_len']} tokens" if measured else ""
    rows = f"{summary['dev_examples']:,} dev rows, with its 95% interval"
    return f"{summary['metric']} on {rows}; parameters of the layers{length}"


_OTHERS = {
    "teacher": "against the teacher",
    "baseline": "against itself without a teacher",
    "linear": "against TF-IDF",
}


def _shown(metric: str, bounds: Sequence[float]) -> str:
    low, high = (show_score(metric, bound, digits=4) for bound in bounds)
    return f" [{low}, {high}]"


def _costs(model: dict[str, Any]) -> str:
    if "latency_ms" not in model:
        return ""
    size, latency = model["num_encoder_parameters"] / 1e6, model["latency_ms"]["median"]
    return f"  {size:.2f} M encoder parameters  {latency:.1f} ms"


def _spread(metric: str, model: dict[str, Any]) -> str:
    if "by_seed" not in model:
        return ""
    show = functools.partial(show_score, metric, digits=4)
    count, deviation = len(model["by_seed"]), show(model["deviation"][metric])
    if "mean" in model:
        return f" (best of {count} seeds: {show(model['mean'][metric])} ± {deviation})"
    return f" ± {deviation} ({count} seeds)"
