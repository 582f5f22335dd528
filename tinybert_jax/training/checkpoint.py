"""Writes and reads checkpoints of training state. The only file that imports Orbax.

A checkpoint is a folder `<step>`, written under another name, synced to the disk and renamed when
complete. It holds the SHA-256 of every file and of every array, because Orbax restores flipped bits
without an error. Whoever reads a checkpoint locks its manifest, and nobody removes it meanwhile.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.parallel import processes, replicas
from tinybert_jax.performance import disk
from tinybert_jax.training import shards

_STATE, _META, _MANIFEST = "state", "meta.json", "manifest.json"
_PARTIAL, _DAMAGED = "partial-", "damaged-"
_READ_WAITS = (0.25, 1.0)  # seconds before a refused read is tried again
_SPARE_BYTES, _SPARE_FILES = 2**16, 40  # what a checkpoint needs beside its arrays
# What a file system without locks answers: readers are then not waited for.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_T = TypeVar("_T")


class Restored(NamedTuple):
    step: int
    tree: Any
    meta: dict[str, Any]


def save(folder: Path, step: int, tree: Any, meta: dict[str, Any], *, keep: int = 2) -> Path:
    """Writes the checkpoint `folder/<step>` and removes all but the newest `keep` checkpoints.

    `meta`: a JSON object stored beside the arrays. An existing checkpoint of `step` is replaced.
    """
    written = write(folder, step, fetch(tree), json.dumps(meta))
    prune(folder, last=keep)
    return written


def fetch(tree: Any) -> Any:
    """A copy of all arrays in the host's memory, which a step that donates them leaves alone.

    Of several processes each copies the parts that it writes; LostProcessError: copies differ.
    """
    if processes.count() > 1:
        named = named_leaves(jax.tree.map(_raw_key, tree))
        replicas.check(named, "at a save")
        return shards.copy_parts(named)
    return jax.tree.map(lambda leaf: np.array(_raw_key(leaf)), tree)


def write(folder: Path, step: int, tree: Any, meta: str) -> Path:
    """Writes the checkpoint `folder/<step>` of a tree that `fetch` gave; returns when it is safe.

    `meta`: JSON. Raises OSError, or an error of Orbax, where the file system refuses something, in
    all processes alike.
    """
    partial, final = folder / f"{_PARTIAL}{step}", folder / str(step)

    def begin() -> None:
        disk.make_folder(folder)
        remove_partial(folder)
        leaves = jax.tree.leaves(tree)
        _check_room(folder, getattr(tree, "num_bytes", 0) or sum(leaf.nbytes for leaf in leaves))
        partial.mkdir()
        (partial / _META).write_text(meta, encoding="utf-8")

    def end() -> None:
        manifest = {"files": _hashes(partial), "arrays": arrays}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        disk.sync_tree(partial)
        if final.exists() and not _remove(final):  # a reader has it, whose copy then lacks it
            final.rename(folder / f"{_PARTIAL}read-{step}")
        partial.rename(final)
        disk.sync(folder)

    processes.on_main("checkpoint begins", begin)
    arrays = processes.together("checkpoint", lambda: _write_arrays(partial, tree))
    processes.on_main("checkpoint ends", end)
    return final


def _write_arrays(partial: Path, tree: Any) -> dict[str, str]:
    """Writes the arrays, or this process's parts of them; returns the hashes of whole arrays."""
    import orbax.checkpoint as ocp

    if isinstance(tree, shards.Parts):
        shards.write(partial, tree)
        return {}
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)  # it takes the step's processors
    with ThreadPoolExecutor(1) as pool, ocp.Checkpointer(handler) as checkpointer:
        arrays = pool.submit(_array_hashes, tree)
        checkpointer.save(partial / _STATE, args=ocp.args.PyTreeSave(tree))
    return arrays.result()


def remove_partial(folder: Path) -> None:
    """Removes what a kill has left of a checkpoint that was being written or removed."""
    for leftover in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover)


def prune(
    folder: Path, *, last: int, every: int | None = None, also: Collection[int] = ()
) -> list[int]:
    """Removes checkpoints; returns their steps.

    Kept are the newest `last`, those of multiples of `every`, the steps `also`, and every
    checkpoint that somebody reads.
    """
    old = [step for step in steps(folder)[:-last] if step not in also]
    unwanted = [step for step in old if not every or step % every]
    return [step for step in unwanted if _remove(folder / str(step))]


