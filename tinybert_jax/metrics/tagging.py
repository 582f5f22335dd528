"""Entities in tag sequences: scores, and reading and writing tags in three schemes.

A tag is O (outside of entities) or a prefix and a kind, as in B-PER; a sentence has one tag per
word. Knows nothing of words, word pieces, models or files.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

Scheme = Literal["iob1", "iob2", "bioes"]

SCHEME_RULES: dict[Scheme, str] = {
    "iob1": "I-kind on the words of an entity, B-kind only on a first word that follows an entity",
    "iob2": "B-kind on the first word of an entity, I-kind on the other words",
    "bioes": "S-kind on an entity of one word, else B-kind first, E-kind last and I-kind between",
}


class Entity(NamedTuple):
    """The words from `start` to `end` (exclusive) of a sentence, and the kind of the entity."""

    start: int
    end: int
    kind: str


def entity_scores(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Precision, recall and F1 of entities over all kinds, and the accuracy of tags, as fractions.

    As in conlleval (CoNLL-2003): an entity is correct if start, end and kind all agree, and a
    quotient with denominator 0 is 0.0. With gold and predicted tags of different schemes the
    accuracy means little. Raises ValueError for lengths that differ, no words, or bad tags.
    """
    return scores_of_counts(count_entities(gold, predicted, _kinds(gold, predicted)))


def count_entities(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], kinds: Sequence[str]
) -> Int[np.ndarray, "sentences columns"]:
    """The counts of each sentence: words, words with an equal tag, and three counts per kind.

    Those are the correct, predicted and gold entities. Raises as `entity_scores` does.
    """
    _require_equal_lengths(gold, predicted)
    places = {kind: 2 + 3 * number for number, kind in enumerate(kinds)}
    counts = np.zeros((len(gold), 2 + 3 * len(kinds)), np.int64)
    for row, true, guess in zip(counts, gold, predicted, strict=True):
        row[0], row[1] = len(true), sum(map(str.__eq__, true, guess))
        is_gold, is_predicted = set(entities_of(true)), set(entities_of(guess))
        for offset, entities in enumerate((is_gold & is_predicted, is_predicted, is_gold)):
            for entity in entities:
                row[places[entity.kind] + offset] += 1
    return counts


def scores_of_counts(counts: Int[np.ndarray, "sentences columns"]) -> dict[str, float]:
    """`entity_scores` of the sentences that `count_entities` counted."""
    num_words, num_equal, *by_kind = counts.sum(axis=0).tolist()
    correct, found, support = (sum(by_kind[offset::3]) for offset in range(3))
    return _fractions(correct, found, support) | {"accuracy": num_equal / max(num_words, 1)}


def entity_scores_per_kind(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, dict[str, float | int]]:
    """Kind -> precision, recall, f1, support (gold entities) and predicted (predicted entities).

    The kinds are those of gold or predicted entities, sorted. Raises as `entity_scores` does.
    """
    kinds = _kinds(gold, predicted)
    totals = count_entities(gold, predicted, kinds).sum(axis=0)[2:].reshape(-1, 3).tolist()
    return {
        kind: {**_fractions(*counts), "support": counts[2], "predicted": counts[1]}
        for kind, counts in zip(kinds, totals, strict=True)
    }


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """The entities that conlleval finds in the tags of one sentence, also in ill-formed tags.

    One rule holds for all three schemes (conlleval's startOfChunk and endOfChunk): every word whose
    tag is not O is in an entity, and a new entity begins at B- and S-, after E- and S-, and where
    the kind changes. Raises ValueError for a tag with an unknown prefix or without a kind.
    """
    entities: list[Entity] = []
    start, last_prefix, last_kind = 0, "O", ""
    for position, tag in enumerate([*tags, "O"]):
        prefix, kind = _split(tag)
        if kind != last_kind or prefix in ("B", "S") or last_prefix in ("E", "S"):
            if last_prefix != "O":
                entities.append(Entity(start, position, last_kind))
            start = position
        last_prefix, last_kind = prefix, kind
    return entities


def read_tags(tags: Sequence[str], scheme: Scheme) -> list[Entity]:
    """The entities of one well-formed sentence; ValueError where the scheme does not allow a tag.

    The schemes are those of Tjong Kim Sang and Veenstra (1999), with kinds; `bioes` marks the last
    word of an entity too.
    """
    mistakes = scheme_mistakes(tags, scheme)
    if mistakes:
        shown = ", ".join(f"{got} at position {position}" for position, got in mistakes[:5])
        shown += ", …" * (len(mistakes) > 5)
        raise ValueError(
            f"expected {scheme} tags ({SCHEME_RULES[scheme]}), got others at {len(mistakes)} of "
            f"{len(tags)} positions ({shown}); correct them or name their scheme"
        )
    return entities_of(tags)


