"""Reads text of any size as a stream: finds sources, cuts them into chunks, reads their records.

The ends of chunks depend only on the sources and `chunk_bytes`, so any worker can read any chunk.
A record that cannot be read is yielded with the reason; a file that cannot be read raises
ValueError.
"""

import bz2
import csv
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tinybert_jax.data.corpus import COMPRESSED, corpus_files
from tinybert_jax.data.csv_rows import column_separator, first_record
from tinybert_jax.data.errors import fail, fail_column, short
from tinybert_jax.data.json_text import parse_json
from tinybert_jax.data.tables import load_dataset

_KINDS = (".txt", ".jsonl", ".tsv", ".csv", ".parquet")
_SUFFIXES = tuple(kind + end for kind in _KINDS for end in ("", *COMPRESSED))
# Documents longer than so many chunks are cut at a line break.
_MAX_CHUNKS_PER_DOCUMENT = 16
_LAST_BLANK = re.compile(rb".*\n[ \t\r\f\v]*\n", re.DOTALL)


class Source(NamedTuple):
    path: str
    kind: str  # suffix of the decompressed file, or "datasets"
    num_bytes: int  # on disk; 0 for a data set
    modified: int  # modification time in ns; 0 for a data set


class Options(NamedTuple):
    """Settings of the readers."""

    text: str  # column of the text: a name, or a position where there is no header
    split: str | None  # of a data set
    document_end: str  # of a .txt file: blank_line or line
    chunk_bytes: int


class Piece(NamedTuple):
    """Consecutive whole records of one source."""

    source: Source
    first: int  # number of the first line or row, from 1
    content: bytes | list[tuple[int, Any]]  # raw lines; or (number, text, None or Unreadable)
    header: tuple[int, int] = (0, 0)  # of a .tsv: text column, number of columns (0: any number)


class Chunk(NamedTuple):
    """Text that is tokenised, packed and shuffled together; (group, number) identifies a chunk."""

    group: int
    number: int
    pieces: list[Piece]


class Record(NamedTuple):
    path: str
    place: str  # "line 12", "row 3"
    text: str | None  # None for a bad record
    reason: str = ""


class Unreadable(NamedTuple):
    """Takes the place of a text that cannot be read."""

    reason: str


def find_sources(paths: Sequence[str]) -> list[Source]:
    """The files and data sets of the paths in order; files of a folder are sorted.

    Raises ValueError for a path without readable files and for a source that is listed twice.
    """
    sources = []
    for path in map(os.path.expanduser, paths):
        if path.startswith("hub:") or _is_saved_dataset(Path(path)):
            sources.append(Source(path, "datasets", 0, 0))
            continue
        file_types = f"{', '.join(_KINDS)} (or {', '.join(COMPRESSED)} of it)"
        for file in corpus_files([path], _SUFFIXES, file_types):
            status = os.stat(file)
            sources.append(Source(file, _kind(file), status.st_size, status.st_mtime_ns))
    seen: set[str] = set()
    for source in sources:
        if source.path in seen:
            fail("sources", "every file once", f"{source.path} twice", "narrow the list")
        seen.add(source.path)
    return sources


