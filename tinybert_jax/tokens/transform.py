"""Turns a chunk of text into rows on a worker: reads records, tokenises, packs."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tinybert_jax.data import records
from tinybert_jax.data.records import Chunk, Source
from tinybert_jax.tokens.instances import Layout, pack_documents, pair_instances
from tinybert_jax.tokens.store import Rows


class TransformSpec(NamedTuple):
    """All that a worker needs to turn a chunk into rows."""

    tokenizer: str  # content of tokenizer.json
    settings: dict[str, Any]  # PrepareConfig.transform()
    layout: Layout
    unk_id: int | None
    mask_id: int | None


class ChunkResult(NamedTuple):
    """The rows of a chunk and the line for the index of the store."""

    rows: Rows
    entry: dict[str, Any]


def read_options(settings: dict[str, Any]) -> records.Options:
    return records.Options(**{name: settings[name] for name in records.Options._fields})


def make_transform(spec: TransformSpec) -> Callable[[Chunk], ChunkResult]:
    """Makes the function from a chunk to rows; the result depends only on chunk and spec."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(spec.tokenizer)
    backend.encode_special_tokens = True  # tokenises "[SEP]" in a text as ordinary text
    settings, options = spec.settings, read_options(spec.settings)

    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def transform(chunk: Chunk) -> ChunkResult:
        rng = np.random.default_rng([settings["seed"], chunk.group, chunk.number])
        chunk_records = list(records.read_records(chunk, options))
        texts = [record.text for record in chunk_records if record.text is not None]
        if settings["mode"] == "documents":
            documents = [ids for ids in encode(texts) if ids]
            rows = pack_documents(documents, spec.layout, rng)
        else:
            documents = list(_sentence_ids(texts, encode))
            rows = pair_instances(
                documents,
                spec.layout,
                rng,
                next_sentence=settings["pair_label"] == "next_sentence",
                short_share=settings["short_share"],
            )
        entry = _index_entry(chunk, chunk_records, len(documents), rows, spec.unk_id)
        return ChunkResult(rows, entry)

    return transform


_SENTENCE_END = re.compile(
    r"""(?<=[.!?])["'”’)\]]*\s+(?=["'“‘(\[]?[^\W_a-z])"""  # a-z does not start a sentence
    r"|(?<=[。！？])[”’」』]*|\n+"
)


def split_sentences(text: str) -> list[str]:
    """Splits at line breaks, at Chinese full stops, and after . ! ? unless a-z follows."""
    cuts = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    parts = (text[start:stop].strip() for start, stop in itertools.pairwise(cuts))
    return [part for part in parts if part]


def _sentence_ids(
    texts: list[str], encode: Callable[[list[str]], list[list[int]]]
) -> Iterator[list[list[int]]]:
    """Yields the token ids of every sentence, by document; skips documents without tokens."""
    sentences = [split_sentences(text) for text in texts]
    encoded = iter(encode([sentence for document in sentences for sentence in document]))
    for document in sentences:
        ids = [ids for ids in itertools.islice(encoded, len(document)) if ids]
        if ids:
            yield ids


def _index_entry(
    chunk: Chunk,
    chunk_records: list[records.Record],
    num_documents: int,
    rows: Rows,
    unk_id: int | None,
) -> dict[str, Any]:
    first, lengths = chunk.pieces[0], rows.meta["length"]
    real = np.arange(rows.ids.shape[1]) < lengths[:, None]
    labels = Counter(rows.meta["label"].tolist())
    return {
        "group": chunk.group,
        "number": chunk.number,
        "source": first.source.path,
        "first": first.first,
        "records": len(chunk_records),
        "documents": num_documents,
        "rows": len(rows.ids),
        "segments": int(np.bitwise_count(rows.meta["starts"]).sum()),
        "tokens": int(lengths.sum()),
        "unknown": int(((rows.ids == unk_id) & real).sum()) if unk_id is not None else 0,
        "labels": {str(label): labels[label] for label in sorted(labels)},
        "bad": [[r.path, r.place, r.reason] for r in chunk_records if r.text is None],
    }


def remaining_chunks(
    group: tuple[int, list[Source]], done: tuple[int, int], options: records.Options
) -> Iterator[Chunk]:
    """Yields the chunks of a numbered group that come after the chunk `done` (group, number)."""
    for chunk in records.read_chunks(*group, options):
        if (chunk.group, chunk.number) > done:
            yield chunk
