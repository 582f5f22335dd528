"""Makes a token store of text: hands chunks to workers, appends their rows in order, resumes.

The rows of a chunk depend only on (chunk, settings, tokenizer), so any process or machine can
compute them; they are appended in the order of the chunks. The store is written as OUTPUT.partial;
a stopped run resumes after the last chunk in the index of that folder.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np

from tinybert_jax.config.data import PrepareConfig
from tinybert_jax.data import records
from tinybert_jax.data.errors import fail, listed
from tinybert_jax.data.records import Source
from tinybert_jax.data.wordpiece import backend_json
from tinybert_jax.performance import host
from tinybert_jax.tokens import store
from tinybert_jax.tokens.instances import Layout
from tinybert_jax.tokens.store import StoreWriter
from tinybert_jax.tokens.transform import (
    ChunkResult,
    TransformSpec,
    make_transform,
    read_options,
    remaining_chunks,
)
from tinybert_jax.tokens.workers import run_in_processes

_IDENTITY, _BAD_RECORDS = "identity.json", "bad_records.jsonl"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MIN_RECORDS = 1000  # until all text is read, bad records are a share of at least so many records


def prepare(
    config: PrepareConfig, tokenizer: Any, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Writes or resumes the store of a config; returns the folder.

    `say` receives a line of progress after every chunk. Raises ValueError if a source cannot be
    read or changed, if the output is no store, and if the disk is full; LostWorkerError if a worker
    process ends or stops.
    """
    sources = tuple(map(os.path.expanduser, config.sources))
    output = Path(os.path.expanduser(config.output))
    config = config.model_copy(update={"output": str(output), "sources": sources})
    if output.exists() and not (output / store.MANIFEST).is_file():
        got = f"a folder without {store.MANIFEST}" if output.is_dir() else "a file"
        fail(f"output: {output}", "a new folder or a store", got, "choose another output")
    _refuse_output_in_sources(config)
    spec = _make_spec(config, tokenizer)
    sources = records.find_sources(config.sources)
    options = read_options(spec.settings)
    identity = {
        "settings": spec.settings,
        "tokenizer_sha256": hashlib.sha256(spec.tokenizer.encode()).hexdigest(),
        "sources": {s.path: records.source_sha256(s, options) for s in sources},
    }
    if output.exists():
        _refuse_changes(output, store.read_manifest(output), identity, config)
        return output
    partial = store.partial_of(output)
    try:
        with host.locked_folder(partial, "output"):
            _write_identity(partial, identity, config)
            layout, shard_rows = spec.layout, config.shard_rows
            writer = StoreWriter(partial, layout.width, np.dtype(layout.dtype), shard_rows)
            _append_chunks(config, writer, spec, sources, say)
            _refuse_changed_sources(config, sources)
            _finish(output, writer, spec, identity)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        fix = "free disk space and run the same command again to resume"
        fail(f"output: {partial}", "room on the disk", f"{error.strerror}", fix)
    return output


def _make_spec(config: PrepareConfig, tokenizer: Any) -> TransformSpec:
    layout = Layout(
        width=config.width,
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
        pad_id=tokenizer.pad_token_id,
        dtype=store.ids_dtype(len(tokenizer)).str,
    )
    return TransformSpec(
        tokenizer=backend_json(tokenizer),
        settings=config.transform(),
        layout=layout,
        unk_id=tokenizer.unk_token_id,
        mask_id=tokenizer.mask_token_id,
    )


def _write_identity(partial: Path, identity: dict[str, Any], config: PrepareConfig) -> None:
    """Writes the identity of a new store; compares it with that of a store that has rows."""
    path = partial / _IDENTITY
    # A run killed just before it renames the folder leaves a manifest and no identity file.
    recorded = next((p for p in (path, partial / store.MANIFEST) if p.is_file()), None)
    index = partial / store.INDEX
    if recorded and index.is_file() and index.stat().st_size:
        fix = f"remove {partial} and prepare again"
        before = store.read_object(recorded, fix)
        if not set(identity) <= set(before):
            fail(str(recorded), f"the keys {listed(list(identity))}", listed(list(before)), fix)
        _refuse_changes(partial, before, identity, config)
        return
    new = partial / f"{_IDENTITY}.new"
    new.write_text(json.dumps(identity, ensure_ascii=False), encoding="utf-8")
    new.rename(path)


def _refuse_changes(
    folder: Path, before: dict[str, Any], now: dict[str, Any], config: PrepareConfig
) -> None:
    """Raises ValueError that names a tokenizer, source or setting changed since `folder` began."""
    fix = f"undo the change, name another output, or remove {folder} to start again"
    if before["tokenizer_sha256"] != now["tokenizer_sha256"]:
        expected = f"the tokenizer that {folder} was started with"
        fail(config.tokenizer, expected, "a changed one", fix)
    for path in dict.fromkeys([*before["sources"], *now["sources"]]):
        first, second = before["sources"].get(path), now["sources"].get(path)
        if first != second:
            got = "a changed one" if first and second else "a new one" if second else "none"
            fail(path, f"the source that {folder} was started with", got, fix)
    for name, value in now["settings"].items():
        if before["settings"].get(name) != value:
            expected = f"{before['settings'].get(name)!r}, with which {folder} was started"
            fail(name, expected, repr(value), fix)
    if list(before["sources"]) != list(now["sources"]):
        fail("sources", f"the order that {folder} was started with", "another order", fix)


