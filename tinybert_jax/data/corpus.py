"""Documents of plain corpora: .txt and .jsonl files, folders and globs of them."""

import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinybert_jax.data.errors import fail, fail_missing
from tinybert_jax.data.tables import read_jsonl, read_utf8, texts_in

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def read_corpus(paths: Sequence[str]) -> list[str]:
    """The documents of .txt files (parted by blank lines) and .jsonl files (each row's `text`).

    `paths`: files, folders (walked in sorted order; hidden files and other kinds are passed over)
    and globs of files (expanded in sorted order). The lines of a document are joined by single
    newlines. Raises ValueError for all that is wrong, compressed files in a folder too.
    """
    if isinstance(paths, str) or not paths:
        fail("corpus", "a list of files, folders or globs", repr(paths), "write it as ['a.txt']")
    files = corpus_files(paths, (".txt", ".jsonl"), ".txt or .jsonl")
    for folder in filter(os.path.isdir, paths):
        packed = next((f for f in sorted(Path(folder).rglob("*")) if f.suffix in COMPRESSED), None)
        if packed:
            fix = "unpack it, or make a store of the folder with `tinybert data prepare`"
            fail(f"corpus: {folder}", "text files that are not compressed", str(packed), fix)
    return [document for file in files for document in _documents(file)]


def corpus_files(paths: Sequence[str], suffixes: tuple[str, ...], named: str) -> list[str]:
    """Files, folders and globs as files, each once; `named` is what an error calls the suffixes."""
    files = [file for path in paths for file in _files_at(os.fspath(path), suffixes, named)]
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        fail("corpus", "every file once", f"{twice} more than once", "narrow the list of paths")
    return files


def _files_at(path: str, suffixes: tuple[str, ...], named: str) -> Iterator[str]:
    if os.path.isdir(path):
        found = [f for f in sorted(Path(path).rglob("*")) if f.name.lower().endswith(suffixes)]
        files = [str(f) for f in found if f.is_file() and "/." not in f"/{f.relative_to(path)}"]
        if not files:
            fail(path, f"a folder with {named} files", "none", "check the folder")
        yield from files
    elif os.path.isfile(path):
        if not path.lower().endswith(suffixes):
            fail(path, f"a {named} file", repr(Path(path).suffix), "convert or leave it out")
        yield path
    elif glob.has_magic(path):
        matches = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not matches:
            fail(path, "a glob that matches files", "none", f"check it; we are in {os.getcwd()}")
        for match in matches:
            yield from _files_at(match, suffixes, named)
    else:
        fail_missing(path)


def _documents(path: str) -> list[str]:
    if path.lower().endswith(".jsonl"):
        blocks = [text.split("\n") for text in texts_in(read_jsonl(path, ["text"]), "text")]
    else:
        lines = read_utf8(path).split("\n")
        by_blank = itertools.groupby(lines, key=lambda line: not line.strip())
        blocks = [list(block) for is_blank, block in by_blank if not is_blank]
    return ["\n".join(line.strip() for line in block if line.strip()) for block in blocks]
