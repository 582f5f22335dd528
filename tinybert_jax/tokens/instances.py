"""Makes fixed-width rows of the token ids of documents; pure functions of ids and a generator.

`pack_documents` packs pieces of documents into rows, every token once and every piece a segment.
`pair_instances` makes BERT's pretraining rows, [CLS] A [SEP] B [SEP] with a label.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tinybert_jax.batches.packing import pack
from tinybert_jax.tokens.store import MAX_SEGMENTS, Rows, row_dtype

Ids = list[int]


class Layout(NamedTuple):
    """Width and special tokens of a row."""

    width: int
    cls_id: int
    sep_id: int
    pad_id: int
    dtype: str  # of ids on disk


class Pair(NamedTuple):
    first: Ids
    second: Ids  # may be empty
    label: int  # 1: second from another document, or swapped order; 0: in order; -1: no second


def pack_documents(documents: Sequence[Ids], layout: Layout, rng: np.random.Generator) -> Rows:
    """Cuts documents into [CLS] … [SEP] of at most `width` tokens, packed best fit into rows."""
    room = layout.width - 2
    pieces = [ids[start : start + room] for ids in documents for start in range(0, len(ids), room)]
    lengths = np.array([len(piece) + 2 for piece in pieces], np.int64)
    bins = pack(lengths, layout.width, seed=int(rng.integers(2**31)))
    if bins.shape[1] > MAX_SEGMENTS:
        num_unused = -bins.shape[1] % MAX_SEGMENTS
        bins = np.pad(bins, ((0, 0), (0, num_unused)), constant_values=-1)
        bins = bins.reshape(-1, MAX_SEGMENTS)
        bins = bins[bins[:, 0] >= 0]
    rows = _empty_rows(len(bins), layout)
    for row, piece_numbers in enumerate(rng.permutation(bins).tolist()):
        starts, start = [], 0
        for piece in (pieces[number] for number in piece_numbers if number >= 0):
            starts.append(start)
            end = start + len(piece) + 2
            rows.ids[row, start:end] = [layout.cls_id, *piece, layout.sep_id]
            start = end
        _write_meta(rows, row, starts, length=start, second=start, label=-1)
    return rows


def pair_instances(
    documents: Sequence[Sequence[Ids]],
    layout: Layout,
    rng: np.random.Generator,
    *,
    next_sentence: bool,
    short_share: float,
) -> Rows:
    """BERT's next-sentence pairs (arXiv 1810.04805, appendix A.2) or ALBERT's order (1909.11942).

    `documents`: lists of sentences. `short_share`: share of pairs with a random shorter length.
    If a second part from another document is drawn, the sentences it replaces start the next pair.
    A lone sentence (sentence order) and a lone document (next sentence) have no partner: their rows
    have no second part and label -1.
    """
    room = layout.width - 3
    documents = [_split_long(sentences, room) for sentences in documents]
    pairs: list[Pair] = []
    for number in range(len(documents)):
        pairs.extend(_document_pairs(documents, number, room, rng, next_sentence, short_share))
    rows = _empty_rows(len(pairs), layout)
    for row, number in enumerate(rng.permutation(len(pairs))):
        first, second, label = pairs[number]
        ids = [layout.cls_id, *first, layout.sep_id]
        second_start = len(ids)
        if second:
            ids += [*second, layout.sep_id]
        rows.ids[row, : len(ids)] = ids
        _write_meta(rows, row, [0], length=len(ids), second=second_start, label=label)
    return rows


def _split_long(sentences: Sequence[Ids], room: int) -> list[Ids]:
    """Cuts sentences that are longer than a row; two of the parts fill a row."""
    half = -(-room // 2)
    return [
        sentence[start : start + half] if len(sentence) > room else sentence
        for sentence in sentences
        for start in (range(0, len(sentence), half) if len(sentence) > room else (0,))
    ]


def _document_pairs(
    documents: Sequence[Sequence[Ids]],
    number: int,
    room: int,
    rng: np.random.Generator,
    next_sentence: bool,
    short_share: float,
) -> list[Pair]:
    """The pairs of document `number` in order."""
    sentences, pairs, start = documents[number], [], 0
    while start < len(sentences):
        target = int(rng.integers(2, room + 1)) if rng.random() < short_share else room
        stop, length = start, 0
        while stop < len(sentences) and (length < target or stop == start):
            length += len(sentences[stop])
            stop += 1
        middle = int(rng.integers(start + 1, stop)) if stop - start > 1 else stop
        first, second = _concatenate(sentences[start:middle]), _concatenate(sentences[middle:stop])
        label, next_start = (0 if second else -1), stop
        if next_sentence and len(documents) > 1:
            if not second or rng.random() < 0.5:
                second = _draw_other_document(documents, number, max(1, target - len(first)), rng)
                label, next_start = 1, middle
        elif next_sentence:
            first, second, label = first + second, [], -1
        elif second and rng.random() < 0.5:
            first, second, label = second, first, 1
        pairs.append(Pair(*_truncate(first, second, room, rng), label))
        start = next_start
    return pairs


def _draw_other_document(
    documents: Sequence[Sequence[Ids]], number: int, target: int, rng: np.random.Generator
) -> Ids:
    """Consecutive sentences from a random place of another document, `target` tokens or more.

    Fewer where the document ends.
    """
    other = int(rng.integers(len(documents) - 1))
    sentences = documents[other + (other >= number)]
    sentence, ids = int(rng.integers(len(sentences))), []
    while sentence < len(sentences) and len(ids) < target:
        ids.extend(sentences[sentence])
        sentence += 1
    return ids


def _truncate(first: Ids, second: Ids, room: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """Removes tokens from random ends of the longer part until both parts fit into `room`."""
    excess = len(first) + len(second) - room
    if excess <= 0:
        return first, second
    # Once the longer part is as short as the other, both lose the same number of tokens.
    from_longer = min(excess, abs(len(first) - len(second)))
    from_both = excess - from_longer
    cuts = [from_both // 2, from_both - from_both // 2]
    cuts[int(len(second) > len(first))] += from_longer
    parts = []
    for ids, cut in zip((first, second), cuts, strict=True):
        front = int(rng.binomial(cut, 0.5)) if cut else 0
        parts.append(ids[front : len(ids) - (cut - front)])
    return parts[0], parts[1]


def _concatenate(sentences: Sequence[Ids]) -> Ids:
    return [token for sentence in sentences for token in sentence]


def _empty_rows(num: int, layout: Layout) -> Rows:
    return Rows(
        np.full((num, layout.width), layout.pad_id, layout.dtype),
        np.zeros(num, row_dtype(layout.width)),
    )


def _write_meta(
    rows: Rows, row: int, starts: Sequence[int], *, length: int, second: int, label: int
) -> None:
    rows.meta[row]["length"], rows.meta[row]["second"] = length, second
    rows.meta[row]["label"] = label
    for start in starts:
        rows.meta[row]["starts"][start // 8] |= 128 >> start % 8
