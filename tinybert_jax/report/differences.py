"""The texts on which student and teacher differ, in a report.

Takes the parsed `results.json` and returns escaped HTML. It may hold `differing`: {"num_texts",
"num_teacher_right", "num_student_right", "student", "texts": [{"text", "label", "teacher",
"student"}, …]}; predicted numbers have no counts of right ones.
"""

import html
from typing import Any

from tinybert_jax.report.tables import breakable, finite_number, mapping_of, models_of


def translations_section(results: dict[str, Any]) -> tuple[str, str]:
    """Title and table of what the models made of the first dev texts; empty without such."""
    models = [m for m in models_of(results) if isinstance(m.get("translations"), list)]
    rows = [[mapping_of({"row": row}, "row") for row in m["translations"]] for m in models]
    if not any(rows):
        return ("", "")
    columns = ["Text", "Reference", *(f"{m.get('role')} {m.get('name')}" for m in models)]
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = ""
    for first, *others in zip(*rows, strict=False):
        told = [_cell(first, key) for key in ("source", "reference", "translation")]
        told += [_cell(other, "translation") for other in others]
        body += "<tr>" + "".join(f"<td>{text}</td>" for text in told) + "</tr>"
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return "Translations", f'<div class="scroll"><table class="differing">{table}</table></div>'


def differences_section(results: dict[str, Any]) -> str:
    """A table of texts with both answers; empty where the results hold none."""
    held = mapping_of(results, "differing")
    texts = held.get("texts")
    rows = [row for row in texts if isinstance(row, dict)] if isinstance(texts, list) else []
    if not rows:
        return ""
    body = "".join(
        f"<tr><td>{_cell(row, 'text')}</td>"
        + "".join(f"<td>{breakable(row.get(key, ''))}</td>" for key in ("label", *_ROLES))
        + "</tr>"
        for row in rows
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS)
    counts = [finite_number(held.get(f"num_{key}")) for key in ("texts", *_RIGHT)]
    student = html.escape(str(held.get("student", "the student")))
    note = f"Of {student}: {counts[0] or len(rows):,.0f} texts of the dev set have other answers"
    order = "the largest differences"
    if counts[1] is not None and counts[2] is not None:
        note += f"; the teacher is right on {counts[1]:,.0f}, the student on {counts[2]:,.0f}"
        order = "those that the teacher alone has right before the others"
    return (
        f'<div class="scroll"><table class="differing answers"><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="note">{note}. Shown are the first '
        f"{len(rows):,}: {order}.</p>"
    )


_ROLES = ("teacher", "student")
_COLUMNS = ("Text", "True", "Teacher", "Student")
_RIGHT = ("teacher_right", "student_right")


def _cell(row: dict[str, Any], key: str) -> str:
    return html.escape(str(row.get(key, "")))