def _refuse_output_in_sources(config: PrepareConfig) -> None:
    output = Path(config.output).resolve()
    for source in config.sources:
        if Path(source).is_dir() and output.is_relative_to(Path(source).resolve()):
            expected = f"a folder outside of {source}"
            fix = "choose another; the next run would read the store as text"
            fail(f"output: {config.output}", expected, "a folder in it", fix)


def _refuse_changed_sources(config: PrepareConfig, sources: list[Source]) -> None:
    now = records.find_sources(config.sources)
    if now != sources:
        changed = next((a.path for a, b in zip(sources, now, strict=False) if a != b), "sources")
        fix = f"remove {store.partial_of(Path(config.output))} and prepare again"
        fail(changed, "text that does not change while it is read", "changed text", fix)


def _append_chunks(
    config: PrepareConfig,
    writer: StoreWriter,
    spec: TransformSpec,
    sources: list[Source],
    say: Callable[[str], None],
) -> None:
    """Appends the rows of all chunks that the index does not list yet."""
    last = writer.entries[-1] if writer.entries else {"group": 0, "number": -1}
    groups = list(enumerate(records.group_sources(sources, config.chunk_bytes)))[last["group"] :]
    done = (last["group"], last["number"])
    workers = config.workers or os.cpu_count() or 1
    num = sum(entry["records"] for entry in writer.entries)
    bad = sum(len(entry["bad"]) for entry in writer.entries)
    if writer.entries:
        say(f"{writer.folder}: resumes after {num:,} records, {writer.num_rows:,} rows")
    with contextlib.closing(_ENGINES[config.engine](spec, groups, done, workers)) as results:
        for rows, entry in results:
            writer.append(rows, entry)
            num, bad = num + entry["records"], bad + len(entry["bad"])
            say(f"{num:,} records, {writer.num_rows:,} rows so far, now in {entry['source']}")
            _check_bad_share(config, writer, bad, max(num, _MIN_RECORDS))
    _check_bad_share(config, writer, bad, num)


def _run_processes(
    spec: TransformSpec, groups: list[tuple[int, list[Source]]], done: tuple[int, int], workers: int
) -> Generator[ChunkResult, None, None]:
    """Yields results in the order of the chunks; one worker is this process itself."""
    options = read_options(spec.settings)
    chunks = itertools.chain.from_iterable(
        remaining_chunks(group, done, options) for group in groups
    )
    if workers == 1:
        yield from map(make_transform(spec), chunks)
    else:
        yield from run_in_processes(make_transform, spec, chunks, workers)


def _run_ray(
    spec: TransformSpec, groups: list[tuple[int, list[Source]]], done: tuple[int, int], workers: int
) -> Generator[ChunkResult, None, None]:
    from tinybert_jax.tokens import ray

    return ray.run(spec, groups, done, workers)


_ENGINES = {"processes": _run_processes, "ray": _run_ray}


def _check_bad_share(config: PrepareConfig, writer: StoreWriter, bad: int, num: int) -> None:
    """Raises ValueError if more than the allowed share of `num` records is bad; lists them."""
    if bad <= config.max_bad_share * num:
        return
    listed = writer.folder / _BAD_RECORDS
    lines = _bad_record_lines(writer)
    listed.write_text(lines, encoding="utf-8")
    first = ", ".join(lines.split("\n")[:3])
    fix = (
        "raise max_bad_share and run again to resume; or correct the sources, remove "
        f"{writer.folder} and start again"
    )
    expected = f"at most {config.max_bad_share:.2%} of the records to be bad"
    fail(f"{listed}", expected, f"{bad}, the first: {first}", fix)


def _bad_record_lines(writer: StoreWriter) -> str:
    items = (item for entry in writer.entries for item in entry["bad"])
    names = ("source", "place", "reason")
    return "".join(
        json.dumps(dict(zip(names, item, strict=True)), ensure_ascii=False) + "\n" for item in items
    )


def _finish(
    output: Path, writer: StoreWriter, spec: TransformSpec, identity: dict[str, Any]
) -> None:
    def total(name: str) -> int:
        return sum(entry[name] for entry in writer.entries)

    if not writer.num_rows:
        fail("sources", "text", f"none in {total('records')} records", "check the files")
    labels = sum((Counter(entry["labels"]) for entry in writer.entries), Counter())
    settings, layout = spec.settings, spec.layout
    if settings["mode"] == "pairs" and set(labels) == {"-1"}:
        fix = "set document_end to what separates the documents, raise chunk_bytes, or set mode: "
        got = "chunks of only one document or sentence each"
        fail("mode: pairs", "pairs of texts", got, fix + "documents")
    manifest = {
        "width": layout.width,
        "ids_dtype": layout.dtype,
        "shard_rows": settings["shard_rows"],
        "num_rows": writer.num_rows,
        "num_tokens": total("tokens"),
        "num_segments": total("segments"),
        "num_documents": total("documents"),
        "num_records": total("records"),
        "num_bad_records": sum(len(entry["bad"]) for entry in writer.entries),
        "num_unknown_tokens": total("unknown"),
        "labels": dict(sorted(labels.items())),
        "special_ids": {
            "pad": layout.pad_id,
            "cls": layout.cls_id,
            "sep": layout.sep_id,
            "unk": spec.unk_id,
            "mask": spec.mask_id,
        },
        **identity,
    }
    files = {_BAD_RECORDS: _bad_record_lines(writer), store.TOKENIZER: spec.tokenizer}
    writer.finish(output, manifest, files)