def _check_room(folder: Path, num_bytes: int) -> None:
    """Raises OSError where the file system has too little room: Orbax would find that too late."""
    stats = os.statvfs(folder)
    free, needed = stats.f_bavail * stats.f_frsize, num_bytes + _SPARE_BYTES
    if free < needed:
        found = f"{needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {found}", str(folder))
    if stats.f_files and stats.f_favail < _SPARE_FILES:
        found = f"{_SPARE_FILES} files needed, room for {stats.f_favail}"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {found}", str(folder))


def _remove(checkpoint: Path) -> bool:
    """Removes a checkpoint; returns False where somebody reads it."""
    with contextlib.ExitStack() as stack:
        try:
            # "r+b": NFS grants an exclusive lock only on a file that is open for writing.
            manifest = stack.enter_context((checkpoint / _MANIFEST).open("r+b"))
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            pass  # damaged: nobody reads it
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        # Under another name first: a kill does not leave half a checkpoint.
        removed = checkpoint.with_name(f"{_PARTIAL}removed-{checkpoint.name}")
        shutil.rmtree(removed, ignore_errors=True)
        checkpoint.rename(removed)
        shutil.rmtree(removed)
    return True


@contextlib.contextmanager
def pinned(checkpoint: Path) -> Iterator[None]:
    """Only a new one of its step takes its place inside; FileNotFoundError where it is gone."""
    with (checkpoint / _MANIFEST).open("rb") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_SH)
        if not os.fstat(manifest.fileno()).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "removed meanwhile", str(checkpoint))
        yield


def discard_after(folder: Path, step: int) -> None:
    """Removes the checkpoints after `step`, which a run that resumes at `step` may not repeat."""
    for later in steps(folder):
        if later > step:
            _remove(folder / str(later))


def restore_newest(folder: Path, abstract: Any) -> Restored | None:
    """Restores the newest intact checkpoint; returns None if there is none.

    `abstract` is a tree of ShapeDtypeStructs with shardings. Damaged checkpoints are set aside as
    `intact_steps` does. Raises ValueError for an intact checkpoint with other arrays.
    """
    for step in intact_steps(folder):
        restored = restore(folder, step, abstract)
        if restored is not None:
            return restored
    return None


def intact_steps(folder: Path, among: Collection[int] | None = None) -> Iterator[int]:
    """The steps of intact checkpoints, newest first; `among`: only these are looked at.

    A damaged checkpoint is renamed to `damaged-<step>` with a warning. Raises OSError where the
    storage cannot be read, which is no damage.
    """
    for step in reversed(steps(folder)):
        if among is not None and step not in among:
            continue
        damage = find_damage(folder / str(step))
        if damage is None:
            yield step
        else:
            _set_aside(folder / str(step), damage)


def restore(folder: Path, step: int, abstract: Any) -> Restored | None:
    """Restores an intact checkpoint.

    Where its arrays differ from their hashes, it is set aside, and None is returned. The arrays
    may have been saved by another number of processes, with other shardings.
    """
    checkpoint = folder / str(step)
    is_whole = processes.count() == 1 and not (checkpoint / shards.FOLDER).is_dir()
    read = _read_whole if is_whole else _read_parts
    with pinned(checkpoint):
        expected = read_manifest(checkpoint)["arrays"]
        try:
            raw, hashes = read(checkpoint, jax.tree.map(_raw_abstract, abstract), bool(expected))
        except ValueError as error:
            raise ValueError(
                f"{checkpoint}: expected the arrays that this version trains, got others "
                f"({str(error).splitlines()[0][:200]}); delete {folder.parent} to train this stage "
                "again, or resume with the version that started it"
            ) from error
        names = sorted(expected.keys() | hashes.keys())
        different = [name for name in names if expected.get(name) != hashes.get(name)]
        meta = read_meta(checkpoint)
    if different:
        damage = f"arrays differ from {_MANIFEST}: {different[:3]}"
        processes.on_main("set aside", lambda: _set_aside(checkpoint, damage))
        return None
    return Restored(step, jax.tree.map(_typed_key, abstract, raw), meta)


