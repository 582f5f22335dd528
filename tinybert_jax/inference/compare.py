"""`tinybert compare`: what a new model mends and breaks of what an old one had right."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinybert_jax.data.examples import Examples
from tinybert_jax.data.tables import format_of, read_table
from tinybert_jax.inference.predict import ScoredFile, score_file
from tinybert_jax.metrics.intervals import interval
from tinybert_jax.metrics.paired import count_pairs, mcnemar, needed_examples, upper_bound
from tinybert_jax.tasks.task import Task

NUM_SHOWN = 50  # broken texts


def compare(
    old: str,
    new: str,
    data: str,
    *,
    split: str | None = None,
    max_length: int | None = None,
    settings: Mapping[str, Any] | None = None,
    by: str | None = None,
    max_regressions: float | None = None,
) -> dict[str, Any]:
    """Both models on the same labelled text: scores, pairs, tests, and the texts that broke.

    An example is right where the whole answer is: the class, all labels, all tags of a sentence, an
    exact match, a number within half a standard deviation of the labels. `by`: a column of the file
    whose values group the examples. `max_regressions`: the largest share of broken examples that is
    allowed; `is_allowed` says whether the 95 % upper bound of the share is below. Raises ValueError
    for models of different tasks, for text that cannot be read, and for `max_regressions` of
    translations.
    """
    sides = [score_file(model, data, split, max_length, settings) for model in (old, new)]
    kinds = [side.task.kind for side in sides]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{new}: expected a model for {kinds[0]}, as {old} is, got {kinds[1]}")
    if max_regressions is not None and sides[0].task.generates:
        raise ValueError(
            f"--max-regressions: expected a task whose answers are right or wrong, got {kinds[0]}; "
            "remove it, and judge by the interval of the scores' difference"
        )
    right = [side.task.is_right(side.scored, side.settings) for side in sides]
    said = [_said(side) for side in sides]
    pairs = count_pairs(*right)
    bound = upper_bound(pairs.broken, pairs.total)
    found: dict[str, Any] = {
        "old": old,
        "new": new,
        "data": data,
        "task": sides[0].task.kind,
        "num_examples": pairs.total,
        "metrics": _metrics(sides),
        "pairs": pairs._asdict(),
        "churn": float(np.mean([one != two for one, two in zip(*said, strict=True)])),
        "mcnemar_p": mcnemar(pairs.fixed, pairs.broken),
        "broken_share": pairs.broken / pairs.total,
        "broken_bound": bound,
    }
    if by is not None:
        found["by"] = {
            "column": by,
            "groups": _groups(_column(data, split, by, settings or {}), *right),
        }
    if max_regressions is not None:
        found |= {
            "max_regressions": max_regressions,
            "is_allowed": bound <= max_regressions,
            "needed_examples": needed_examples(max_regressions),
        }
    return found | {"broken": _broken(sides[0], right, said)}


def _broken(
    old: ScoredFile, right: Sequence[np.ndarray], said: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """The first examples that only the old model has right."""
    places = np.flatnonzero(right[0] & ~right[1])[:NUM_SHOWN].tolist()
    rows = differing_rows(old.task, old.scored.examples, places, said)
    return [{"row": place + 1, **row} for place, row in zip(places, rows, strict=True)]


def differing_rows(
    task: Task, examples: Examples, places: Sequence[int], said: Sequence[Sequence[str]]
) -> list[dict[str, str]]:
    """The examples at these places with their labels, and what two models said of them."""
    truth = task.truth(examples)
    return [
        {
            "text": examples.shown(place, is_pair=not task.generates),
            "label": truth[place],
            "old": said[0][place],
            "new": said[1][place],
        }
        for place in places
    ]


def _said(side: ScoredFile) -> list[str]:
    return [side.task.in_words(answer) for answer in side.task.answers(side.scored, side.settings)]


def _metrics(sides: Sequence[ScoredFile]) -> dict[str, dict[str, Any]]:
    """By metric: both scores, and their difference with a paired 95 % interval."""
    scores, resampled = [], []
    for side in sides:
        outcomes = side.task.outcomes(side.scored, side.settings)
        scores.append(side.task.metrics(outcomes, side.scored.label_names))
        resampled.append(side.task.resampled(outcomes, side.scored.label_names))
    return {
        name: {
            "old": scores[0][name],
            "new": scores[1][name],
            "difference": scores[1][name] - scores[0][name],
            "interval": list(interval(resampled[1][name] - resampled[0][name])),
        }
        for name in scores[0]
        if name in scores[1]
    }


def _column(data: str, split: str | None, by: str, settings: Mapping[str, Any]) -> list[str]:
    form = format_of(data, settings.get("format", "auto"))
    return [str(value) for value in read_table(data, form, split, [by]).columns[by]]


def _groups(values: Sequence[str], old: np.ndarray, new: np.ndarray) -> list[dict[str, Any]]:
    """The pairs of each group, those with most broken first."""
    if len(values) != len(old):
        raise ValueError(
            f"--by: expected a value for each of the {len(old)} examples, got {len(values)}; give "
            "a file with one example a row"
        )
    named = np.array(values)
    groups = [(name, named == name) for name in dict.fromkeys(values)]
    rows = [{"name": n, **count_pairs(old[own], new[own])._asdict()} for n, own in groups]
    return sorted(rows, key=lambda row: -row["broken"])
