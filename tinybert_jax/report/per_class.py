"""The table of scores per class in a report, for multi-label labels and kinds of entities.

Takes the parsed `results.json` and returns escaped HTML. A model may hold `per_class`, a list of
{"name", "precision", "recall", "f1", "support"}, and `per_class_title`, the heading.
"""

import html
from typing import Any

from tinybert_jax.report.tables import (
    MISSING,
    Model,
    find_baseline,
    find_model,
    finite_number,
    role_of,
    students_of,
)

Scores = dict[str, dict[str, Any]]  # by name of the class


def per_class_section(results: dict[str, Any]) -> tuple[str, str] | None:
    """Title and table of teacher, student and baseline; None where no such model has `per_class`.

    F1 is shown for all models; support, precision and recall are the student's, or without a
    student those of the first model.
    """
    best = find_model(results, "teacher"), find_model(results, "student"), find_baseline(results)
    models = {role_of(model): model for model in best if model and _scores(model)}
    if not models:
        return None
    by_role = {role: _scores(model) for role, model in models.items()}
    role = "student" if "student" in models else next(iter(models))
    head = "".join(_head(r, "F1") for r in by_role)
    head += _head(role, "precision") + _head(role, "recall")
    names = dict.fromkeys(name for scores in (by_role[role], *by_role.values()) for name in scores)
    shown = _most_frequent(list(names), by_role[role])
    rows = "".join(_row(name, role, by_role) for name in shown)
    title = html.escape(str(models[role].get("per_class_title") or "Scores per class"))
    return title, (
        '<div class="scroll"><table class="classes"><thead><tr><th scope="col">Class</th>'
        f'<th scope="col" class="num">Support</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
        '</div><p class="note">Support is the number of true cases of the class in the dev set.'
        f"{_which(results, models)}{_left_out(len(shown), len(names))}</p>"
    )


MAX_CLASSES = 100  # rows of the table


def _most_frequent(names: list[str], scores: Scores) -> list[str]:
    """The names in their order; of too many the classes with the most true cases, most first."""
    if len(names) <= MAX_CLASSES:
        return names

    def support(name: str) -> float:
        return finite_number(scores.get(name, {}).get("support")) or 0.0

    return sorted(names, key=lambda name: -support(name))[:MAX_CLASSES]


def _left_out(num_shown: int, num_classes: int) -> str:
    if num_shown == num_classes:
        return ""
    return (
        f" Shown are the {num_shown:,} classes with the most true cases; results.json holds all "
        f"{num_classes:,}."
    )


def _which(results: dict[str, Any], models: dict[str, Model]) -> str:
    """The name of the student, where the run has several students."""
    if len(students_of(results)) < 2 or "student" not in models:
        return ""
    return (
        f" The student is {html.escape(str(models['student'].get('name')))}, the best of the run."
    )


def _head(role: str, score: str) -> str:
    return f'<th scope="col" class="num"><b class="{role}">{role.capitalize()}</b><br>{score}</th>'


def _row(name: str, role: str, by_role: dict[str, Scores]) -> str:
    main = by_role[role].get(name, {})
    support = finite_number(main.get("support"))
    cells = f'<td class="num">{MISSING if support is None else f"{support:,.0f}"}</td>'
    for other, scores in by_role.items():
        f1 = finite_number(scores.get(name, {}).get("f1"))
        width = 100 * min(max(f1 or 0, 0), 1)
        bar = "" if f1 is None else f'<i class="bar {other}" style="width:{width:.1f}%"></i>'
        cells += f'<td class="num"><b>{_score(f1)}</b>{bar}</td>'
    for key in ("precision", "recall"):
        cells += f'<td class="num">{_score(finite_number(main.get(key)))}</td>'
    return f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>'


def _score(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _scores(model: Model) -> Scores:
    """The entries of `per_class` by name of the class; malformed entries are left out."""
    entries = model.get("per_class")
    known = entries if isinstance(entries, list) else []
    return {str(e["name"]): e for e in known if isinstance(e, dict) and "name" in e}