def write_tags(entities: Iterable[Entity], length: int, scheme: Scheme) -> list[str]:
    """The tags of a sentence of `length` words; ValueError for entities that do not fit.

    `iob1` writes B- only after an adjacent entity of the same kind, as CoNLL-2003 does.
    """
    assert scheme in SCHEME_RULES, scheme
    tags, before = ["O"] * length, Entity(0, 0, "")
    for entity in sorted(entities):
        start, end, kind = entity
        if not before.end <= start < end <= length or not is_tag(f"B-{kind}"):
            raise ValueError(
                f"expected entities with a kind, of one or more of {length} words, without "
                f"overlaps, got {entity} after {before}; correct start, end or kind"
            )
        size, is_split = end - start, before.end == start and before.kind == kind
        first = "I" if scheme == "iob1" and not is_split else "B"
        prefixes = first + "I" * (size - 1)
        if scheme == "bioes":
            prefixes = "S" if size == 1 else prefixes[:-1] + "E"
        tags[start:end] = [f"{prefix}-{kind}" for prefix in prefixes]
        before = entity
    return tags


def convert_tags(tags: Sequence[str], source: Scheme, target: Scheme) -> list[str]:
    """The same entities in another scheme; ValueError where `source` does not allow a tag."""
    return write_tags(read_tags(tags, source), len(tags), target)


def detect_scheme(sentences: Iterable[Sequence[str]]) -> Scheme:
    """`bioes` if any tag has E- or S-, `iob2` if every entity begins with B-, else `iob1`.

    Does not check that the tags are well-formed: use `scheme_mistakes`. Sentences without entities
    are `iob2`. Raises ValueError for a tag with an unknown prefix or no kind.
    """
    sentences = list(sentences)
    if {_split(tag)[0] for tags in sentences for tag in tags} & {"E", "S"}:
        return "bioes"
    firsts = {tags[entity.start][0] for tags in sentences for entity in entities_of(tags)}
    return "iob2" if firsts <= {"B"} else "iob1"


def scheme_mistakes(tags: Sequence[str], scheme: Scheme) -> list[tuple[int, str]]:
    """Positions and descriptions of the tags that the scheme does not allow; [] if well-formed."""
    assert scheme in SCHEME_RULES, scheme
    allowed = "OBIES" if scheme == "bioes" else "OBI"
    mistakes, before = [], "O"
    for position, tag in enumerate(tags):
        if not is_tag(tag) or tag[0] not in allowed:
            mistakes.append((position, repr(tag)))
            before = "O"
            continue
        if not _may_follow(tag, before, scheme):
            neighbour = f"after {tags[position - 1]!r}" if position else "at the start"
            mistakes.append((position, f"{tag!r} {neighbour}"))
        before = tag
    if not _may_follow("O", before, scheme):
        mistakes.append((len(tags) - 1, f"{before!r} at the end"))
    return mistakes


@functools.lru_cache
def is_tag(tag: str) -> bool:
    """Whether the tag is O, or B-, I-, E- or S- and a kind."""
    return re.fullmatch(r"O|[BIES]-(?=\S).+", tag) is not None


@functools.lru_cache  # few pairs of tags, many words
def _may_follow(tag: str, before: str, scheme: Scheme) -> bool:
    (prefix, kind), (prefix_before, kind_before) = _split(tag), _split(before)
    if scheme == "iob1":
        return prefix != "B" or prefix_before != "O"
    if scheme == "iob2":
        return prefix != "I" or kind == kind_before
    is_inside = prefix in ("I", "E")
    return is_inside == (prefix_before in ("B", "I")) and (not is_inside or kind == kind_before)


@functools.lru_cache
def _split(tag: str) -> tuple[str, str]:
    """Prefix and kind; a kind may hold hyphens (B-creative-work)."""
    if not is_tag(tag):
        raise ValueError(
            f"expected O, or B-, I-, E- or S- and a kind, got {tag!r}; correct the tag, or check "
            "that the column holds entity tags"
        )
    return tag[0], tag[2:]


def _kinds(*sides: Sequence[Sequence[str]]) -> list[str]:
    """The kinds of all entities of gold and predicted tags, sorted."""
    return sorted({entity.kind for side in sides for tags in side for entity in entities_of(tags)})


def _fractions(correct: int, found: int, support: int) -> dict[str, float]:
    return {
        "precision": correct / max(found, 1),
        "recall": correct / max(support, 1),
        "f1": 2 * correct / max(found + support, 1),
    }


def _require_equal_lengths(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> None:
    if len(gold) != len(predicted):
        raise ValueError(
            f"expected predicted tags for {len(gold)} gold sentences, got {len(predicted)}; "
            "predict the whole split, without padded rows"
        )
    pairs = enumerate(zip(gold, predicted, strict=True))
    wrong = [(i, len(p), len(g)) for i, (g, p) in pairs if len(g) != len(p)]
    if wrong:
        shown = ", ".join(
            f"sentence {i}: {found} instead of {size}" for i, found, size in wrong[:5]
        )
        raise ValueError(
            f"expected one predicted tag per gold tag, got other numbers in {len(wrong)} of "
            f"{len(gold)} sentences ({shown}{', …' * (len(wrong) > 5)}); predict a tag for every "
            "word, also for words that were cut off, and none for padding"
        )
    if not any(gold):
        raise ValueError("expected at least one word, got none; check the evaluation split")
