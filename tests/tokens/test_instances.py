"""instances: packing keeps every token once; pairs are what their labels say."""

import numpy as np
import pytest

from tinybert_jax.tokens.instances import Layout, pack_documents, pair_instances
from tinybert_jax.tokens.store import MAX_SEGMENTS

CLS, SEP, PAD = 1, 2, 0
LAYOUT = Layout(width=32, cls_id=CLS, sep_id=SEP, pad_id=PAD, dtype="<u2")


def _segments(rows):
    """Yields (row, ids) of every segment, found by the start bits."""
    for row, (ids, meta) in enumerate(zip(rows.ids, rows.meta, strict=True)):
        starts = np.flatnonzero(np.unpackbits(meta["starts"])).tolist()
        assert (ids[meta["length"] :] == PAD).all()
        for start, stop in zip(starts, [*starts[1:], int(meta["length"])], strict=True):
            yield row, ids[start:stop].tolist()


def _parts(rows):
    """Yields (first, second, label) of every row of a pair."""
    for ids, meta in zip(rows.ids.tolist(), rows.meta, strict=True):
        length, second = int(meta["length"]), int(meta["second"])
        assert ids[0] == CLS and ids[second - 1] == SEP and ids[length - 1] == SEP
        yield ids[1 : second - 1], ids[second : length - 1], int(meta["label"])


def test_packing_keeps_every_token_once_and_segments_apart():
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 999, n).tolist() for n in rng.integers(1, 100, 300)]
    rows = pack_documents(documents, LAYOUT, rng)
    room = LAYOUT.width - 2
    pieces = [d[at : at + room] for d in documents for at in range(0, len(d), room)]
    found = [ids for _, ids in _segments(rows)]
    assert sorted(found) == sorted([CLS, *piece, SEP] for piece in pieces)
    assert rows.meta["length"].sum() / rows.ids.size > 0.99
    assert set(rows.meta["label"].tolist()) == {-1}


def test_a_row_has_at_most_max_segments():
    layout = LAYOUT._replace(width=1200)
    rows = pack_documents([[7]] * 1000, layout, np.random.default_rng(0))
    per_row = np.bincount([row for row, _ in _segments(rows)])
    assert per_row.sum() == 1000 and per_row.max() <= MAX_SEGMENTS


def _numbered(num_documents=200, num_sentences=30):
    """Documents whose tokens count up from 10, and the number of the document of every token."""
    rng = np.random.default_rng(3)
    documents, document_of = [], {}
    token = 10
    for number in range(num_documents):
        document = []
        for length in rng.integers(2, 12, num_sentences):
            document.append(list(range(token, token + length)))
            document_of |= dict.fromkeys(range(token, token + length), number)
            token += length
        documents.append(document)
    return documents, document_of


def _pair(documents, **options):
    settings = {"next_sentence": True, "short_share": 0.1} | options
    layout = LAYOUT._replace(width=64, dtype="<u4")
    return pair_instances(documents, layout, np.random.default_rng(5), **settings)


def test_next_sentence_labels_are_0_only_for_the_following_text():
    documents, document_of = _numbered(60, 300)
    labels = []
    for first, second, label in _parts(_pair(documents)):
        assert len({document_of[t] for t in first}) == len({document_of[t] for t in second}) == 1
        assert first == list(range(first[0], first[0] + len(first)))
        is_same = document_of[first[0]] == document_of[second[0]]
        assert is_same == (label == 0)
        if is_same:  # truncation may have removed tokens between the parts
            assert first[-1] < second[0] <= first[-1] + 24
        labels.append(label)
    share = np.mean(labels)
    # Half of the draws; a lone last sentence always gets a second part from another document.
    assert abs(share - 0.5) < 3 * 0.5 / np.sqrt(len(labels)) + 60 / len(labels)


def test_sentence_order_swaps_half_of_the_pairs_and_repeats_no_token():
    documents, _ = _numbered()
    seen, labels = [], []
    for first, second, label in _parts(_pair(documents, next_sentence=False)):
        if label == -1:
            assert not second
        else:
            assert (first[0] > second[0]) == (label == 1)
            labels.append(label)
        seen += [*first, *second]
    assert len(seen) == len(set(seen))
    total = sum(len(s) for d in documents for s in d)
    assert len(seen) > 0.9 * total  # truncation removed the others
    assert abs(np.mean(labels) - 0.5) < 3 * 0.5 / np.sqrt(len(labels))


def test_short_share_is_the_share_of_short_pairs():
    documents, _ = _numbered(20, 300)  # few documents: the last pair of a document is short too
    short = {}
    for share in (0.0, 0.1, 1.0):
        lengths = _pair(documents, short_share=share, next_sentence=False).meta["length"]
        short[share] = np.mean(lengths < 48)
    assert short[0.0] < 0.06 < short[0.1] < 0.25 < 0.6 < short[1.0]


def test_a_single_document_gives_no_next_sentence_labels():
    documents, _ = _numbered(1)
    assert {label for *_, label in _parts(_pair(documents))} == {-1}


def test_a_sentence_longer_than_a_row_is_split():
    document = [list(range(10, 1000))]
    seen = [t for a, b, _ in _parts(_pair([document], next_sentence=False)) for t in [*a, *b]]
    # Two halves of an odd number of tokens have one token too many.
    assert len(set(seen)) == len(seen) > 0.97 * len(document[0])


@pytest.mark.parametrize("next_sentence", [True, False])
def test_no_documents_give_no_rows(next_sentence):
    assert len(_pair([], next_sentence=next_sentence).ids) == 0
    assert len(pack_documents([], LAYOUT, np.random.default_rng(0)).ids) == 0
