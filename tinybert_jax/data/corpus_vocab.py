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
    texts, num_bad = read_texts(sources, text=text, split=split)
    tokenizer = train_wordpiece(
        texts, vocab_size=vocab_size, lowercase=lowercase, max_length=max_length
    )
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(str(partial))
    partial.rename(folder)
    left_out = f"; {num_bad} records could not be read" if num_bad else ""
    return f"{folder}: {len(tokenizer):,} pieces from {len(texts):,} texts{left_out}"


def read_texts(
    sources: Sequence[str], *, text: str = "text", split: str | None = None
) -> tuple[list[str], int]:
    """(texts, number of records that could not be read); a line of a .txt file is one text.

    Raises ValueError where there is no text at all.
    """
    found = list(_records(sources, records.Options(text, split, "line", _CHUNK_BYTES)))
    texts = [record.text for record in found if record.text is not None]
    if not texts:
        first = f"{found[0].path}, {found[0].place}: {found[0].reason}" if found else "no record"
        fail("sources", "text", f"none in {len(found)} records ({first})", "correct the sources")
    return texts, len(found) - len(texts)


def _records(sources: Sequence[str], options: records.Options) -> Iterator[records.Record]:
    for chunk in records.read_chunks(0, records.find_sources(sources), options):
        yield from records.read_records(chunk, options)
