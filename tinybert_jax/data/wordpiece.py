"""Trains and extends WordPiece vocabularies; the tokenizers load in Hugging Face transformers."""

import hashlib
import itertools
import json
import re
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
MAX_ALPHABET = 1000  # only the most frequent letters are kept; BERT's limit
MIN_COUNT = 2  # occurrences of a piece


def train_wordpiece(
    documents: Sequence[str], *, vocab_size: int, lowercase: bool = True, max_length: int = 512
) -> Any:
    """Trains a `BertTokenizer` of `vocab_size` pieces, fewer if the text is short.

    As in BERT, every Chinese character is a word, and `lowercase` also strips accents. The most
    frequent letters get two pieces each, one at the start of a word and one within a word; then
    come the most frequent Chinese characters, then longer pieces. The same documents give the same
    vocabulary. Raises ValueError for a `vocab_size` without room for the special tokens.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"expected a vocabulary of more than 5 pieces, got {vocab_size}; raise it")
    trainer = BertWordPieceTokenizer(lowercase=lowercase)
    letters, ideographs = _alphabet(trainer, documents, vocab_size - len(SPECIAL_TOKENS))
    alphabet = sorted([*letters, *ideographs])
    trainer.train_from_iterator(
        documents,
        vocab_size=vocab_size,
        min_frequency=MIN_COUNT,
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        # The library gives `##letter` pieces ids in hash order and breaks ties by id, so every run
        # would learn other pieces. As special tokens these pieces have fixed ids.
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
    """The most frequent words that a WordPiece tokenizer splits -> ids of their pieces.

    At most `num_words` words with `min_count` or more occurrences; ties go in alphabetical order.
    A word with a character outside the vocabulary has the id of [UNK].
    """
    backend = plain_backend(tokenizer)
    max_chars = backend.model.max_input_chars_per_word  # the model does not look up longer words
    counts: Counter[str] = Counter()
    for text in texts:
        normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
        counts.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
    known = backend.get_vocab()
    frequent = sorted((-count, word) for word, count in counts.items() if count >= min_count)
    new = (word for _, word in frequent if word not in known and len(word) <= max_chars)
    return {
        word: [piece.id for piece in backend.model.tokenize(word)]
        for word in itertools.islice(new, num_words)
    }


def check_extendable(tokenizer: Any) -> None:
    """Raises ValueError unless the tokenizer is WordPiece with ids without gaps.

    With gaps a new piece could take the id of an existing piece.
    """
    kind = json.loads(plain_backend(tokenizer).to_str())["model"]["type"]
    if kind != "WordPiece":
        raise ValueError(
            f"tokenizer: expected WordPiece, got {kind}; only WordPiece can be extended"
        )
    ids = tokenizer.get_vocab().values()
    if set(ids) != set(range(len(ids))):
        raise ValueError(
            f"tokenizer: expected the {len(ids)} pieces to have the ids from 0 on, got ids up to "
            f"{max(ids)}: the vocabulary file lists a piece twice; train a new vocabulary"
        )


def with_words(tokenizer: Any, new_ids: Mapping[str, int]) -> Any:
    """The tokenizer with additional pieces (word -> id); existing pieces keep their ids."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        state = json.loads(file.read_text(encoding="utf-8"))
        # Lists added tokens too: reading gives those outside the model's vocabulary new ids.
        added = {token["content"]: token["id"] for token in state["added_tokens"]}
        state["model"]["vocab"] |= added | dict(new_ids)
        file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        (Path(folder) / "vocab.txt").unlink(missing_ok=True)
        extended = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    different = extended.get_vocab().items() ^ (tokenizer.get_vocab() | dict(new_ids)).items()
    if different:
        raise ValueError(
            f"tokenizer: expected all pieces to keep their ids, got other ids for "
            f"{sorted(different)[:4]}; train a new vocabulary"
        )
    return extended


def plain_backend(tokenizer: Any) -> Any:
    """A copy of the Rust tokenizer without padding and truncation; `tokenizer` stays unchanged."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


def backend_json(tokenizer: Any) -> str:
    """Content of a `tokenizer.json` with everything that decides the tokens of a text."""
    return plain_backend(tokenizer).to_str(pretty=True)


def backend_sha256(tokenizer: Any) -> str:
    """SHA-256 of the tokenizer, as token stores record it."""
    return hashlib.sha256(backend_json(tokenizer).encode()).hexdigest()


def is_continuation(tokenizer: Any) -> np.ndarray:
    """Whether a piece continues a word: bool [vocab], True for '##ing'.

    Raises ValueError for a vocabulary without such pieces, in which words have no visible start.
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


