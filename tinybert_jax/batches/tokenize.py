"""Tokenises text into `TokenRows`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinybert_jax.batches.batch import Targets, TokenRows
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.wordpiece import plain_backend

MIN_TOKENS = 4  # a shorter row, [CLS] one piece [SEP], has nothing to predict from: it is dropped


def tokenize_texts(tokenizer: Any, text: Examples, max_length: int) -> TokenRows:
    """Rows [CLS] text [SEP] or [CLS] text [SEP] text_pair [SEP]; the longer text is cut first."""
    backend = plain_backend(tokenizer)
    backend.enable_truncation(max_length, strategy="longest_first")
    first = [_head(backend, one) for one in text.text]
    pairs: list = first
    if text.text_pair is not None:
        second_texts = [_head(backend, one) for one in text.text_pair]
        pairs = list(zip(first, second_texts, strict=True))
    encoded = backend.encode_batch(pairs)
    second = [len(e.ids) if 1 not in e.type_ids else e.type_ids.index(1) for e in encoded]
    num_truncated = sum(bool(e.overflowing) for e in encoded)
    return _rows([e.ids for e in encoded], second, text.labels, num_truncated)


def tokenize_pairs(
    tokenizer: Any, examples: Examples, max_length: int, *, target_tokenizer: Any = None
) -> TokenRows:
    """Sources [CLS] … [SEP], and targets that a decoder reads from [CLS] and ends with [SEP].

    Both are cut to `max_length` tokens; without targets (`text_pair`) each is empty.
    `target_tokenizer`: of targets with another vocabulary.
    """

    def encode(own: Any, texts: Sequence[str]) -> list[Any]:
        backend = plain_backend(own)
        backend.enable_truncation(max_length)
        return backend.encode_batch([_head(backend, text) for text in texts])

    sources = encode(tokenizer, examples.text)
    targets = encode(target_tokenizer or tokenizer, examples.text_pair or [""] * len(examples.text))
    ends = [bool(own.overflowing) for own in sources]
    cut = [is_cut or bool(own.overflowing) for is_cut, own in zip(ends, targets, strict=True)]
    ids = [own.ids for own in sources]
    rows = _rows(ids, [len(own) for own in ids], None, sum(cut))
    whole = [np.asarray(own.ids, np.int32) for own in targets]
    lengths = [len(own) - 1 for own in whole]
    decoded = Targets(
        inputs=np.concatenate([own[:-1] for own in whole]),
        labels=np.concatenate([own[1:] for own in whole]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
    )
    return rows._replace(targets=decoded)


_LONG = 2**20  # characters; the encoding of a text takes some 180 bytes for each


def _head(backend: Any, text: str) -> str:
    """The text; of a very long one a beginning, up to a blank, that fills a row to be cut.

    The tokens that the row keeps are the same: words are tokenised one by one.
    """
    room = _LONG
    while len(text) > room:
        end = max(text.rfind(blank, 0, room) for blank in " \n\t")
        if end > 0 and backend.encode(text[:end]).overflowing:
            return text[:end]
        room *= 2
    return text


def tokenize_corpus(tokenizer: Any, documents: Sequence[str], max_length: int) -> TokenRows:
    """Cuts every document into rows [CLS] … [SEP] of `max_length`; the last row may be shorter.

    Rows of fewer than `MIN_TOKENS` tokens are dropped. Raises ValueError if no row is left.
    """
    backend = plain_backend(tokenizer)
    cls_id, sep_id, room = tokenizer.cls_token_id, tokenizer.sep_token_id, max_length - 2
    rows = []
    for start in range(0, len(documents), 4096):
        encoded = backend.encode_batch(
            list(documents[start : start + 4096]), add_special_tokens=False
        )
        for document in encoded:
            ids = document.ids
            for begin in range(0, len(ids), room):
                rows.append([cls_id, *ids[begin : begin + room], sep_id])
    rows = [row for row in rows if len(row) >= MIN_TOKENS]
    if not rows:
        raise ValueError(f"corpus: expected text, got none in {len(documents)} documents; add text")
    return _rows(rows, [len(row) for row in rows], None, 0)


def _rows(ids, second, labels, num_truncated: int) -> TokenRows:
    lengths = np.fromiter((len(row) for row in ids), np.int64, len(ids))
    return TokenRows(
        ids=np.concatenate([np.asarray(row, np.int32) for row in ids]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second=np.asarray(second, np.int32),
        labels=labels,
        num_truncated=num_truncated,
    )
