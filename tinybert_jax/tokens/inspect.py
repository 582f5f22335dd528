"""Describes a token store as text for a terminal; read-only."""

from pathlib import Path

import numpy as np

from tinybert_jax.data.errors import fail, listed
from tinybert_jax.tokens.store import MANIFEST, TOKENIZER, Store, open_store

_BAR_LENGTH = 40  # characters of the longest bar
_BLOCK_ROWS = 2**16  # rows read at a time


def describe(folder: str | Path, *, num_rows: int = 3, verify: bool = False) -> str:
    """Counts, a histogram of row lengths and `num_rows` decoded rows spread over the store.

    `verify` checks the SHA-256 of every file first; a ValueError names the first damaged file.
    """
    if num_rows < 0:
        fail("--rows", "0 or more", str(num_rows), "leave it out for 3")
    store = open_store(folder, verify=verify)
    parts = [counts(folder), _histogram(store), _decoded(store, num_rows)]
    if verify:
        parts.append("verified: every file has the SHA-256 of the manifest")
    return "\n\n".join(part for part in parts if part)


_COUNTS = (
    *("num_unknown_tokens", "num_documents", "num_segments"),
    *("num_records", "num_bad_records"),
)


def counts(folder: str | Path) -> str:
    """The counts of the manifest, one per line."""
    store = open_store(folder)
    manifest = store.manifest
    wrong = [name for name in _COUNTS if not isinstance(manifest.get(name), int)]
    if wrong or not isinstance(manifest.get("labels"), dict):
        path, fix = str(store.folder / MANIFEST), "copy or prepare the store again"
        fail(
            path, "all counts of a store", f"others, or none, for {listed([*wrong, 'labels'])}", fix
        )
    num_slots, num_tokens = store.num_rows * store.width, store.num_tokens
    lines = {
        "store": str(folder),
        "rows": f"{store.num_rows:,} of {store.width} tokens",
        "tokens": f"{num_tokens:,}",
        "padding": f"{1 - num_tokens / num_slots:.2%}",
        "unknown tokens": f"{manifest['num_unknown_tokens'] / num_tokens:.4%}",
        "documents": f"{manifest['num_documents']:,}",
        "segments": f"{manifest['num_segments']:,}",
        "bad records": f"{manifest['num_bad_records']:,} of {manifest['num_records']:,}"
        + (", listed in bad_records.jsonl" if manifest["num_bad_records"] else ""),
    }
    if set(manifest["labels"]) != {"-1"}:
        label_counts = (f"{label}: {num:,}" for label, num in manifest["labels"].items())
        lines["labels"] = ", ".join(label_counts)
    return "\n".join(f"{name:15} {value}" for name, value in lines.items())


def _histogram(store: Store) -> str:
    """Numbers of rows by length, in ten bins."""
    edges = np.unique(np.linspace(0, store.width, 11).astype(int))
    nums = np.zeros(len(edges) - 1, np.int64)
    for start in range(0, store.num_rows, _BLOCK_ROWS):
        lengths = store.lengths(np.arange(start, min(start + _BLOCK_ROWS, store.num_rows)))
        nums += np.histogram(lengths, edges + (edges > 0))[0]
    lines = []
    for low, high, num in zip(edges, edges[1:], nums, strict=False):
        bar = "█" * round(_BAR_LENGTH * num / nums.max())
        lines.append(f"{low + 1:5} – {high:5} {bar:{_BAR_LENGTH}} {num:,}")
    return "\n".join(["tokens per row", *lines])


def _decoded(store: Store, num_rows: int) -> str:
    from tokenizers import Tokenizer

    path = store.folder / TOKENIZER
    if not path.is_file():
        fail(str(path), f"the tokenizer listed in {MANIFEST}", "none", "copy the folder again")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        fail(str(path), "a tokenizer.json", str(error), "copy the folder again")
    numbers = np.unique(np.linspace(0, store.num_rows - 1, num_rows).astype(np.int64))
    rows = store.gather(numbers)
    blocks = []
    for i, number in enumerate(numbers.tolist()):
        label = int(rows.labels[i])
        lines = [f"row {number}" + (f", label {label}" if label >= 0 else "")]
        segments = rows.segment_ids[i]
        for segment in range(1, segments.max() + 1):
            ids = rows.ids[i][segments == segment]
            lines.append(
                f"  {segment}: {tokenizer.decode(ids.tolist(), skip_special_tokens=False)}"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
