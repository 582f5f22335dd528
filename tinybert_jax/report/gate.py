"""What an updated model mends and breaks of the old one: lines, a sentence, a section, a table.

Takes `results.json`, whose entry `update` holds {"old": the old model, "max_regressions", "dev":
{"old", "new" and maybe "new_labels" rows: {"both", "fixed", "broken", "neither", "broken_bound",
"mcnemar_p", …}}, "reasons": why the model is refused, "broken" and "wrong": [{"text", "label",
"old", "new"}, …]}.
"""

import html
from collections.abc import Mapping
from typing import Any, NamedTuple

from tinybert_jax.report.shell import table
from tinybert_jax.report.tables import finite_number, mapping_of

_COUNTS = ("both", "fixed", "broken", "neither", "broken_bound", "mcnemar_p")
# Key in `dev` -> how it is told; the last is a part of the second.
_SIDES = {"old": "old", "new": "new", "new_labels": "new-label"}
_CHANCE = 0.05  # p-value from which a difference may be chance
_ANSWERS = ("text", "label", "old", "new")
COLUMNS = (
    "dev rows",
    "right before",
    "right after",
    "fixed",
    "broken",
    "broken at most",
    "McNemar's p",
)


class Side(NamedTuple):
    """The counts of the old rows of dev, of the new ones, or of those with new labels."""

    name: str
    total: int
    before: int  # right by the old model
    after: int  # right by the new one
    fixed: int
    broken: int
    bound: float  # 95 % upper bound of the share that is broken
    p: float  # McNemar's

    @property
    def cells(self) -> tuple[str, ...]:
        """Those of the columns `COLUMNS`."""
        counts = (f"{count:,}" for count in (self.before, self.after, self.fixed, self.broken))
        return (
            f"{self.total:,} {_SIDES[self.name]}",
            *counts,
            f"{self.bound:.2%}",
            f"{self.p:.2g}",
        )


def sides_of(results: Mapping[str, Any]) -> list[Side]:
    """Old rows, new rows, and those with new labels; empty for a run that is no update."""
    dev, found = mapping_of(mapping_of(dict(results), "update"), "dev"), []
    for name in _SIDES:
        numbers = [finite_number(mapping_of(dev, name).get(key)) for key in _COUNTS]
        known = [number for number in numbers if number is not None]
        if len(known) == len(_COUNTS):
            both, fixed, broken, neither = (int(number) for number in known[:4])
            total = both + fixed + broken + neither
            counts = (total, both + broken, both + fixed, fixed, broken)
            found.append(Side(name, *counts, known[4], known[5]))
    return found


def gate_lines(results: Mapping[str, Any]) -> list[str]:
    """Counts and verdict for the console; empty for a run that is no update."""
    told = [
        f"gate: {_SIDES[side.name]} rows of dev: of {side.total:,} the old model has "
        f"{side.before:,} right and the new one {side.after:,}; {side.fixed:,} fixed, "
        f"{side.broken:,} broken (at most {side.bound:.2%} with 95 % confidence); McNemar p = "
        f"{side.p:.2g}"
        for side in sides_of(results)
    ]
    return [*told, f"gate: {_verdict(results)}"] if told else []


def _verdict(results: Mapping[str, Any]) -> str:
    reasons, sides = _reasons(results), {side.name: side for side in sides_of(results)}
    if reasons:
        return f"refused, not exported: {'; '.join(map(str, reasons))}"
    limit = finite_number(mapping_of(dict(results), "update").get("max_regressions"))
    told = "passed" + ("" if limit is None else f", as at most {limit:.2%} may be broken")
    new = sides.get("new")
    if new and new.after > new.before and new.p >= _CHANCE:
        told += f"; what it gains on new rows may be chance (p = {new.p:.2g})"
    return told


def gate_sentence(results: Mapping[str, Any]) -> str:
    """The result of an update as HTML; empty for another run."""
    sides = {side.name: side for side in sides_of(results)}
    if not {"old", "new"} <= set(sides):
        return ""
    old, new = sides["old"], sides["new"]
    sentence = (
        f'The new model has <b class="student">{new.after:,} of {new.total:,}</b> new rows right, '
        f"{new.before:,} before, and breaks {old.broken:,} of {old.total:,} old ones"
    )
    return f"{sentence}: it is refused." if _reasons(results) else f"{sentence}."


def gate_section(results: dict[str, Any]) -> str:
    """The counts, the verdict and the rows that are wrong now; empty where it is no update."""
    sides = sides_of(results)
    if not sides:
        return ""
    old = mapping_of(results, "update").get("old", "")
    note = html.escape(
        f"The gate: {_verdict(results)}. Right before: by {old}; right after: by the new model. "
        "The bound holds with 95 % confidence. Old rows that the old model was trained on flatter "
        "it; a comparison of both models on a file of its own does not."
    )
    counts = table([name[0].upper() + name[1:] for name in COLUMNS], [side.cells for side in sides])
    named = {side.name: side for side in sides}
    texts = ""
    if "old" in named:
        texts += _rows(results, "broken", f"{named['old'].broken:,} old rows that broke")
    if "new" in named:
        wrong = named["new"].total - named["new"].after
        texts += _rows(results, "wrong", f"{wrong:,} new rows that the new model has wrong")
    return f'{counts}<p class="note">{note}</p>{texts}'


def _rows(results: dict[str, Any], name: str, all_of_them: str) -> str:
    """The rows that results.json holds under `name`, and of how many."""
    held = mapping_of(results, "update").get(name)
    rows = [row for row in held if isinstance(row, dict)] if isinstance(held, list) else []
    if not rows:
        return ""
    cells = [[str(row.get(key, "")) for key in _ANSWERS] for row in rows]
    texts = table(["Text", "True", "Old model", "New model"], cells, "differing answers")
    return f'{texts}<p class="note">{len(rows):,} of the {all_of_them}.</p>'


def _reasons(results: Mapping[str, Any]) -> list[Any]:
    reasons = mapping_of(dict(results), "update").get("reasons")
    return reasons if isinstance(reasons, list) else []