def source_sha256(source: Source, options: Options) -> str:
    """SHA-256 of a file's bytes, or of a data set's texts."""
    if source.kind != "datasets":
        with open(source.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for _, text in _dataset_texts(source, options):
        digest.update(json.dumps(text).encode())
    return digest.hexdigest()


def group_sources(sources: Sequence[Source], chunk_bytes: int) -> list[list[Source]]:
    """Groups consecutive small files up to `chunk_bytes`, so that chunks hold many documents."""
    groups: list[list[Source]] = []
    room = 0
    for source in sources:
        if not groups or source.num_bytes > room or source.kind == "datasets":
            groups.append([])
            room = chunk_bytes
        groups[-1].append(source)
        room = 0 if source.kind == "datasets" else room - source.num_bytes
    return groups


def read_chunks(group: int, sources: Sequence[Source], options: Options) -> Iterator[Chunk]:
    """Yields the text of a group in chunks of about `chunk_bytes`."""
    number, pieces, size = 0, [], 0
    for source in sources:
        for piece, num_bytes in _pieces(source, options):
            pieces.append(piece)
            size += num_bytes
            if size >= options.chunk_bytes:
                yield Chunk(group, number, pieces)
                number, pieces, size = number + 1, [], 0
    if pieces:
        yield Chunk(group, number, pieces)


def read_records(chunk: Chunk, options: Options) -> Iterator[Record]:
    """Yields the records of a chunk in order; skips blank lines."""
    for piece in chunk.pieces:
        path, unit = piece.source.path, unit_of(piece.source)
        for number, text in _texts(piece, options):
            decoded = _decode(text)
            if isinstance(decoded, Unreadable):
                yield Record(path, f"{unit} {number}", None, decoded.reason)
            else:
                yield Record(path, f"{unit} {number}", decoded)


def unit_of(source: Source) -> str:
    """What the records of a source are numbered by."""
    return "row" if source.kind in ("datasets", ".parquet") else "line"


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _kind(file: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    return suffixes[-2] if suffixes[-1] in COMPRESSED else suffixes[-1]


def _pieces(source: Source, options: Options) -> Iterator[tuple[Piece, int]]:
    """Yields (piece, number of bytes of text)."""
    try:
        if source.kind == ".csv":
            yield from _row_pieces(source, _csv_texts(source, options), options)
        elif source.kind == ".parquet":
            yield from _row_pieces(source, _parquet_texts(source, options), options)
        elif source.kind == "datasets":
            yield from _row_pieces(source, _dataset_texts(source, options), options)
        else:
            yield from _line_pieces(source, options)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        fix = "get the file again; decompressing it by hand shows where it ends"
        fail(source.path, "a file that can be read to its end", f"{error}", fix)


def _line_pieces(source: Source, options: Options) -> Iterator[tuple[Piece, int]]:
    ends_at_blank_line = source.kind == ".txt" and options.document_end == "blank_line"
    with _open(source) as stream:
        header, first = (0, 0), 1
        if source.kind == ".tsv":
            header, first = _tsv_header(source.path, stream, options.text)
        for block in _blocks(stream, options.chunk_bytes, ends_at_blank_line, source.path):
            yield Piece(source, first, block, header), len(block)
            first += block.count(b"\n")


def _blocks(
    stream: io.BufferedIOBase, size: int, ends_at_blank_line: bool, path: str
) -> Iterator[bytes]:
    """Yields blocks of about `size` bytes that end with a record."""
    buffer = b""
    while more := stream.read(size):  # buffered: shorter than `size` only at the end of the file
        buffer += more
        if ends_at_blank_line:
            blank = _LAST_BLANK.match(buffer)
            cut = blank.end() if blank else 0
        else:
            cut = buffer.rfind(b"\n") + 1
        if not cut and len(buffer) >= _MAX_CHUNKS_PER_DOCUMENT * size:
            cut = buffer.rfind(b"\n") + 1
            if not cut:
                fix = "check that the file is text, or raise chunk_bytes"
                fail(path, "line breaks", f"none in {len(buffer):,} bytes", fix)
        if cut:
            yield buffer[:cut]
            buffer = buffer[cut:]
    if buffer:
        yield buffer


def _row_pieces(
    source: Source, texts: Iterator[tuple[int, Any]], options: Options
) -> Iterator[tuple[Piece, int]]:
    batch, size = [], 0
    for number, text in texts:
        batch.append((number, text))
        size += len(text) if isinstance(text, str | bytes) else 0
        if size >= options.chunk_bytes:
            yield Piece(source, batch[0][0], batch), size
            batch, size = [], 0
    if batch:
        yield Piece(source, batch[0][0], batch), size


@contextmanager
def _open(source: Source) -> Iterator[Any]:
    """Opens a binary stream of the decompressed file."""
    suffix = Path(source.path).suffix.lower()
    if suffix == ".zst":
        import pyarrow

        with pyarrow.input_stream(source.path, compression="zstd") as stream:
            yield io.BufferedReader(stream)
        return
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)
    with opener(source.path, "rb") as stream:
        yield stream


def _tsv_header(path: str, stream: io.BufferedIOBase, column: str) -> tuple[tuple[int, int], int]:
    """((position of the column, number of columns), number of the first line of text)."""
    if column.isdecimal():
        return (int(column), 0), 1
    line = b""
    while not line.endswith(b"\n") and (more := stream.read(1)):
        line += more
    names = line.decode("utf-8-sig", errors="replace").rstrip("\r\n").split("\t")
    return (_column_position(path, column, names), len(names)), 2


def _column_position(path: str, column: str, names: list[str]) -> int:
    if names.count(column) != 1:
        fail_column(path, column, names, "; without a header give '0', '1' …")
    return names.index(column)


def _csv_texts(source: Source, options: Options) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses fields over 128 KiB
    with _open(source) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        first = first_record(lines)
        separator = column_separator("".join(first), [options.text])
        reader = csv.reader(itertools.chain(first, lines), delimiter=separator, strict=True)
        position, num_columns = None, 0
        if options.text.isdecimal():
            position = int(options.text)
        while True:
            start = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                # A stray quote takes lines with it: each of them counts, so that none is lost
                # without a word.
                for line in range(start, max(reader.line_num, start) + 1):
                    yield line, Unreadable(f"a broken CSV row from line {start} on: {error}")
                continue
            if row is None:
                return
            if not row:  # a blank line
                continue
            if position is None:
                position = _column_position(source.path, options.text, row)
                num_columns = len(row)
            else:
                yield start, _field(row, position, num_columns)


def _parquet_texts(source: Source, options: Options) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with _open(source) as stream:
            is_plain = Path(source.path).suffix.lower() == ".parquet"
            file = parquet.ParquetFile(source.path if is_plain else io.BytesIO(stream.read()))
        if options.text not in file.schema_arrow.names:
            fail_column(source.path, options.text, file.schema_arrow.names)
        kind = file.schema_arrow.field(options.text).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            fail(source.path, f"text in column {options.text!r}", str(kind), "name another column")
        number = 0
        for batch in file.iter_batches(1000, columns=[options.text]):
            for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                number += 1
                yield number, text
    except pyarrow.ArrowException as error:
        fail(source.path, "a Parquet file", f"{error}", "write it again")


def _dataset_texts(source: Source, options: Options) -> Iterator[tuple[int, Any]]:
    data = load_dataset(source.path, options.split, [options.text])
    number = 0
    for batch in data.with_format(None).select_columns([options.text]).iter(1000):
        for text in batch[options.text]:
            number += 1
            yield number, text


def _texts(piece: Piece, options: Options) -> Iterator[tuple[int, Any]]:
    """Yields (line or row number, text, bytes, None or Unreadable) of every record."""
    if isinstance(piece.content, list):
        yield from piece.content
        return
    content = piece.content
    if piece.first == 1:
        content = content.removeprefix(b"\xef\xbb\xbf")
    lines = content.split(b"\n")
    if piece.source.kind == ".txt":
        yield from _text_documents(lines, piece.first, options.document_end == "line")
        return
    for number, line in enumerate(lines, piece.first):
        if line.strip():
            read = _jsonl_text if piece.source.kind == ".jsonl" else _tsv_text
            yield number, read(line, options.text, piece.header)


def _text_documents(
    lines: list[bytes], first: int, by_line: bool
) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number of the first line, text) of every document, or of every line."""
    block, start = [], first
    for number, line in enumerate(lines, first):
        stripped = line.strip()
        if stripped:
            start = start if block else number
            block.append(stripped)
        if block and (by_line or not stripped):
            yield start, b"\n".join(block)
            block = []
    if block:
        yield start, b"\n".join(block)


def _jsonl_text(line: bytes, column: str, _: tuple[int, int]) -> Any:
    try:
        row = parse_json(line)
    except ValueError as error:
        return Unreadable(f"not JSON: {error}")
    if not isinstance(row, dict):
        return Unreadable(f"expected an object, got {short(row)}")
    return row[column] if column in row else Unreadable(f"no key {column!r}: {short(list(row))}")


def _tsv_text(line: bytes, _: str, header: tuple[int, int]) -> Any:
    fields = line.rstrip(b"\r").split(b"\t")
    return _field(fields, *header)


def _field(row: Sequence[Any], position: int, num_columns: int) -> Any:
    if position < len(row) and num_columns in (0, len(row)):
        return row[position]
    return Unreadable(f"{len(row)} columns, expected {num_columns or f'at least {position + 1}'}")


_SURROGATE = re.compile("[\ud800-\udfff]")


def _decode(text: Any) -> str | Unreadable:
    if isinstance(text, Unreadable):
        return text
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            return Unreadable(f"not UTF-8: {error.reason} at byte {error.start}")
    if not isinstance(text, str):
        return Unreadable(f"expected text, got {short(text)}")
    if _SURROGATE.search(text):
        return Unreadable("not UTF-8: a lone surrogate")
    return text if text.strip() else Unreadable("no text")