def _read_whole(checkpoint: Path, abstract: Any, is_hashed: bool) -> tuple[Any, dict[str, str]]:
    """(the arrays on the devices, their hashes) of a checkpoint that one process wrote."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(checkpoint / _STATE).item_metadata
        _check_shapes({name: leaf.shape for name, leaf in named_leaves(saved.tree)}, abstract)
        raw = checkpointer.restore(checkpoint / _STATE, abstract)
    return raw, _array_hashes(raw) if is_hashed else {}


def _read_parts(checkpoint: Path, abstract: Any, is_hashed: bool) -> tuple[Any, dict[str, str]]:
    """As `_read_whole`, of or by several processes: each reads what its devices hold."""
    hashes: dict[str, str] = {}
    if (checkpoint / shards.FOLDER).is_dir():
        sources = shards.open_arrays(checkpoint)
    else:
        arrays = read_arrays(checkpoint)
        sources = shards.of_whole(arrays)
        hashes = _array_hashes(arrays) if is_hashed else {}
    expected = named_leaves(abstract)
    if sources.keys() != (names := {name for name, _ in expected}):
        raise ValueError(f"other names: {sorted(sources.keys() ^ names)[:3]}")
    _check_shapes({name: own.shape for name, own in sources.items()}, abstract)
    placed = [shards.place(sources[name], leaf) for name, leaf in expected]
    return jax.tree.unflatten(jax.tree.structure(abstract), placed), hashes


def read_arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by name, such as `params.encoder.pooler.bias`."""
    import orbax.checkpoint as ocp

    if (checkpoint / shards.FOLDER).is_dir():
        sources = shards.open_arrays(checkpoint)
        return {name: own.read((slice(None),) * len(own.shape)) for name, own in sources.items()}
    alone = ocp.options.MultiprocessingOptions(
        primary_host=processes.index(), active_processes={processes.index()}
    )  # no process waits for another
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
        raw = checkpointer.restore(checkpoint / _STATE)
    return {name: np.ascontiguousarray(leaf) for name, leaf in named_leaves(raw)}


def read_meta(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / _META).read_text(encoding="utf-8"))


def _set_aside(checkpoint: Path, damage: str) -> None:
    damaged = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}")
    shutil.rmtree(damaged, ignore_errors=True)
    checkpoint.rename(damaged)
    warnings.warn(
        f"{checkpoint}: {damage}; renamed to {damaged.name}, trying the previous step",
        stacklevel=3,
    )


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], expected: Any) -> None:
    """Raises ValueError for an array of another shape.

    Orbax finds that only while it reads other arrays, and then leaves futures that fail later.
    """
    for name, leaf in named_leaves(expected):
        shape = shapes.get(name, leaf.shape)  # Orbax itself refuses missing arrays
        if tuple(shape) != leaf.shape:
            raise ValueError(f"{name} has shape {tuple(shape)}, not {leaf.shape}")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf), such as ("params.encoder.norm.scale", array)."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in found]


def steps(folder: Path) -> list[int]:
    """The steps of complete checkpoints in ascending order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def find_damage(checkpoint: Path) -> str | None:
    """Describes the difference between the files of a checkpoint and the manifest, if any.

    Raises OSError where the storage cannot be read.
    """
    try:
        expected = read_manifest(checkpoint)["files"]
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return f"expected a readable {_MANIFEST}, got {type(error).__name__}"
    actual = _hashes(checkpoint)
    different = sorted(
        name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)
    )
    return f"files differ from {_MANIFEST}: {different[:3]}" if different else None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """{files, arrays}: the hashes by name; a checkpoint of version 0.1 has none of arrays."""
    found = json.loads(_try_again((checkpoint / _MANIFEST).read_text))
    if not isinstance(found, dict):
        raise ValueError(f"expected an object in {_MANIFEST}, got {type(found).__name__}")
    if not isinstance(found.get("files"), dict):
        return {"files": found, "arrays": {}}
    if found.keys() != {"files", "arrays"}:
        raise ValueError(f"expected files and arrays in {_MANIFEST}, got {sorted(found)}")
    return found


def _hashes(checkpoint: Path) -> dict[str, str]:
    """File -> SHA-256, without the manifest."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != _MANIFEST)
    return {
        str(path.relative_to(checkpoint)): _try_again(lambda path=path: file_sha256(path))
        for path in files
    }


def _array_hashes(tree: Any) -> dict[str, str]:
    """Array -> SHA-256 of its bytes."""
    return {
        name: hashlib.sha256(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data).hexdigest()
        for name, leaf in named_leaves(tree)
    }


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _try_again(read: Callable[[], _T]) -> _T:
    """`read()`, again after a while where the storage refuses; a missing file is no refusal."""
    for wait in _READ_WAITS:
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError:
            time.sleep(wait)
    return read()


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw_key(leaf: Any) -> Any:
    """A PRNG key as integers, which Orbax can save; other leaves unchanged."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _raw_abstract(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    raw = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=leaf.sharding)


def _typed_key(abstract: Any, leaf: Any) -> Any:
    return jax.random.wrap_key_data(leaf) if _is_key(abstract) else leaf
