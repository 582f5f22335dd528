"""WordPiece vocabularies, trained or extended, as tokenizers that Hugging Face users load."""

import hashlib
import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinybert_jax.data import records
from tinybert_jax.data.errors import fail

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_ALPHABET = 1000  # letters kept, the commonest first; BERT's own limit
MIN_COUNT = 2  # of a piece


def train_wordpiece(
    documents: Sequence[str], *, vocab_size: int, lowercase: bool = True, max_length: int = 512
) -> Any:
    """A `BertTokenizer` of `vocab_size` pieces; fewer where the text is short.

    Chinese characters become words of their own, accents are stripped when `lowercase` is set, as
    in BERT. The commonest letters have a piece each at the start of a word and within one, as far
    as there is room, then the commonest Chinese characters; longer pieces get the rest. The same
    documents give the same vocabulary.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"tokenizer.vocab_size: expected more than 5 pieces, got {vocab_size}")
    trainer = BertWordPieceTokenizer(lowercase=lowercase)
    letters, ideographs = _alphabet(trainer, documents, vocab_size - len(SPECIAL_TOKENS))
    alphabet = sorted([*letters, *ideographs])
    trainer.train_from_iterator(
        documents,
        vocab_size=vocab_size,
        min_frequency=MIN_COUNT,
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        # The library numbers the inner letters in hash order and breaks ties by number, so that
        # each run learns other pieces. Listing them here fixes their numbers.
        special_tokens=[*SPECIAL_TOKENS, *(f"##{letter}" for letter in sorted(letters))],
        show_progress=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        vocab = Path(folder) / "vocab.txt"
        pieces = trainer.get_vocab()
        vocab.write_text("\n".join(sorted(pieces, key=pieces.__getitem__)) + "\n", encoding="utf-8")
        return BertTokenizer.from_pretrained(
            folder, do_lower_case=lowercase, model_max_length=max_length
        )


def split_words(
    tokenizer: Any, texts: Iterable[str], *, num_words: int, min_count: int
) -> dict[str, list[int]]:
    """The commonest words that a WordPiece tokenizer has no piece for -> the pieces it makes.

    At most `num_words`, each `min_count` times or more in the texts; of equally common ones those
    first in the alphabet. A word with a character that no piece has is one [UNK].
    """
    backend = plain_backend(tokenizer)
    longest = backend.model.max_input_chars_per_word  # beyond it a word is never looked up
    counts: Counter[str] = Counter()
    for text in texts:
        normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
        counts.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
    known = backend.get_vocab()
    frequent = sorted((-count, word) for word, count in counts.items() if count >= min_count)
    new = (word for _, word in frequent if word not in known and len(word) <= longest)
    return {
        word: [piece.id for piece in backend.model.tokenize(word)]
        for word in itertools.islice(new, num_words)
    }


def check_extendable(tokenizer: Any) -> None:
    """Refuses what is no WordPiece, and numbers with gaps: a new piece could take a used one."""
    kind = json.loads(plain_backend(tokenizer).to_str())["model"]["type"]
    if kind != "WordPiece":
        raise ValueError(f"tokenizer: expected a WordPiece one, got {kind}, which has no words")
    numbers = tokenizer.get_vocab().values()
    if set(numbers) != set(range(len(numbers))):
        raise ValueError(
            f"tokenizer: expected its {len(numbers)} pieces to be numbered from 0 on, got numbers "
            f"up to {max(numbers)}: a piece is there twice; train a vocabulary of your own"
        )


def with_words(tokenizer: Any, numbers: Mapping[str, int]) -> Any:
    """The tokenizer with these words as further pieces; all others keep their numbers."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        state = json.loads(file.read_text(encoding="utf-8"))
        # Added tokens too: those outside of the model's vocabulary are numbered anew when read.
        added = {token["content"]: token["id"] for token in state["added_tokens"]}
        state["model"]["vocab"] |= added | dict(numbers)
        file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        (Path(folder) / "vocab.txt").unlink(missing_ok=True)
        extended = AutoTokenizer.from_pretrained(folder, use_fast=True)
    different = extended.get_vocab().items() ^ (tokenizer.get_vocab() | dict(numbers)).items()
    if different:
        raise ValueError(
            f"tokenizer: expected all pieces to keep their numbers, got others for "
            f"{sorted(different)[:4]}; train a vocabulary of your own"
        )
    return extended


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


def _alphabet(trainer: Any, documents: Sequence[str], room: int) -> tuple[list[str], list[str]]:
    """(letters, Chinese characters): the commonest, for `room` pieces.

    A Chinese character is a word: there is no form of it within one.
    """
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(trainer.normalizer.normalize_str(document))
    common = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alone = [c for c in common if trainer.normalizer.normalize_str(c) == f" {c} "]
    is_alone = frozenset(alone)
    letters = [c for c in common if c not in is_alone][: min(MAX_ALPHABET, room // 2)]
    often = [c for c in alone if counts[c] >= MIN_COUNT]
    return letters, often[: room - 2 * len(letters)]


_CHUNK_BYTES = 2**22


def write_vocab(
    sources: Sequence[str],
    output: str,
    *,
    vocab_size: int,
    lowercase: bool,
    text: str = "text",
    split: str | None = None,
    max_length: int = 512,
) -> str:
    """Trains on all readable records and writes the folder whole; returns what was done.

    Raises ValueError where the folder exists, or the sources hold no text or cannot be read.
    """
    folder = Path(output)
    if folder.exists():
        fail(f"--output: {folder}", "a new folder", "one that exists", "name another or remove it")
    if max_length < 3:  # [CLS], a piece, [SEP]
        fail("--max-length", "3 or more", str(max_length), "leave it out for 512")
    bad: list[records.Record] = []
    texts = list(iter_texts(sources, text=text, split=split, bad=bad))
    if not texts:
        first = f" ({bad[0].path}, {bad[0].place}: {bad[0].reason})" if bad else ""
        fail("sources", "text", f"none in {len(bad)} records{first}", "correct the sources")
    tokenizer = train_wordpiece(
        texts, vocab_size=vocab_size, lowercase=lowercase, max_length=max_length
    )
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(str(partial))
    partial.rename(folder)
    left_out = f"; {len(bad)} records could not be read" if bad else ""
    return f"{folder}: {len(tokenizer):,} pieces from {len(texts):,} texts{left_out}"


def iter_texts(
    sources: Sequence[str], *, text: str, split: str | None, bad: list[records.Record]
) -> Iterator[str]:
    """The texts one by one; a line of a .txt file is one. `bad` gets what cannot be read."""
    options = records.Options(text, split, "line", _CHUNK_BYTES)
    for chunk in records.read_chunks(0, records.find_sources(sources), options):
        for record in records.read_records(chunk, options):
            if record.text is None:
                bad.append(record)
            else:
                yield record.text
