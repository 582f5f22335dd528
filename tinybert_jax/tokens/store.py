"""Owns the token store on disk: fixed-width rows of ids, read by memory map. Knows no text.

A store is a folder. Shard k holds rows k·shard_rows and on, in two files of equal many records:
`shard-00000.ids`   little-endian uint16 (uint32 above 65,536 pieces) [rows, width], padded;
`shard-00000.rows`  `row_dtype(width)`: tokens, start of type 1, label, a bit per segment start.
`index.jsonl`       a line per chunk of text, in order: where it began and what it gave;
`manifest.json`     settings, tokenizer and source hashes, counts, size and SHA-256 of every file.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinybert_jax.data.errors import fail

FORMAT = "tinybert token store 1"
INDEX, MANIFEST, TOKENIZER = "index.jsonl", "manifest.json", "tokenizer.json"
MAX_SEGMENTS = 255  # in a row: they are counted in bytes
_BLOCK = 256  # rows gathered at a time: their arrays stay in the cache


class PackedRows(NamedTuple):
    """Rows of a store, ready to be masked and fed."""

    ids: np.ndarray  # int32 [n, width]
    segment_ids: np.ndarray  # int32 [n, width]: 0 padding, then 1, 2, …
    token_type_ids: np.ndarray  # int32 [n, width]
    labels: np.ndarray  # int32 [n]: of the pair in the row; -1 where there is none


class Rows(NamedTuple):
    """Rows as they lie on disk."""

    ids: np.ndarray  # uint16 or uint32 [n, width]
    meta: np.ndarray  # row_dtype(width) [n]


def row_dtype(width: int) -> np.dtype:
    """`second` is where token type 1 begins; the number of tokens where no token has it."""
    return np.dtype(
        [
            ("length", "<u2"),
            ("second", "<u2"),
            ("label", "<i2"),
            ("starts", "u1", (-(-width // 8),)),
        ]
    )


def ids_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def shard_names(shard: int) -> tuple[str, str]:
    return f"shard-{shard:05d}.ids", f"shard-{shard:05d}.rows"


def open_store(folder: str | Path, *, verify: bool = False) -> "Store":
    """Opens a store, checking the size of every file and, with `verify`, every SHA-256.

    Raises ValueError naming the file that is missing or not as it was written.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.get("format") != FORMAT:
        got = repr(manifest.get("format"))
        fail(str(folder / MANIFEST), f"format {FORMAT!r}", got, "prepare the text again")
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            fail(str(path), "a file of the store", "none", "copy the folder again, whole")
        if path.stat().st_size != entry["num_bytes"]:
            got = f"{path.stat().st_size}"
            fail(str(path), f"{entry['num_bytes']} bytes", got, "copy the folder again, whole")
        if verify and sha256(path) != entry["sha256"]:
            fail(str(path), "its SHA-256 of the manifest", "another", "copy or prepare it again")
    return Store(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = partial_of(folder).is_dir()
        fix = "run `tinybert data prepare` again: it goes on" if unfinished else "check the name"
        got = f"only {partial_of(folder)}, unfinished" if unfinished else "none"
        fail(str(folder), f"a folder with {MANIFEST}", got, fix)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(str(path), "JSON", str(error), "copy the folder again, whole")


def partial_of(folder: Path) -> Path:
    """Where a store is written until it is whole."""
    return folder.with_name(f"{folder.name}.partial")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """A prepared corpus, memory-mapped; made by `open_store`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = manifest
        self.width: int = manifest["width"]
        self.num_rows: int = manifest["num_rows"]
        self.num_tokens: int = manifest["num_tokens"]
        self._shard_rows: int = manifest["shard_rows"]
        ids, meta = np.dtype(manifest["ids_dtype"]), row_dtype(self.width)
        self._shards = []
        for shard in range(-(-self.num_rows // self._shard_rows)):
            names = shard_names(shard)
            self._shards.append(
                Rows(
                    np.asarray(np.memmap(folder / names[0], ids, "r")).reshape(-1, self.width),
                    np.asarray(np.memmap(folder / names[1], meta, "r")),
                )
            )

    def gather(self, rows: np.ndarray) -> PackedRows:
        """The rows of these numbers (int64 [n], any order, repeats allowed)."""
        num = len(rows)
        if num and not (0 <= rows.min() and rows.max() < self.num_rows):
            wanted = f"{rows.min()} to {rows.max()}"
            fail(str(self.folder), f"row numbers below {self.num_rows}", wanted, "check the plan")
        shape = (num, self.width)
        packed = PackedRows(
            np.empty(shape, np.int32),
            np.empty(shape, np.int32),
            np.zeros(shape, np.int32),
            np.empty(num, np.int32),
        )
        for start in range(0, num, _BLOCK):
            part = slice(start, start + _BLOCK)
            raw = Rows(self._take(0, rows[part]), self._take(1, rows[part]))
            _unpack(raw, PackedRows(*(field[part] for field in packed)))
        return packed

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each row without its padding, int32 [n]."""
        return self._take(1, rows)["length"].astype(np.int32)

    def _take(self, field: int, rows: np.ndarray) -> np.ndarray:
        """A field of `Rows` as it lies on disk; one fancy index per shard that is touched."""
        if len(self._shards) == 1:
            return self._shards[0][field][rows]
        shard_of, within = np.divmod(rows, self._shard_rows)
        first = self._shards[0][field]
        taken = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            taken[here] = self._shards[shard][field][within[here]]
        return taken


# For a byte of start bits: how many have been set after each of its eight places, a byte each.
_COUNTS = np.cumsum(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1), axis=1)
_COUNTS_WORD = np.ascontiguousarray(_COUNTS.astype(np.uint8)).view(np.uint64)[:, 0]
_TOTAL = _COUNTS[:, -1].astype(np.uint8)
_ALL_BYTES = np.uint64(0x0101010101010101)


