"""Text -> a token store. Owns the order of work: what is read, by whom, and what is already done.

A chunk of text becomes rows by a pure function of (chunk, settings, tokenizer): processes or a
cluster may run it anywhere, and the rows are appended in the order of the chunks. The store is
written as OUTPUT.partial; a run that was stopped goes on after the last chunk of its index.
"""

import errno
import hashlib
import itertools
import json
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from tinybert_jax.config.data import PrepareConfig
from tinybert_jax.data import records
from tinybert_jax.data.errors import fail
from tinybert_jax.data.records import Chunk, Source
from tinybert_jax.data.wordpiece import backend_json
from tinybert_jax.performance import host
from tinybert_jax.tokens import store
from tinybert_jax.tokens.instances import Layout
from tinybert_jax.tokens.store import StoreWriter
from tinybert_jax.tokens.transform import Done, Work, make_transform, read_options, todo

_IDENTITY, _BAD = "identity.json", "bad_records.jsonl"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MIN_RECORDS = 1000  # before these a share of bad records says little


def prepare(
    config: PrepareConfig, tokenizer: Any, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Writes the store of a config, or goes on with it; returns its folder.

    `say` hears of each chunk, how far it is.
    Raises ValueError where a source, the output or the disk does not allow it.
    """
    output = Path(config.output)
    if output.exists() and not (output / store.MANIFEST).is_file():
        fail(f"output: {output}", "a new folder or a store", "something else", "name another")
    _refuse_output_in_sources(config)
    work = _work(config, tokenizer)
    sources = records.find_sources(config.sources)
    options = read_options(work.settings)
    identity = {
        "settings": work.settings,
        "tokenizer_sha256": hashlib.sha256(work.tokenizer.encode()).hexdigest(),
        "sources": {s.path: records.source_sha256(s, options) for s in sources},
    }
    if output.exists():
        _refuse_changes(output, store.read_manifest(output), identity, config)
        return output
    partial = store.partial_of(output)
    try:
        with host.locked(partial, "output"):
            _keep_identity(partial, identity, config)
            layout, shard_rows = work.layout, config.shard_rows
            writer = StoreWriter(partial, layout.width, np.dtype(layout.dtype), shard_rows)
            _fill(config, writer, work, sources, say)
            _refuse_moving_sources(config, sources)
            _finish(output, writer, work, identity)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        fix = "make room and run the same command again: it goes on"
        fail(f"output: {partial}", "room on the disk", f"{error.strerror}", fix)
    return output


def _work(config: PrepareConfig, tokenizer: Any) -> Work:
    layout = Layout(
        width=config.width,
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
        pad_id=tokenizer.pad_token_id,
        dtype=store.ids_dtype(len(tokenizer)).str,
    )
    return Work(
        tokenizer=backend_json(tokenizer),
        settings=config.transform(),
        layout=layout,
        unk_id=tokenizer.unk_token_id,
        mask_id=tokenizer.mask_token_id,
    )


def _keep_identity(partial: Path, identity: dict[str, Any], config: PrepareConfig) -> None:
    path = partial / _IDENTITY
    # A manifest alone: killed when all was there but the folder's final name.
    known = next((p for p in (path, partial / store.MANIFEST) if p.is_file()), None)
    index = partial / store.INDEX
    if known and index.is_file() and index.stat().st_size:  # else no text is in it yet
        _refuse_changes(partial, json.loads(known.read_text(encoding="utf-8")), identity, config)
        return
    aside = partial / f"{_IDENTITY}.new"
    aside.write_text(json.dumps(identity, ensure_ascii=False), encoding="utf-8")
    aside.rename(path)


def _refuse_changes(
    folder: Path, before: dict[str, Any], now: dict[str, Any], config: PrepareConfig
) -> None:
    """One store has one origin: names what is not as it was when the folder was begun."""
    fix = f"undo the change, name another output, or remove {folder} to prepare anew"
    if before["tokenizer_sha256"] != now["tokenizer_sha256"]:
        fail(config.tokenizer, f"the tokenizer that {folder} was begun with", "a changed one", fix)
    for path in dict.fromkeys([*before["sources"], *now["sources"]]):
        first, second = before["sources"].get(path), now["sources"].get(path)
        if first != second:
            got = "a changed one" if first and second else "a new one" if second else "none"
            fail(path, f"the source that {folder} was begun with", got, fix)
    for name, value in now["settings"].items():
        if before["settings"][name] != value:
            expected = f"{before['settings'][name]!r}, as {folder} was begun with"
            fail(name, expected, repr(value), fix)
    if list(before["sources"]) != list(now["sources"]):
        fail("sources", f"the order that {folder} was begun with", "another", fix)


def _refuse_output_in_sources(config: PrepareConfig) -> None:
    output = Path(config.output).resolve()
    for source in config.sources:
        if Path(source).is_dir() and output.is_relative_to(Path(source).resolve()):
            fix = "else the next run would read what this one wrote"
            fail(f"output: {config.output}", f"a folder outside of {source}", "one in it", fix)


def _refuse_moving_sources(config: PrepareConfig, sources: list[Source]) -> None:
    now = records.find_sources(config.sources)
    if now != sources:
        changed = next((a.path for a, b in zip(sources, now, strict=False) if a != b), "sources")
        fix = f"remove {store.partial_of(Path(config.output))} and prepare again"
        fail(changed, "text that stays as it is while it is read", "a changed one", fix)


def _fill(
    config: PrepareConfig,
    writer: StoreWriter,
    work: Work,
    sources: list[Source],
    say: Callable[[str], None],
) -> None:
    """Appends the rows of all chunks that the index does not hold yet."""
    last = writer.entries[-1] if writer.entries else {"group": 0, "number": -1}
    groups = list(enumerate(records.group_sources(sources, config.chunk_bytes)))[last["group"] :]
    done = (last["group"], last["number"])
    workers = config.workers or os.cpu_count() or 1
    num = sum(entry["records"] for entry in writer.entries)
    bad = sum(len(entry["bad"]) for entry in writer.entries)
    if writer.entries:
        say(f"{writer.folder}: goes on after {num:,} records, {writer.num_rows:,} rows")
    for rows, entry in _ENGINES[config.engine](work, groups, done, workers):
        writer.append(rows, entry)
        num, bad = num + entry["records"], bad + len(entry["bad"])
        say(f"{num:,} records, {writer.num_rows:,} rows so far, now in {entry['source']}")
        _check_bad(config, writer, bad, max(num, _MIN_RECORDS))
    _check_bad(config, writer, bad, num)


def _in_processes(
    work: Work, groups: list[tuple[int, list[Source]]], done: tuple[int, int], workers: int
) -> Iterator[Done]:
    """In the order of the chunks; only a few more than `workers` are in memory."""
    options = read_options(work.settings)
    chunks = itertools.chain.from_iterable(todo(group, done, options) for group in groups)
    if workers == 1:
        yield from map(make_transform(work), chunks)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (work,))
    waiting: deque[Future[Done]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_transform_here, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        fix = "run again: it goes on; with fewer workers or chunk_bytes if memory ran out"
        fail("workers", "processes that live", "one that was killed", fix)
    finally:
        pool.shutdown(cancel_futures=True)


_here: dict[str, Callable[[Chunk], Done]] = {}  # of a worker process


def _start_worker(work: Work) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _here["transform"] = make_transform(work)


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, who would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _transform_here(chunk: Chunk) -> Done:
    return _here["transform"](chunk)


def _on_ray(
    work: Work, groups: list[tuple[int, list[Source]]], done: tuple[int, int], workers: int
) -> Iterator[Done]:
    from tinybert_jax.tokens import ray

    return ray.run(work, groups, done, workers)


_ENGINES = {"processes": _in_processes, "ray": _on_ray}


def _check_bad(config: PrepareConfig, writer: StoreWriter, bad: int, num: int) -> None:
    if bad <= config.max_bad_share * num:
        return
    listed = writer.folder / _BAD
    lines = _bad_lines(writer)
    listed.write_text(lines, encoding="utf-8")
    first = ", ".join(lines.split("\n")[:3])
    fix = (
        "raise max_bad_share and run again: it goes on; or correct the sources, remove "
        f"{writer.folder} and prepare anew"
    )
    expected = f"at most {config.max_bad_share:.2%} of the records to be bad"
    fail(f"{listed}", expected, f"{bad}, the first: {first}", fix)


def _bad_lines(writer: StoreWriter) -> str:
    items = (item for entry in writer.entries for item in entry["bad"])
    names = ("source", "place", "reason")
    return "".join(
        json.dumps(dict(zip(names, item, strict=True)), ensure_ascii=False) + "\n" for item in items
    )


def _finish(output: Path, writer: StoreWriter, work: Work, identity: dict[str, Any]) -> None:
    def total(name: str) -> int:
        return sum(entry[name] for entry in writer.entries)

    if not writer.num_rows:
        fail("sources", "text", f"none in {total('records')} records", "check the files")
    labels = sum((Counter(entry["labels"]) for entry in writer.entries), Counter())
    settings, layout = work.settings, work.layout
    if settings["mode"] == "pairs" and set(labels) == {"-1"}:
        fix = "let blank lines or lines part the documents, raise chunk_bytes, or use documents"
        fail("mode: pairs", "pairs of texts", "no text with a partner in its chunk", fix)
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
            "unk": work.unk_id,
            "mask": work.mask_id,
        },
        **identity,
    }
    writer.finish(output, manifest, {_BAD: _bad_lines(writer), store.TOKENIZER: work.tokenizer})
