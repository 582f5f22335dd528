"""Text files as plain texts, and a WordPiece vocabulary from them, as a tokenizer folder."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinybert_jax.data import records
from tinybert_jax.data.mistakes import fail
from tinybert_jax.data.vocab import train_wordpiece

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