def _alphabet(
    trainer: Any, documents: Sequence[str], num_pieces: int
) -> tuple[list[str], list[str]]:
    """The most frequent (letters, Chinese characters) that fit into `num_pieces`.

    A letter takes two pieces, `a` and `##a`; a Chinese character takes one, because it is a word.
    """
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(trainer.normalizer.normalize_str(document))
    by_count = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    ideographs = [c for c in by_count if trainer.normalizer.normalize_str(c) == f" {c} "]
    is_ideograph = frozenset(ideographs)
    letters = [c for c in by_count if c not in is_ideograph][: min(MAX_ALPHABET, num_pieces // 2)]
    frequent = [c for c in ideographs if counts[c] >= MIN_COUNT]
    return letters, frequent[: num_pieces - 2 * len(letters)]


def decode_texts(tokenizer: Any, ids: Any) -> list[str]:
    """The text of each row of ids, on one line, without most of the spaces that WordPiece adds.

    WordPiece forgets where there were spaces; its decoding sets one between Chinese characters and
    around most signs: 'a ( red ) T - shirt'. Rules take them out again. Of the captions of
    Multi30k and 3AM that a vocabulary knows whole, they give back as they were 99 % in German
    (92 % without them), English (94 %) and French (59 %), and 96 % in Chinese (0 %). What the
    tokens do not tell is guessed: ' - ' between words becomes '-', ' ;' and ' :' lose their space.
    """
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    lines = [" ".join(text.split()) for text in texts]
    if type(tokenizer.backend_tokenizer.decoder).__name__ != "WordPiece":
        return lines  # its pieces know their spaces
    return [_without_spaces(line) for line in lines]


# Ideographs, kana and full-width signs: writing without spaces.
_UNSPACED = "\u2e80-\u312f\u3190-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
# One that ends no word (l', qu') and begins no ending ('s, 'll).
_QUOTE = r"(?<!\b\w )(?<!qu )(?<!\w')'(?! (?:s|t|m|d|re|ve|ll)\b)"
_SPACES = tuple(
    (re.compile(pattern), kept)
    for pattern, kept in (
        (f"(?<=[{_UNSPACED}]) (?=[{_UNSPACED}])", ""),
        (r"(?<=[(\[{¿¡]) | (?=[)\]};:])", ""),
        (r"([“„]) ?([^“”„]*[^“”„ ]) ?([“”])", r"\1\2\3"),
        (rf"{_QUOTE} ([^']*[^' ]) '(?=[ .,;:!?)]|$)", r"'\1'"),
        (r"(?<=\w) - (?=(?:und|oder|bzw|and|or)\b)", "- "),  # two- and three-year
        (r"(?<=\w) ([-/'’]) (?=\w)", r"\1"),
        ("(?<=[—…]) (?=[—…])", ""),
        (r"(?<!\d)(\d{1,3})\. (?=\d)", r"\1."),  # 2.5
        (r"(?<!\d)(\d{1,2}) ?: ?(?=\d\d(?!\d))", r"\1:"),  # 12:30
        (r"(?<!\d)(\d{1,3}), (?=000\b)", r"\1,"),  # 10,000
    )
)
_MIXED = re.compile(f"(?<=[{_UNSPACED}]) | (?=[{_UNSPACED}])")
_QUOTATION = re.compile(r'(?<!\d )" ?([^"]*[^" ]) ?"')


def _without_spaces(line: str) -> str:
    if 2 * len(re.findall(f"[{_UNSPACED}]", line)) > len(line.replace(" ", "")):
        line = _MIXED.sub("", line)  # also around words and numbers in Chinese text
    if line.count('"') % 2 == 0:
        line = _QUOTATION.sub(r'"\1"', line)
    for pattern, kept in _SPACES:
        line = pattern.sub(kept, line)
    return line


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
    """Trains a vocabulary on all readable records, writes its folder, returns a summary line.

    Raises ValueError if the folder exists, or the sources cannot be read or hold no text.
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
    """Yields the texts, every line of a .txt file as one; appends unreadable records to `bad`."""
    options = records.Options(text, split, "line", _CHUNK_BYTES)
    for chunk in records.read_chunks(0, records.find_sources(sources), options):
        for record in records.read_records(chunk, options):
            if record.text is None:
                bad.append(record)
            else:
                yield record.text