def _unpack(rows: Rows, out: PackedRows) -> None:
    """Writes into views; the sums of start bits are taken eight places at a time."""
    width = rows.ids.shape[1]
    np.copyto(out.ids, rows.ids, casting="unsafe")
    np.copyto(out.labels, rows.meta["label"])
    starts = rows.meta["starts"].copy()
    counts = _TOTAL.take(starts)
    before = np.cumsum(counts, axis=1, dtype=np.uint8) - counts
    words = _COUNTS_WORD.take(starts) + before.astype(np.uint64) * _ALL_BYTES
    place = np.arange(width, dtype=np.uint16)
    real = place < rows.meta["length"][:, None]
    np.copyto(out.segment_ids, words.view(np.uint8)[:, :width] * real.view(np.uint8))
    if (rows.meta["second"] < rows.meta["length"]).any():
        np.copyto(out.token_type_ids, real & (place >= rows.meta["second"][:, None]))


class StoreWriter:
    """Appends to an unfinished store. What `index.jsonl` tells is on disk; the rest is cut off."""

    def __init__(self, folder: Path, width: int, dtype: np.dtype, shard_rows: int):
        self.folder, self.width, self.shard_rows = folder, width, shard_rows
        self.dtypes = (dtype, row_dtype(width))
        self.entries = list(_whole_lines(folder / INDEX))
        self.num_rows = sum(entry["rows"] for entry in self.entries)
        self._roll_back()

    def append(self, rows: Rows, entry: dict[str, Any]) -> None:
        """Writes a chunk's rows, then its line of the index: all of it or, on an OSError, none."""
        assert entry["rows"] == len(rows.ids)
        try:
            for start, stop, shard in self._parts(len(rows.ids)):
                for name, field in zip(shard_names(shard), rows, strict=True):
                    _append(self.folder / name, np.ascontiguousarray(field[start:stop]).data)
            line = json.dumps(entry, ensure_ascii=False) + "\n"
            _append(self.folder / INDEX, line.encode())
        except OSError:
            self._roll_back()
            raise
        self.entries.append(entry)
        self.num_rows += len(rows.ids)

    def finish(self, final: Path, manifest: dict[str, Any], files: dict[str, str]) -> None:
        """Writes further text files and the manifest, and gives the folder its final name."""
        for name, text in files.items():
            (self.folder / name).unlink(missing_ok=True)
            _append(self.folder / name, text.encode())
        num_shards = -(-self.num_rows // self.shard_rows)
        shards = itertools.chain.from_iterable(map(shard_names, range(num_shards)))
        entries = {
            name: {"num_bytes": os.path.getsize(path), "sha256": sha256(path)}
            for name in [*shards, INDEX, *sorted(files)]
            for path in [self.folder / name]
        }
        whole = {"format": FORMAT, **manifest, "files": entries}
        (self.folder / MANIFEST).unlink(missing_ok=True)
        text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
        _append(self.folder / MANIFEST, text.encode())
        for path in self.folder.iterdir():
            if path.name not in entries and path.name != MANIFEST:
                path.unlink()
        _sync(self.folder)
        self.folder.rename(final)
        _sync(final.parent)

    def _parts(self, num: int) -> list[tuple[int, int, int]]:
        """(start, stop, shard): a chunk may go over the end of a shard."""
        first = self.num_rows
        last = first + num
        shards = range(first // self.shard_rows, -(-last // self.shard_rows))
        cuts = [max(first, shard * self.shard_rows) - first for shard in shards] + [num]
        return list(zip(cuts, cuts[1:], shards, strict=False))

    def _roll_back(self) -> None:
        """Cuts every file to what the index tells."""
        lines = sum(len(json.dumps(e, ensure_ascii=False).encode()) + 1 for e in self.entries)
        sizes = {INDEX: lines}
        for shard in range(-(-self.num_rows // self.shard_rows)):
            rows = min(self.shard_rows, self.num_rows - shard * self.shard_rows)
            items = (self.width * self.dtypes[0].itemsize, self.dtypes[1].itemsize)
            sizes |= {name: rows * n for name, n in zip(shard_names(shard), items, strict=True)}
        for path in [*self.folder.glob("shard-*"), self.folder / INDEX]:
            if path.exists():
                size = sizes.pop(path.name, 0)
                if path.stat().st_size < size:
                    fix = f"remove {self.folder} and prepare again"
                    fail(str(path), f"{size} bytes", f"{path.stat().st_size}", fix)
                os.truncate(path, size)
        missing = next((name for name, size in sizes.items() if size), None)
        if missing:
            fix = f"remove {self.folder} and prepare again"
            fail(str(self.folder / missing), "a file", "none", fix)


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of an index; its last line may have been cut off in the middle."""
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        yield json.loads(line)


def _append(path: Path, content: bytes | memoryview) -> None:
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Makes the names in a folder last."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
