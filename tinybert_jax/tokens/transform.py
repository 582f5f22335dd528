"""What a worker does with a chunk of text: read records, tokenise, pack rows."""

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


class Work(NamedTuple):
    """All that turns a chunk into rows; travels to the workers."""

    tokenizer: str  # tokenizer.json
    settings: dict[str, Any]  # PrepareConfig.transform()
    layout: Layout
    unk_id: int | None
    mask_id: int | None


class Done(NamedTuple):
    """What became of a chunk: its rows and its line of the index."""

    rows: Rows
    entry: dict[str, Any]


def read_options(settings: dict[str, Any]) -> records.Options:
    return records.Options(**{name: settings[name] for name in records.Options._fields})


def make_transform(work: Work) -> Callable[[Chunk], Done]:
    """The pure function of a chunk."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(work.tokenizer)
    backend.encode_special_tokens = True  # "[SEP]" in a text is text
    settings, options = work.settings, read_options(work.settings)

    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def transform(chunk: Chunk) -> Done:
        rng = np.random.default_rng([settings["seed"], chunk.group, chunk.number])
        found = list(records.read_records(chunk, options))
        texts = [record.text for record in found if record.text is not None]
        if settings["mode"] == "documents":
            documents = [ids for ids in encode(texts) if ids]
            rows = pack_documents(documents, work.layout, rng)
        else:
            documents = list(_sentence_ids(texts, encode))
            rows = pair_instances(
                documents,
                work.layout,
                rng,
                next_sentence=settings["pair_label"] == "next_sentence",
                short_share=settings["short_share"],
            )
        return Done(rows, _entry(chunk, found, len(documents), rows, work.unk_id))

    return transform


_SENTENCE_END = re.compile(
    r"""(?<=[.!?])["'”’)\]]*\s+(?=["'“‘(\[]?[^\W_a-z])"""  # what is no small letter begins one
    r"|(?<=[。！？])[”’」』]*|\n+"
)


def split_sentences(text: str) -> list[str]:
    """At line ends, at Chinese full stops, and after . ! ? before what is no small letter."""
    cuts = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    parts = (text[start:stop].strip() for start, stop in itertools.pairwise(cuts))
    return [part for part in parts if part]


def _sentence_ids(
    texts: list[str], encode: Callable[[list[str]], list[list[int]]]
) -> Iterator[list[list[int]]]:
    """The sentences of each document that has any."""
    sentences = [split_sentences(text) for text in texts]
    encoded = iter(encode([sentence for document in sentences for sentence in document]))
    for document in sentences:
        ids = [ids for ids in itertools.islice(encoded, len(document)) if ids]
        if ids:
            yield ids


def _entry(
    chunk: Chunk, found: list[records.Record], num_documents: int, rows: Rows, unk_id: int | None
) -> dict[str, Any]:
    first, lengths = chunk.pieces[0], rows.meta["length"]
    real = np.arange(rows.ids.shape[1]) < lengths[:, None]
    labels = Counter(rows.meta["label"].tolist())
    return {
        "group": chunk.group,
        "number": chunk.number,
        "source": first.source.path,
        "first": first.first,
        "records": len(found),
        "documents": num_documents,
        "rows": len(rows.ids),
        "segments": int(np.bitwise_count(rows.meta["starts"]).sum()),
        "tokens": int(lengths.sum()),
        "unknown": int(((rows.ids == unk_id) & real).sum()) if unk_id is not None else 0,
        "labels": {str(label): labels[label] for label in sorted(labels)},
        "bad": [[r.path, r.place, r.reason] for r in found if r.text is None],
    }


def todo(
    group: tuple[int, list[Source]], done: tuple[int, int], options: records.Options
) -> Iterator[Chunk]:
    """The chunks of a numbered group that come after the chunk `done`."""
    for chunk in records.read_chunks(*group, options):
        if (chunk.group, chunk.number) > done:
            yield chunk
