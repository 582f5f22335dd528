"""Vocabularies: trains a WordPiece one, as the tokenizer that Hugging Face users load."""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_ALPHABET = 1000  # characters kept, the commonest first; BERT's own limit


def train_wordpiece(
    documents: Sequence[str], *, vocab_size: int, lowercase: bool = True, max_length: int = 512
) -> Any:
    """A `BertTokenizer` of `vocab_size` pieces; fewer where the text is short.

    Chinese characters become words of their own, accents are stripped when `lowercase` is set, as
    in BERT. The same documents give the same vocabulary.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"tokenizer.vocab_size: expected more than 5 pieces, got {vocab_size}")
    trainer = BertWordPieceTokenizer(lowercase=lowercase)
    alphabet = _alphabet(trainer, documents)
    trainer.train_from_iterator(
        documents,
        vocab_size=max(vocab_size, len(SPECIAL_TOKENS) + 2 * len(alphabet)),
        min_frequency=2,
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        # The library numbers the inner letters in hash order and breaks ties by number, so that
        # each run learns other pieces. Listing them here fixes their numbers.
        special_tokens=[*SPECIAL_TOKENS, *(f"##{letter}" for letter in alphabet)],
        show_progress=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        vocab = Path(folder) / "vocab.txt"
        pieces = trainer.get_vocab()
        vocab.write_text("\n".join(sorted(pieces, key=pieces.__getitem__)) + "\n", encoding="utf-8")
        return BertTokenizer.from_pretrained(
            folder, do_lower_case=lowercase, model_max_length=max_length
        )


def plain_backend(tokenizer: Any) -> Any:
    """A copy of the Rust tokenizer, so that our truncation setting never leaks into a saved one."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


def backend_json(tokenizer: Any) -> str:
    """All that decides what a text becomes, as `tokenizer.json`."""
    return plain_backend(tokenizer).to_str(pretty=True)


def backend_sha256(tokenizer: Any) -> str:
    """What token stores are marked with."""
    return hashlib.sha256(backend_json(tokenizer).encode()).hexdigest()


def is_continuation(tokenizer: Any) -> np.ndarray:
    """Which pieces go on with a word: bool [vocab], True for '##ing'.

    Raises ValueError for a vocabulary without such pieces: its words cannot be told.
    """
    pieces = tokenizer.get_vocab()
    table = np.zeros(max(pieces.values()) + 1, bool)
    table[[number for piece, number in pieces.items() if piece.startswith("##")]] = True
    if not table.any():
        raise ValueError(
            "mask_unit: expected a WordPiece vocabulary, whose pieces within a word begin with "
            "'##', got one without any; set mask_unit: token"
        )
    return table


def _alphabet(trainer: Any, documents: Sequence[str]) -> list[str]:
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(trainer.normalizer.normalize_str(document))
    letters = [letter for letter in counts if not letter.isspace()]
    return sorted(sorted(letters, key=lambda c: (-counts[c], c))[:MAX_ALPHABET])
