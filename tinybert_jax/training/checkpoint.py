"""Saves and restores training state. The only file that imports Orbax.

A checkpoint is a folder `<step>`, written under another name and renamed when complete. It holds
the SHA-256 of every file, because Orbax restores flipped bits without an error.
"""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_STATE, _META, _MANIFEST = "state", "meta.json", "manifest.json"
_PARTIAL, _DAMAGED = "partial-", "damaged-"


class Restored(NamedTuple):
    step: int
    tree: Any
    meta: dict[str, Any]


def save(folder: Path, step: int, tree: Any, meta: dict[str, Any], *, keep: int = 2) -> Path:
    """Writes the checkpoint `folder/<step>` and removes all but the newest `keep` checkpoints.

    `meta`: a JSON object stored beside the arrays. An existing checkpoint of `step` is replaced.
    """
    import orbax.checkpoint as ocp

    partial, final = folder / f"{_PARTIAL}{step}", folder / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / _STATE, jax.tree.map(_raw_key, tree))
    (partial / _META).write_text(json.dumps(meta), encoding="utf-8")
    (partial / _MANIFEST).write_text(json.dumps(_hashes(partial), indent=1), encoding="utf-8")
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / str(old))
    return final


def discard_after(folder: Path, step: int) -> None:
    """Removes the checkpoints after `step`, which a run that resumes at `step` may not repeat."""
    for later in steps(folder):
        if later > step:
            shutil.rmtree(folder / str(later))


def restore_newest(folder: Path, abstract: Any) -> Restored | None:
    """Restores the newest intact checkpoint; returns None if there is none.

    `abstract` is a tree of ShapeDtypeStructs with shardings. A damaged checkpoint is renamed to
    `damaged-<step>` with a warning, and the previous checkpoint is tried. Raises ValueError for an
    intact checkpoint with other arrays than `abstract`.
    """
    import orbax.checkpoint as ocp

    for step in reversed(steps(folder)):
        damage = _find_damage(folder / str(step))
        if damage is None:
            meta = json.loads((folder / str(step) / _META).read_text(encoding="utf-8"))
            try:
                with ocp.StandardCheckpointer() as checkpointer:
                    raw_abstract = jax.tree.map(_raw_abstract, abstract)
                    saved = checkpointer.metadata(folder / str(step) / _STATE).item_metadata
                    _check_shapes(saved.tree, raw_abstract)
                    raw = checkpointer.restore(folder / str(step) / _STATE, raw_abstract)
            except ValueError as error:
                raise ValueError(
                    f"{folder / str(step)}: expected the arrays that this version trains, got "
                    f"others ({str(error).splitlines()[0][:200]}); delete {folder.parent} to train "
                    "this stage again, or resume with the version that started it"
                ) from error
            return Restored(step, jax.tree.map(_typed_key, abstract, raw), meta)
        damaged = folder / f"{_DAMAGED}{step}"
        shutil.rmtree(damaged, ignore_errors=True)
        (folder / str(step)).rename(damaged)
        warnings.warn(
            f"{folder / str(step)}: {damage}; renamed to {damaged.name}, trying the previous step",
            stacklevel=2,
        )
    return None


def _check_shapes(saved: Any, expected: Any) -> None:
    """Raises ValueError for an array of another shape.

    Orbax finds that only while it reads other arrays, and then leaves futures that fail later.
    """
    shapes = {name: leaf.shape for name, leaf in _leaves(saved)}
    for name, leaf in _leaves(expected):
        shape = shapes.get(name, leaf.shape)  # Orbax itself refuses missing arrays
        if tuple(shape) != leaf.shape:
            raise ValueError(f"{name} has shape {tuple(shape)}, not {leaf.shape}")


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def steps(folder: Path) -> list[int]:
    """The steps of complete checkpoints in ascending order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def _find_damage(checkpoint: Path) -> str | None:
    """Describes the difference between the files of a checkpoint and the manifest, if any."""
    try:
        expected = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"expected a readable {_MANIFEST}, got {type(error).__name__}"
    if not isinstance(expected, dict):
        return f"expected an object in {_MANIFEST}, got {type(expected).__name__}"
    actual = _hashes(checkpoint)
    different = sorted(
        name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)
    )
    return f"files differ from {_MANIFEST}: {different[:3]}" if different else None


def _hashes(checkpoint: Path) -> dict[str, str]:
    """File -> SHA-256, without the manifest."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != _MANIFEST)
    return {str(path.relative_to(checkpoint)): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
