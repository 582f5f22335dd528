"""Writes and memory-maps token stores: folders of fixed-width rows of token ids.

Shard k holds the rows from k·shard_rows on, in two files with one record per row:
`shard-00000.ids`   little-endian uint16 (uint32 above 65,536 pieces) [rows, width], padded;
`shard-00000.rows`  `row_dtype(width)`: length, start of token type 1, label, segment starts.
`index.jsonl`       one line per chunk of text, in order: start in the source, and counts;
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

from tinybert_jax.data.errors import fail, short
from tinybert_jax.data.json_text import parse_json

FORMAT = "tinybert token store 1"
INDEX, MANIFEST, TOKENIZER = "index.jsonl", "manifest.json", "tokenizer.json"
MAX_SEGMENTS = 255  # per row: segment ids are computed in uint8
_BLOCK = 256  # rows gathered at a time, so that their arrays stay in the CPU cache


class PackedRows(NamedTuple):
    """Rows of a store, unpacked for a batch."""

    ids: np.ndarray  # int32 [n, width]
    segment_ids: np.ndarray  # int32 [n, width]: 0 padding, then 1, 2, …
    token_type_ids: np.ndarray  # int32 [n, width]
    labels: np.ndarray  # int32 [n]: label of the pair; -1: no label


class Rows(NamedTuple):
    """Rows in the format on disk."""

    ids: np.ndarray  # uint16 or uint32 [n, width]
    meta: np.ndarray  # row_dtype(width) [n]


def row_dtype(width: int) -> np.dtype:
    """Record of a row in `shard-*.rows`."""
    return np.dtype(
        [
            ("length", "<u2"),  # tokens without padding
            ("second", "<u2"),  # position where token type 1 starts; `length` if there is none
            ("label", "<i2"),
            ("starts", "u1", (-(-width // 8),)),  # a set bit per position where a segment starts
        ]
    )


def ids_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def shard_names(shard: int) -> tuple[str, str]:
    return f"shard-{shard:05d}.ids", f"shard-{shard:05d}.rows"


def open_store(folder: str | Path, *, verify: bool = False) -> "Store":
    """Opens a store, checking the size of every file and, with `verify`, every SHA-256.

    Raises ValueError that names a missing or damaged file.
    """
    folder = Path(os.path.expanduser(folder))
    manifest = read_manifest(folder)
    if manifest.get("format") != FORMAT:
        got = short(manifest.get("format"))
        fail(str(folder / MANIFEST), f"format {FORMAT!r}", got, "prepare the text again")
    _check_manifest(folder / MANIFEST, manifest)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            fail(str(path), "a file of the store", "none", "copy the whole folder again")
        if path.stat().st_size != entry["num_bytes"]:
            got = f"{path.stat().st_size}"
            fail(str(path), f"{entry['num_bytes']} bytes", got, "copy the whole folder again")
        if verify and sha256(path) != entry["sha256"]:
            fix = "copy or prepare the store again"
            fail(str(path), "the SHA-256 in the manifest", "another SHA-256", fix)
    return Store(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        partial = partial_of(folder)
        fix, got = "check the name", "none"
        if partial.is_dir():
            fix = "run `tinybert data prepare` again to finish it"
            got = f"only {partial}, unfinished"
        fail(str(folder), f"a folder with {MANIFEST}", got, fix)
    return read_object(path, "copy the whole folder again")


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """A file that holds a JSON object; ValueError with `fix` for any other."""
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        fail(str(path), "JSON", str(error), fix)
    if not isinstance(value, dict):
        fail(str(path), "a JSON object", short(value), fix)
    return value


_LEAST = {"width": 1, "shard_rows": 1, "num_rows": 1, "num_tokens": 1}


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Raises ValueError for entries of other kinds, and for shards that do not fit the rows."""

    def check(name: str, is_right: bool, expected: str, got: Any) -> None:
        if not is_right:
            fail(f"{path}: {name}", expected, short(got), "copy or prepare the store again")

    for name, low in _LEAST.items():
        value = manifest.get(name)
        is_right = isinstance(value, int) and low <= value < (2**16 if name == "width" else 2**63)
        check(name, is_right, f"a whole number from {low} on", value)
    dtype, files = manifest.get("ids_dtype"), manifest.get("files")
    check("ids_dtype", dtype in ("<u2", "<u4"), "<u2 or <u4", dtype)
    check("files", isinstance(files, dict), "an object", files)
    for name, entry in manifest["files"].items():
        known = entry if isinstance(entry, dict) else {}
        is_right = isinstance(known.get("num_bytes"), int) and isinstance(known.get("sha256"), str)
        check(f"files: {short(name)}", is_right, "num_bytes and sha256", entry)
        check("files", Path(name).name == name, "names without folders", name)
    num_rows, width, most = manifest["num_rows"], manifest["width"], manifest["shard_rows"]
    sizes = (width * np.dtype(dtype).itemsize, row_dtype(width).itemsize)
    num_shards = sum(name.endswith(".ids") for name in manifest["files"])
    check("num_rows", -(-num_rows // most) == num_shards, f"rows of {num_shards} shards", num_rows)
    for shard in range(num_shards):
        rows = min(most, num_rows - shard * most)
        for name, size in zip(shard_names(shard), sizes, strict=True):
            got = manifest["files"].get(name, {}).get("num_bytes")
            check(f"files: {name}", got == rows * size, f"{rows * size} bytes", got)


def partial_of(folder: Path) -> Path:
    """The folder in which a store is written until it is complete."""
    return folder.with_name(f"{folder.name}.partial")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """A memory-mapped token store; `open_store` makes it."""

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
        """The rows with these numbers (int64 [n], in any order, repeats allowed)."""
        num = len(rows)
        if num and not (0 <= rows.min() and rows.max() < self.num_rows):
            got = f"{rows.min()} to {rows.max()}"
            expected = f"row numbers from 0 and below {self.num_rows}"
            fail(str(self.folder), expected, got, "correct the row numbers")
        shape = (num, self.width)
        packed = PackedRows(
            np.empty(shape, np.int32),
            np.empty(shape, np.int32),
            np.zeros(shape, np.int32),
            np.empty(num, np.int32),
        )
        for start in range(0, num, _BLOCK):
            part = slice(start, start + _BLOCK)
            on_disk = Rows(self._take(0, rows[part]), self._take(1, rows[part]))
            _unpack(on_disk, PackedRows(*(field[part] for field in packed)))
        return packed

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Number of tokens of every row without padding, int32 [n]."""
        return self._take(1, rows)["length"].astype(np.int32)

    def _take(self, field: int, rows: np.ndarray) -> np.ndarray:
        """Field number `field` of `Rows`; one fancy index per shard."""
        if len(self._shards) == 1:
            return self._shards[0][field][rows]
        shard_of, row_in_shard = np.divmod(rows, self._shard_rows)
        first = self._shards[0][field]
        taken = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            taken[here] = self._shards[shard][field][row_in_shard[here]]
        return taken


# [256, 8]: number of set bits of a byte up to and including each of the eight positions.
_BIT_COUNTS = np.cumsum(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1), axis=1)
# [256]: these eight counts as the eight bytes of one word.
_BIT_COUNTS_WORD = np.ascontiguousarray(_BIT_COUNTS.astype(np.uint8)).view(np.uint64)[:, 0]
_NUM_BITS = _BIT_COUNTS[:, -1].astype(np.uint8)
_ONE_IN_EVERY_BYTE = np.uint64(0x0101010101010101)


def _unpack(rows: Rows, out: PackedRows) -> None:
    """Writes rows into the arrays of `out`; sums up the start bits of eight positions at a time."""
    width = rows.ids.shape[1]
    np.copyto(out.ids, rows.ids, casting="unsafe")
    np.copyto(out.labels, rows.meta["label"])
    starts = rows.meta["starts"].copy()
    num_bits = _NUM_BITS.take(starts)
    num_before = np.cumsum(num_bits, axis=1, dtype=np.uint8) - num_bits
    words = _BIT_COUNTS_WORD.take(starts) + num_before.astype(np.uint64) * _ONE_IN_EVERY_BYTE
    position = np.arange(width, dtype=np.uint16)
    real = position < rows.meta["length"][:, None]
    np.copyto(out.segment_ids, words.view(np.uint8)[:, :width] * real.view(np.uint8))
    if (rows.meta["second"] < rows.meta["length"]).any():
        np.copyto(out.token_type_ids, real & (position >= rows.meta["second"][:, None]))


class StoreWriter:
    """Appends chunks to an unfinished store; at first removes rows that the index does not list."""

    def __init__(self, folder: Path, width: int, dtype: np.dtype, shard_rows: int):
        self.folder, self.width, self.shard_rows = folder, width, shard_rows
        self.dtypes = (dtype, row_dtype(width))
        self.entries = list(_read_index(folder / INDEX))
        self.num_rows = sum(entry["rows"] for entry in self.entries)
        self._roll_back()

    def append(self, rows: Rows, entry: dict[str, Any]) -> None:
        """Writes the rows of a chunk, then the index line; removes both again on an OSError."""
        assert entry["rows"] == len(rows.ids)
        try:
            for start, stop, shard in self._shard_parts(len(rows.ids)):
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
        """Writes further text files (name -> text) and the manifest; renames the folder."""
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
        manifest = {"format": FORMAT, **manifest, "files": entries}
        (self.folder / MANIFEST).unlink(missing_ok=True)
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        _append(self.folder / MANIFEST, text.encode())
        for path in self.folder.iterdir():
            if path.name not in entries and path.name != MANIFEST:
                path.unlink()
        _sync(self.folder)
        self.folder.rename(final)
        _sync(final.parent)

    def _shard_parts(self, num: int) -> list[tuple[int, int, int]]:
        """Cuts the next `num` rows at the ends of shards: [(start, stop, shard)]."""
        first = self.num_rows
        last = first + num
        shards = range(first // self.shard_rows, -(-last // self.shard_rows))
        cuts = [max(first, shard * self.shard_rows) - first for shard in shards] + [num]
        return list(zip(cuts, cuts[1:], shards, strict=False))

    def _roll_back(self) -> None:
        """Truncates every file to the chunks that the index lists."""
        index_size = sum(len(json.dumps(e, ensure_ascii=False).encode()) + 1 for e in self.entries)
        sizes = {INDEX: index_size}
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


def _read_index(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the entries of an index, without a last line that was cut off."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.is_file() else (), 1):
        try:
            entry = parse_json(line)
            is_entry = isinstance(entry, dict) and isinstance(entry.get("rows"), int)
            got = short(entry)
        except ValueError as error:
            is_entry, got = False, str(error)
        if not is_entry:
            fix = f"remove {path.parent} and prepare again"
            fail(f"{path}, line {number}", "the entry of a chunk", got, fix)
        yield entry


def _append(path: Path, content: bytes | memoryview) -> None:
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Writes the names in a folder to disk, so that they survive a crash."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
