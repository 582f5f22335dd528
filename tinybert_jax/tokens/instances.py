"""Token ids of documents -> fixed-width rows. Pure: lists and a generator in, arrays out.

Two forms. `pack_documents`: every token once, several pieces of documents a row, each a segment of
its own. `pair_instances`: the rows BERT was trained on, [CLS] A [SEP] B [SEP] with a label.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tinybert_jax.batches.packing import pack
from tinybert_jax.tokens.store import MAX_SEGMENTS, Rows, row_dtype

Ids = list[int]


class Layout(NamedTuple):
    """What a row is made of."""

    width: int
    cls_id: int
    sep_id: int
    pad_id: int
    dtype: str  # of ids on disk


class Pair(NamedTuple):
    first: Ids
    second: Ids  # empty: there is none
    label: int  # 1: second is foreign, or the order is swapped; -1 without second


def pack_documents(documents: Sequence[Ids], layout: Layout, rng: np.random.Generator) -> Rows:
    """Cuts documents into [CLS] … [SEP] of at most `width` and fills rows with them, best fit."""
    room = layout.width - 2
    pieces = [ids[at : at + room] for ids in documents for at in range(0, len(ids), room)]
    lengths = np.array([len(piece) + 2 for piece in pieces], np.int64)
    bins = pack(lengths, layout.width, seed=int(rng.integers(2**31)))
    if bins.shape[1] > MAX_SEGMENTS:
        spare = -bins.shape[1] % MAX_SEGMENTS
        bins = np.pad(bins, ((0, 0), (0, spare)), constant_values=-1).reshape(-1, MAX_SEGMENTS)
        bins = bins[bins[:, 0] >= 0]
    rows = _empty(len(bins), layout)
    for row, members in enumerate(rng.permutation(bins).tolist()):
        starts, at = [], 0
        for piece in (pieces[member] for member in members if member >= 0):
            starts.append(at)
            end = at + len(piece) + 2
            rows.ids[row, at:end] = [layout.cls_id, *piece, layout.sep_id]
            at = end
        _describe(rows, row, starts, length=at, second=at, label=-1)
    return rows


def pair_instances(
    documents: Sequence[Sequence[Ids]],
    layout: Layout,
    rng: np.random.Generator,
    *,
    next_sentence: bool,
    short_share: float,
) -> Rows:
    """BERT's instances (arXiv 1810.04805, appendix A.2) or ALBERT's sentence order (1909.11942).

    `documents` are lists of sentences. Where a foreign second part is drawn, the sentences that it
    displaces begin the next instance. A part that has no partner (one sentence for the order, one
    document alone in its chunk) is kept as a row without a second part and label -1.
    """
    room = layout.width - 3
    documents = [_split_long(sentences, room) for sentences in documents]
    pairs: list[Pair] = []
    for number in range(len(documents)):
        pairs.extend(_pairs_of(documents, number, room, rng, next_sentence, short_share))
    rows = _empty(len(pairs), layout)
    for row, place in enumerate(rng.permutation(len(pairs))):
        first, second, label = pairs[place]
        ids = [layout.cls_id, *first, layout.sep_id]
        begin = len(ids)
        if second:
            ids += [*second, layout.sep_id]
        rows.ids[row, : len(ids)] = ids
        _describe(rows, row, [0], length=len(ids), second=begin, label=label)
    return rows


def _split_long(sentences: Sequence[Ids], room: int) -> list[Ids]:
    """A sentence that no row can hold becomes several, two of which fill a row."""
    half = -(-room // 2)
    return [
        sentence[at : at + half] if len(sentence) > room else sentence
        for sentence in sentences
        for at in (range(0, len(sentence), half) if len(sentence) > room else (0,))
    ]


def _pairs_of(
    documents: Sequence[Sequence[Ids]],
    number: int,
    room: int,
    rng: np.random.Generator,
    next_sentence: bool,
    short_share: float,
) -> list[Pair]:
    sentences, pairs, at = documents[number], [], 0
    while at < len(sentences):
        target = int(rng.integers(2, room + 1)) if rng.random() < short_share else room
        stop, length = at, 0
        while stop < len(sentences) and (length < target or stop == at):
            length += len(sentences[stop])
            stop += 1
        middle = int(rng.integers(at + 1, stop)) if stop - at > 1 else stop
        first, second = _joined(sentences[at:middle]), _joined(sentences[middle:stop])
        label, after = (0 if second else -1), stop
        if next_sentence and len(documents) > 1:
            if not second or rng.random() < 0.5:
                second = _foreign(documents, number, max(1, target - len(first)), rng)
                label, after = 1, middle
        elif next_sentence:
            first, second, label = first + second, [], -1
        elif second and rng.random() < 0.5:
            first, second, label = second, first, 1
        pairs.append(Pair(*_truncated(first, second, room, rng), label))
        at = after
    return pairs


def _foreign(
    documents: Sequence[Sequence[Ids]], number: int, target: int, rng: np.random.Generator
) -> Ids:
    """Sentences of another document, from a random one on, until there are `target` tokens."""
    other = int(rng.integers(len(documents) - 1))
    sentences = documents[other + (other >= number)]
    at, ids = int(rng.integers(len(sentences))), []
    while at < len(sentences) and len(ids) < target:
        ids.extend(sentences[at])
        at += 1
    return ids


def _truncated(first: Ids, second: Ids, room: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """Cuts the longer part, by turns at a random end, until both fit."""
    excess = len(first) + len(second) - room
    if excess <= 0:
        return first, second
    # The longer one is cut down to the other's length before both are cut alike.
    from_longer = min(excess, abs(len(first) - len(second)))
    alike = excess - from_longer
    cuts = [alike // 2, alike - alike // 2]
    cuts[int(len(second) > len(first))] += from_longer
    parts = []
    for ids, cut in zip((first, second), cuts, strict=True):
        front = int(rng.binomial(cut, 0.5)) if cut else 0
        parts.append(ids[front : len(ids) - (cut - front)])
    return parts[0], parts[1]


def _joined(sentences: Sequence[Ids]) -> Ids:
    return [token for sentence in sentences for token in sentence]


def _empty(num: int, layout: Layout) -> Rows:
    return Rows(
        np.full((num, layout.width), layout.pad_id, layout.dtype),
        np.zeros(num, row_dtype(layout.width)),
    )


def _describe(
    rows: Rows, row: int, starts: Sequence[int], *, length: int, second: int, label: int
) -> None:
    rows.meta[row]["length"], rows.meta[row]["second"] = length, second
    rows.meta[row]["label"] = label
    for start in starts:
        rows.meta[row]["starts"][start // 8] |= 128 >> start % 8
