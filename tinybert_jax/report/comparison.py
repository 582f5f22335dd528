"""The comparison of two models as text and as a page; takes the dict of `tinybert compare`."""

import html
from typing import Any

from tinybert_jax.report.shell import table, whole_page

_COLUMNS = {"row": "Row", "text": "Text", "label": "True", "old": "Old", "new": "New"}
_PAIRS = {"both": "both right", "fixed": "fixed", "broken": "broken", "neither": "both wrong"}


def lines(found: dict[str, Any], num_texts: int = 5) -> list[str]:
    """The comparison as lines for a terminal, with the first texts that broke."""
    pairs, total = found["pairs"], found["num_examples"]
    told = [f"{total:,} examples, {found['task']}"]
    for name, own in found["metrics"].items():
        low, high = own["interval"]
        told.append(
            f"{name:<18} {own['old']:.4f} -> {own['new']:.4f}  {own['difference']:+.4f} "
            f"[{low:+.4f}, {high:+.4f}]"
        )
    told.append(
        f"fixed {pairs['fixed']:,}, broken {pairs['broken']:,}, other answers on "
        f"{found['churn']:.1%} of the examples; McNemar's exact p = {found['mcnemar_p']:.3g}"
    )
    told.append(
        f"broken: {found['broken_share']:.2%}, at most {found['broken_bound']:.2%} with 95 % "
        "confidence"
    )
    told += verdict(found)
    if "by" in found:
        told.append(f"by {found['by']['column']}:")
        told += [
            f"  {row['name']:<24} fixed {row['fixed']:,}, broken {row['broken']:,}, of "
            f"{sum(row[key] for key in _PAIRS):,}"
            for row in found["by"]["groups"]
        ]
    for row in found["broken"][:num_texts]:
        told.append(f"  row {row['row']}: {row['old']} -> {row['new']}: {row['text']}")
    more = pairs["broken"] - num_texts
    if num_texts and more > 0:
        told.append(f"  … and {more:,} more: -o comparison.html shows more of them")
    return told


def verdict(found: dict[str, Any]) -> list[str]:
    """Whether the new model may replace the old one; empty without a limit."""
    limit = found.get("max_regressions")
    if limit is None:
        return []
    if found["is_allowed"]:
        return [f"allowed: the bound is not above {limit:.2%}"]
    if found["num_examples"] < found["needed_examples"]:
        return [
            f"refused: {found['num_examples']:,} examples are too few to tell; with none broken "
            f"the bound is below {limit:.2%} from {found['needed_examples']:,} on"
        ]
    return [f"refused: the bound is above {limit:.2%}"]


def page(found: dict[str, Any]) -> str:
    """The comparison as one HTML page; whatever the texts hold is escaped."""
    head = html.escape(f"{found['old']} and {found['new']}")
    scores = table(
        ("Score", "Old", "New", "Difference", "95 % interval"),
        [
            (
                name,
                f"{own['old']:.4f}",
                f"{own['new']:.4f}",
                f"{own['difference']:+.4f}",
                "{:+.4f} to {:+.4f}".format(*own["interval"]),
            )
            for name, own in found["metrics"].items()
        ],
    )
    sections = [("Scores", scores), ("Examples", _pairs_table(found))]
    if "by" in found:
        rows = [
            (row["name"], *(f"{row[key]:,}" for key in _PAIRS)) for row in found["by"]["groups"]
        ]
        names = (str(found["by"]["column"]), *_PAIRS.values())
        sections.append((f"By {found['by']['column']}", table(names, rows)))
    broken = [tuple(str(row[key]) for key in _COLUMNS) for row in found["broken"]]
    if broken:
        sections.append(("Broken", table(tuple(_COLUMNS.values()), broken)))
    header = f'<div><p class="run">{html.escape(str(found["data"]))}</p><h1>{head}</h1></div>'
    escaped = [(html.escape(title), content) for title, content in sections]
    return whole_page(f"{found['old']} and {found['new']}", header, escaped)


def _pairs_table(found: dict[str, Any]) -> str:
    rows = [(name, f"{found['pairs'][key]:,}") for key, name in _PAIRS.items()]
    notes = [
        f"Other answers on {found['churn']:.1%} of the examples",
        f"McNemar's exact p = {found['mcnemar_p']:.3g}",
        f"broken at most {found['broken_bound']:.2%} with 95 % confidence",
        *verdict(found),
    ]
    note = html.escape("; ".join(notes))
    return f'{table(("Right", "Examples"), rows)}<p class="note">{note}.</p>'
