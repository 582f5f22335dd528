"""Owns a report's confusion matrix: a heat map of a few classes, the worst pairs of many.

Takes the parsed `results.json` and returns escaped HTML.
"""

import html
import math
from typing import Any

from tinybert_jax.report.tables import find_model, models_of, number, percent

MAX_MATRIX_CLASSES = 20
MAX_CONFUSED_PAIRS = 15


def confusion_section(results: dict[str, Any]) -> str:
    """The student's confusion matrix as a heat map, or its worst pairs beyond 20 classes."""
    student = find_model(results, "student") or next(iter(models_of(results)), {})
    counts = _square(student.get("confusion"))
    if counts is None:
        return '<p class="note">No confusion matrix: results.json holds none for the student.</p>'
    names = results.get("label_names")
    if not isinstance(names, list) or len(names) != len(counts):
        names = list(range(len(counts)))
    labels = [html.escape(str(name)) for name in names]
    if len(counts) > MAX_MATRIX_CLASSES:
        return _confused_pairs(counts, labels)
    return _heat_map(counts, labels)


def _heat_map(counts: list[list[float]], labels: list[str]) -> str:
    size = "few" if len(labels) <= 6 else "many"
    head = "".join(f'<th scope="col"><span>{label}</span></th>' for label in labels)
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
        body += f'<tr><th scope="row">{labels[i]}</th>{cells}</tr>'
    return (
        f'<div class="scroll"><table class="heat {size}"><thead><tr><td>true ↓ predicted →</td>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="note">The stronger the colour, the larger the share of the true class: '
        '<b class="hit">right</b>, <b class="miss">wrong</b>.</p>'
    )


def _confused_pairs(counts: list[list[float]], labels: list[str]) -> str:
    pairs = [
        (count, i, j)
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        if i != j and count > 0
    ]
    pairs = sorted(pairs, key=lambda p: -p[0])[:MAX_CONFUSED_PAIRS]
    if not pairs:
        return f'<p class="note">No mistakes in {len(labels)} classes.</p>'
    rows = "".join(
        f'<tr><th scope="row">{labels[i]}</th><td>{labels[j]}</td>'
        f'<td class="num"><b>{count:,.0f}</b>'
        f'<i class="bar miss" style="width:{100 * count / pairs[0][0]:.1f}%"></i></td>'
        f'<td class="num">{percent(count / sum(counts[i]))}</td></tr>'
        for count, i, j in pairs
    )
    return (
        '<div class="scroll"><table class="pairs"><thead><tr><th>True class</th><th>Taken for</th>'
        f"<th>Examples</th><th>Of the true class</th></tr></thead><tbody>{rows}</tbody>"
        "</table></div>"
        f'<p class="note">The most confused of {len(labels)} classes.</p>'
    )


def _square(matrix: Any) -> list[list[float]] | None:
    """The matrix as floats, or None where it is not a square of counts."""
    if not isinstance(matrix, list) or not matrix:
        return None
    rows = [[number(v) for v in row] for row in matrix if isinstance(row, list)]
    known = [[v for v in row if v is not None and v >= 0] for row in rows]
    is_square = len(known) == len(matrix) and all(len(row) == len(matrix) for row in known)
    return known if is_square else None
