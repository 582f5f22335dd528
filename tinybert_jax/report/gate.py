"""What an updated model mends and breaks of the old one: lines, a sentence, a section, a table.

Takes `results.json`, whose entry `update` holds {"old": the old model, "max_regressions", "dev":
{"old" and "new" rows: {"both", "fixed", "broken", "neither", "broken_bound", "mcnemar_p", …}},
"reasons": why the model is refused, "broken": [{"text", "label", "old", "new"}, …]}.
"""

import html
from collections.abc import Mapping
from typing import Any, NamedTuple

from tinybert_jax.report.shell import table
from tinybert_jax.report.tables import finite_number, mapping_of

_COUNTS = ("both", "fixed", "broken", "neither", "broken_bound", "mcnemar_p")
_ANSWERS = ("text", "label", "old", "new")
COLUMNS = ("dev rows", "right before", "right after", "fixed", "broken", "broken at most", "p")


class Side(NamedTuple):
    """The counts of the old or the new rows of dev."""

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
        return (f"{self.total:,} {self.name}", *counts, f"{self.bound:.2%}", f"{self.p:.2g}")


def sides_of(results: Mapping[str, Any]) -> list[Side]:
    """The old and the new rows; empty for a run that is no update."""
    dev, found = mapping_of(mapping_of(dict(results), "update"), "dev"), []
    for name in ("old", "new"):
        numbers = [finite_number(mapping_of(dev, name).get(key)) for key in _COUNTS]
        known = [number for number in numbers if number is not None]
        if len(known) == len(_COUNTS):
            both, fixed, broken, neither = (int(number) for number in known[:4])
            total = both + fixed + broken + neither
            counts = (total, both + broken, both + fixed, fixed, broken)
            found.append(Side(name, *counts, known[4], known[5]))
    return found


def gate_lines(results: Mapping[str, Any]) -> list[str]:
    """The counts for the console; empty for a run that is no update."""
    return [
        f"gate: {side.name} rows of dev: of {side.total:,} the old model has {side.before:,} right "
        f"and the new one {side.after:,}; {side.fixed:,} fixed, {side.broken:,} broken (at most "
        f"{side.bound:.2%} with 95 % confidence); McNemar p = {side.p:.2g}"
        for side in sides_of(results)
    ]


def gate_sentence(results: Mapping[str, Any]) -> str:
    """The result of an update as HTML; empty for another run."""
    sides = {side.name: side for side in sides_of(results)}
    if len(sides) < 2:
        return ""
    old, new = sides["old"], sides["new"]
    sentence = (
        f'The new model has <b class="student">{new.after:,} of {new.total:,}</b> new rows right, '
        f"{new.before:,} before, and breaks {old.broken:,} of {old.total:,} old ones"
    )
    return f"{sentence}: it is refused." if _reasons(results) else f"{sentence}."


def gate_section(results: dict[str, Any]) -> str:
    """The counts, the verdict and the old rows that broke; empty for a run that is no update."""
    sides, reasons = sides_of(results), _reasons(results)
    if not sides:
        return ""
    verdict = "The gate passed."
    if reasons:
        verdict = f"Refused: {'; '.join(map(str, reasons))}; the model is not exported."
    old = mapping_of(results, "update").get("old", "")
    note = html.escape(
        f"{verdict} Right before: by {old}; right after: by the new model. The bound holds with 95 "
        "% confidence; p is McNemar’s."
    )
    counts = table([name.capitalize() for name in COLUMNS], [side.cells for side in sides])
    return f'{counts}<p class="note">{note}</p>{_broken(results, sides[0].broken)}'


def _broken(results: dict[str, Any], count: int) -> str:
    """The rows that results.json holds of the `count` old ones that broke."""
    held = mapping_of(results, "update").get("broken")
    rows = [row for row in held if isinstance(row, dict)] if isinstance(held, list) else []
    if not rows:
        return ""
    cells = [[str(row.get(key, "")) for key in _ANSWERS] for row in rows]
    texts = table(["Text", "True", "Old model", "New model"], cells, "differing answers")
    return f'{texts}<p class="note">{len(rows):,} of the {count:,} old rows that broke.</p>'


def _reasons(results: Mapping[str, Any]) -> list[Any]:
    reasons = mapping_of(dict(results), "update").get("reasons")
    return reasons if isinstance(reasons, list) else []
