"""The confusion matrix of a report: a heat map, or a list of the worst pairs of many classes.

Takes the parsed `results.json` and returns escaped HTML. A model holds `confusion`, or of very many
classes `mistakes`: a list of {"true", "predicted", "count", "support"} with class ids.
"""

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tinybert_jax.report.tables import (
    Model,
    breakable,
    find_model,
    finite_number,
    models_of,
    percent,
    students_of,
)

MAX_MATRIX_CLASSES = 20
MAX_CONFUSED_PAIRS = 15


def confusion_section(results: dict[str, Any]) -> tuple[str, str]:
    """Title and confusion matrix of the best student, or of the first model without students."""
    student = find_model(results, "student")
    subject = "student" if student else "model"
    if len(students_of(results)) > 1:
        subject = "best student"
    model = student or next(iter(models_of(results)), {})
    return f"Confusion matrix of the {subject}", _matrix(model, subject, results)


def _matrix(model: Model, subject: str, results: dict[str, Any]) -> str:
    """A heat map, or above 20 classes a list of the worst pairs."""
    mistakes = _mistakes(model.get("mistakes"))
    if mistakes is not None:
        names = results.get("label_names")
        known = list(names) if isinstance(names, list) else []
        note = f"results.json has no matrix of so many classes ({len(known):,})"
        return _confused_pairs(mistakes, known, note)
    counts = _square(model.get("confusion"))
    if counts is None:
        note = f"No confusion matrix: results.json holds none for the {subject}."
        return f'<p class="note">{note}</p>'
    names = results.get("label_names")
    if not isinstance(names, list) or len(names) != len(counts):
        names = list(range(len(counts)))
    if len(counts) > MAX_MATRIX_CLASSES:
        return _confused_pairs(_worst_pairs(counts), names, "")
    return _heat_map(counts, [str(name) for name in names])


def _heat_map(counts: list[list[float]], labels: list[str]) -> str:
    size, heads = "few", [breakable(name) for name in labels]
    if len(labels) > 6:
        size, heads = "many", [html.escape(name) for name in cut_names(labels)]
    head = "".join(
        f'<th scope="col" title="{html.escape(label)}"><span>{name}</span></th>'
        for label, name in zip(labels, heads, strict=True)
    )
    body = ""
    for i, row in enumerate(counts):
        total = sum(row)
        cells = ""
        for j, count in enumerate(row):
            share = count / total if total else 0.0
            kind = ("hit" if i == j else "miss") + (" deep" if math.sqrt(share) > 0.6 else "")
            kind += "" if count else " none"
            text = f"<b>{count:,.0f}</b>" + (f"<small>{percent(share)}</small>" if total else "")
            cells += f'<td class="{kind}" style="--v:{math.sqrt(share):.2f}">{text}</td>'
        body += f'<tr><th scope="row">{breakable(labels[i])}</th>{cells}</tr>'
    return (
        f'<div class="scroll"><table class="heat {size}"><thead><tr><td>true ↓ predicted →</td>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="note">A stronger colour means a larger share of the true class: '
        '<b class="hit">correct</b> or <b class="miss">wrong</b> predictions.</p>'
    )


def cut_names(names: Sequence[str], length: int = 20) -> list[str]:
    """Names of at most `length` characters, cut in the middle, that stay distinct.

    Where no cut tells two names apart, such names begin with their place in the list.
    """

    def cut(name: str, num_first: int) -> str:
        num_last = length - 1 - num_first
        return name if len(name) <= length else f"{name[:num_first]}…{name[-num_last:]}"

    cuts = [[cut(name, num_first) for name in names] for num_first in (9, 6, 12, 3, 15)]
    best = max(cuts, key=lambda found: len(set(found)))
    return [
        f"{place} {name}"[:length] if best.count(name) > 1 else name
        for place, name in enumerate(best, 1)
    ]


class _Pair(NamedTuple):
    true: int
    predicted: int
    count: float
    support: float  # examples of the true class


def _worst_pairs(counts: list[list[float]]) -> list[_Pair]:
    pairs = [
        _Pair(i, j, count, sum(row))
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        if i != j and count > 0
    ]
    return sorted(pairs, key=lambda pair: -pair.count)[:MAX_CONFUSED_PAIRS]


def _mistakes(held: Any) -> list[_Pair] | None:
    """The pairs that results.json holds in place of a matrix; None without such a list."""
    if not isinstance(held, list):
        return None
    rows = [
        [finite_number(row.get(name)) for name in _Pair._fields]
        for row in held
        if isinstance(row, dict)
    ]
    known = [row for row in rows if all(value is not None and value >= 0 for value in row)]
    pairs = [_Pair(int(t), int(p), count, support) for t, p, count, support in known]  # type: ignore
    return [pair for pair in pairs if pair.count and pair.support][:MAX_CONFUSED_PAIRS]


def _confused_pairs(pairs: list[_Pair], names: Sequence[Any], remark: str) -> str:
    def name_of(place: int) -> str:
        return breakable(names[place] if place < len(names) else place)

    if not pairs:
        return f'<p class="note">No mistakes in {len(names)} classes.</p>'
    rows = "".join(
        f'<tr><th scope="row">{name_of(pair.true)}</th><td>{name_of(pair.predicted)}</td>'
        f'<td class="num"><b>{pair.count:,.0f}</b>'
        f'<i class="bar miss" style="width:{100 * pair.count / pairs[0].count:.1f}%"></i></td>'
        f'<td class="num">{percent(pair.count / pair.support)}</td></tr>'
        for pair in pairs
    )
    return (
        '<div class="scroll"><table class="pairs"><thead><tr><th>True class</th>'
        "<th>Predicted class</th><th>Examples</th><th>Share of the true class</th></tr></thead>"
        f"<tbody>{rows}</tbody>"
        "</table></div>"
        f'<p class="note">The most frequent mistakes among {len(names)} classes'
        f"{'; ' + remark if remark else ''}.</p>"
    )


def _square(matrix: Any) -> list[list[float]] | None:
    """The matrix as floats, or None where it is not a square matrix of counts."""
    if not isinstance(matrix, list) or not matrix:
        return None
    rows = [[finite_number(v) for v in row] for row in matrix if isinstance(row, list)]
    known = [[v for v in row if v is not None and v >= 0] for row in rows]
    is_square = len(known) == len(matrix) and all(len(row) == len(matrix) for row in known)
    return known if is_square else None
