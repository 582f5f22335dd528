"""The texts on which student and teacher differ, in a report.

Takes the parsed `results.json` and returns escaped HTML. It may hold `differing`: {"num_texts",
"num_teacher_right", "num_student_right", "student", "texts": [{"text", "label", "teacher",
"student"}, …]}; predicted numbers have no counts of right ones.
"""

import html
from typing import Any

from tinybert_jax.report.tables import finite_number, mapping_of


def differences_section(results: dict[str, Any]) -> str:
    """A table of texts with both answers; empty where the results hold none."""
    held = mapping_of(results, "differing")
    texts = held.get("texts")
    rows = [row for row in texts if isinstance(row, dict)] if isinstance(texts, list) else []
    if not rows:
        return ""
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(row, key)}</td>" for key in _COLUMNS) + "</tr>"
        for row in rows
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS.values())
    counts = [finite_number(held.get(f"num_{key}")) for key in ("texts", *_RIGHT)]
    student = html.escape(str(held.get("student", "the student")))
    note = f"Of {student}: {counts[0] or len(rows):,.0f} texts of the dev set have other answers"
    order = "the largest differences"
    if counts[1] is not None and counts[2] is not None:
        note += f"; the teacher is right on {counts[1]:,.0f}, the student on {counts[2]:,.0f}"
        order = "those that the teacher alone has right before the others"
    return (
        f'<div class="scroll"><table class="differing"><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="note">{note}. Shown are the first '
        f"{len(rows):,}: {order}.</p>"
    )


_COLUMNS = {"text": "Text", "label": "True", "teacher": "Teacher", "student": "Student"}
_RIGHT = ("teacher_right", "student_right")


def _cell(row: dict[str, Any], key: str) -> str:
    return html.escape(str(row.get(key, "")))
