"""Reads the documents of plain-text corpora: .txt and .jsonl files, folders and globs."""

import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinybert_jax.data.errors import fail, fail_missing
from tinybert_jax.data.tables import read_jsonl, read_utf8, split_lines, texts_in

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def read_corpus(paths: Sequence[str]) -> list[str]:
    """The documents of .txt files (separated by blank lines) and .jsonl files (key `text`).

    `paths`: files, folders (read recursively in sorted order, without hidden files and other file
    types) and globs of files (in sorted order). Single newlines join the lines of a document.
    Raises ValueError for paths and rows that cannot be read and for compressed files in a folder.
    """
    if isinstance(paths, str) or not paths:
        fail("corpus", "a list of files, folders or globs", repr(paths), "write it as ['a.txt']")
    paths = [os.path.expanduser(path) for path in paths]
    files = corpus_files(paths, (".txt", ".jsonl"), ".txt or .jsonl")
    for folder in filter(os.path.isdir, paths):
        found = (f for f in sorted(Path(folder).rglob("*")) if f.suffix in COMPRESSED)
        compressed = next(found, None)
        if compressed:
            fix = "decompress it, or make a token store of the folder with `tinybert data prepare`"
            fail(f"corpus: {folder}", "text files that are not compressed", str(compressed), fix)
    return [document for file in files for document in _documents(file)]


def corpus_files(paths: Sequence[str], suffixes: tuple[str, ...], file_types: str) -> list[str]:
    """Expands files, folders and globs to files with the suffixes; errors name `file_types`.

    Raises ValueError for a path without such files and for a file that is listed twice.
    """
    files = [file for path in paths for file in _expand_path(os.fspath(path), suffixes, file_types)]
    twice = next((file for file, count in Counter(files).items() if count > 1), None)
    if twice is not None:
        fail("corpus", "every file once", f"{twice} more than once", "narrow the list of paths")
    return files


def _expand_path(path: str, suffixes: tuple[str, ...], file_types: str) -> Iterator[str]:
    if os.path.isdir(path):
        found = [f for f in sorted(Path(path).rglob("*")) if f.name.lower().endswith(suffixes)]
        files = [str(f) for f in found if f.is_file() and "/." not in f"/{f.relative_to(path)}"]
        if not files:
            fail(path, f"a folder with {file_types} files", "none", "check the folder")
        yield from files
    elif os.path.isfile(path):
        if not path.lower().endswith(suffixes):
            fail(path, f"a {file_types} file", repr(Path(path).suffix), "convert or leave it out")
        yield path
    elif glob.has_magic(path):
        matches = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not matches:
            fix = f"correct it; relative paths start at {os.getcwd()}"
            fail(path, "a glob that matches files", "none", fix)
        for match in matches:
            yield from _expand_path(match, suffixes, file_types)
    else:
        fail_missing(path)


def _documents(path: str) -> list[str]:
    """The documents of one file, with stripped lines and without blank lines."""
    if path.lower().endswith(".jsonl"):
        blocks = [text.split("\n") for text in texts_in(read_jsonl(path, ["text"]), "text")]
    else:
        lines = read_utf8(path).split("\n")
        groups = itertools.groupby(lines, key=lambda line: not line.strip())
        blocks = [list(block) for is_blank, block in groups if not is_blank]
    return ["\n".join(line.strip() for line in block if line.strip()) for block in blocks]


def is_plain_text(path: str, format: str) -> bool:
    """Whether a file holds a text a line: .txt with `auto`; with `text` all that is no table."""
    suffix = Path(path).suffix.lower()
    if format == "text":
        return suffix not in (".tsv", ".csv", ".jsonl")
    return format == "auto" and suffix == ".txt"


def read_lines(path: str, *, keep_blank: bool = False) -> list[str]:
    """The stripped lines of a file of plain text; blank ones are left out, or kept as ""."""
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        fail_missing(path)
    lines = [line.strip() for line in split_lines(read_utf8(path))]
    return lines if keep_blank else [line for line in lines if line]
