"""What is in a token store, as text for a terminal. Reads; changes nothing."""

from pathlib import Path

import numpy as np

from tinybert_jax.data.errors import fail
from tinybert_jax.tokens.store import MANIFEST, TOKENIZER, Store, open_store

_BAR = 40  # characters of the longest bar
_BLOCK = 2**16  # rows read at a time


def describe(folder: str | Path, *, num_rows: int = 3, verify: bool = False) -> str:
    """Counts, the histogram of row lengths and `num_rows` decoded rows spread over the store.

    With `verify` every file's SHA-256 is checked first; ValueError names the first that is wrong.
    """
    if num_rows < 0:
        fail("--rows", "0 or more", str(num_rows), "leave it out for 3")
    store = open_store(folder, verify=verify)
    parts = [counts(folder), _histogram(store), _decoded(store, num_rows)]
    if verify:
        parts.append("verified: every file has the SHA-256 of the manifest")
    return "\n\n".join(part for part in parts if part)


def counts(folder: str | Path) -> str:
    """A line per count of the manifest."""
    store = open_store(folder)
    facts = store.manifest
    slots, tokens = store.num_rows * store.width, store.num_tokens
    lines = {
        "store": str(folder),
        "rows": f"{store.num_rows:,} of {store.width}",
        "tokens": f"{tokens:,}",
        "padding": f"{1 - tokens / slots:.2%}",
        "unknown tokens": f"{facts['num_unknown_tokens'] / tokens:.4%}",
        "documents": f"{facts['num_documents']:,}",
        "segments": f"{facts['num_segments']:,}",
        "bad records": f"{facts['num_bad_records']:,} of {facts['num_records']:,}"
        + (", listed in bad_records.jsonl" if facts["num_bad_records"] else ""),
    }
    if set(facts["labels"]) != {"-1"}:
        named = (f"{label}: {num:,}" for label, num in facts["labels"].items())
        lines["labels"] = ", ".join(named)
    return "\n".join(f"{name:15} {value}" for name, value in lines.items())


def _histogram(store: Store) -> str:
    """Rows by length, ten bins."""
    edges = np.unique(np.linspace(0, store.width, 11).astype(int))
    found = np.zeros(len(edges) - 1, np.int64)
    for start in range(0, store.num_rows, _BLOCK):
        numbers = np.arange(start, min(start + _BLOCK, store.num_rows))
        lengths = store.lengths(numbers)
        found += np.histogram(lengths, edges + (edges > 0))[0]
    lines = [
        f"{low + 1:5} – {high:5} {'█' * round(_BAR * num / found.max()):{_BAR}} {num:,}"
        for low, high, num in zip(edges, edges[1:], found, strict=False)
    ]
    return "\n".join(["tokens a row", *lines])


def _decoded(store: Store, num_rows: int) -> str:
    from tokenizers import Tokenizer

    path = store.folder / TOKENIZER
    if not path.is_file():
        fail(str(path), f"the tokenizer that {MANIFEST} lists", "none", "copy the folder again")
    tokenizer = Tokenizer.from_file(str(path))
    numbers = np.unique(np.linspace(0, store.num_rows - 1, num_rows).astype(np.int64))
    rows = store.gather(numbers)
    blocks = []
    for place, number in enumerate(numbers.tolist()):
        label = int(rows.labels[place])
        lines = [f"row {number}" + (f", label {label}" if label >= 0 else "")]
        segments = rows.segment_ids[place]
        for segment in range(1, segments.max() + 1):
            ids = rows.ids[place][segments == segment]
            lines.append(
                f"  {segment}: {tokenizer.decode(ids.tolist(), skip_special_tokens=False)}"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
