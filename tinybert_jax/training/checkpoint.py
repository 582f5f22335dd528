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
import warnings
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.parallel import processes, replicas
from tinybert_jax.performance import disk
from tinybert_jax.training import shards
from tinybert_jax.training.manifest import MANIFEST, find_damage, hash_files, read_manifest

_STATE, _META = "state", "meta.json"
_PARTIAL, _DAMAGED = "partial-", "damaged-"
_SPARE_BYTES, _SPARE_FILES = 2**16, 40  # what a checkpoint needs beside its arrays
# What a file system without locks answers: readers are then not waited for.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


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
        manifest = {"files": hash_files(partial), "arrays": arrays}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        disk.sync_tree(partial)
        if final.exists():
            _remove(final, even_if_read=True)
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
    found = steps(folder)
    old = [step for step in found[: max(0, len(found) - last)] if step not in also]
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


def _remove(checkpoint: Path, *, even_if_read: bool = False) -> bool:
    """Removes a checkpoint; returns False where somebody reads it, who learns of it otherwise."""
    with contextlib.ExitStack() as stack:
        try:
            # "r+b": NFS grants an exclusive lock only on a file that is open for writing.
            manifest = stack.enter_context((checkpoint / MANIFEST).open("r+b"))
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            pass  # damaged: nobody reads it
        except BlockingIOError:
            if not even_if_read:
                return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        # Under another name first: a kill does not leave half a checkpoint.
        removed = checkpoint.with_name(f"{_PARTIAL}removed-{checkpoint.name}")
        shutil.rmtree(removed, ignore_errors=True)
        checkpoint.rename(removed)
    shutil.rmtree(removed)  # with its manifest closed: NFS keeps the name of an open file
    return True


@contextlib.contextmanager
def pinned(checkpoint: Path) -> Iterator[None]:
    """Nobody removes a checkpoint inside, but a new one of its step may take its place.

    FileNotFoundError at the entry where it is gone, and at the end where it has been replaced: what
    was read is then worth nothing.
    """
    with (checkpoint / MANIFEST).open("rb") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_SH)
        _check_is_there(checkpoint, manifest.fileno())
        try:
            yield
        finally:  # also where reading has failed: a checkpoint that was replaced explains it
            _check_is_there(checkpoint, manifest.fileno())


def _check_is_there(checkpoint: Path, manifest: int) -> None:
    """Raises FileNotFoundError where the place of a checkpoint has another manifest, or none."""
    try:
        is_same = os.path.samestat(os.fstat(manifest), os.stat(checkpoint / MANIFEST))
    except FileNotFoundError:
        is_same = False
    if not is_same:
        raise FileNotFoundError(errno.ENOENT, "removed or replaced meanwhile", str(checkpoint))


def discard_after(folder: Path, step: int) -> None:
    """Removes the checkpoints after `step`, which a run that resumes at `step` may not repeat.

    One that somebody reads stays: a new one of its step takes its place.
    """
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
        own = [name for name in names if expected.get(name) != hashes.get(name)]
        found = processes.gather("arrays", json.dumps(own))  # one process may have read other bytes
        different = sorted({name for text in found for name in json.loads(text)})
        meta = read_meta(checkpoint)
    if different:
        damage = f"arrays differ from {MANIFEST}: {different[:3]}"
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


def _array_hashes(tree: Any) -> dict[str, str]:
    """Array -> SHA-256 of its bytes."""
    return {
        name: hashlib.sha256(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data).hexdigest()
        for name, leaf in named_leaves(tree)
    }


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
