"""Saves and restores training state. The only file that imports Orbax.

A checkpoint is a folder `<step>` that appears whole or not at all (written aside, then renamed) and
carries the SHA-256 of each of its files: Orbax itself restores flipped bits without an error.
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
    """Writes `folder/<step>` and removes all but the newest `keep` steps.

    `meta` is any JSON object that has to survive with the arrays. Saving a step again replaces it.
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
    """Removes the steps after `step`: they belong to a future that a resumed run may not repeat."""
    for later in steps(folder):
        if later > step:
            shutil.rmtree(folder / str(later))


def restore_newest(folder: Path, abstract: Any) -> Restored | None:
    """The newest step whose every byte is as written; None where there is none.

    `abstract` is a tree of ShapeDtypeStructs with shardings. A damaged step is set aside under
    `damaged-<step>` with a warning and the one before it is taken. Raises ValueError where the
    step is intact but holds other arrays than `abstract`.
    """
    import orbax.checkpoint as ocp

    for step in reversed(steps(folder)):
        fault = _fault(folder / str(step))
        if fault is None:
            meta = json.loads((folder / str(step) / _META).read_text(encoding="utf-8"))
            try:
                with ocp.StandardCheckpointer() as checkpointer:
                    raw = checkpointer.restore(
                        folder / str(step) / _STATE, jax.tree.map(_raw_abstract, abstract)
                    )
            except ValueError as error:
                raise ValueError(
                    f"{folder / str(step)}: expected the arrays that this version trains, got "
                    f"others ({str(error).splitlines()[0][:200]}); delete {folder.parent} to train "
                    "this stage again, or go on with the version that began it"
                ) from error
            return Restored(step, jax.tree.map(_typed_key, abstract, raw), meta)
        aside = folder / f"{_DAMAGED}{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / str(step)).rename(aside)
        warnings.warn(
            f"{folder / str(step)}: {fault}; set aside as {aside.name}, trying the step before it",
            stacklevel=2,
        )
    return None


def steps(folder: Path) -> list[int]:
    """Committed steps in rising order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
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
    return f"content differs from its manifest in {different[:3]}" if different else None


def _hashes(checkpoint: Path) -> dict[str, str]:
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != _MANIFEST)
    return {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw_key(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _raw_abstract(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    raw = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=leaf.sharding)


def _typed_key(abstract: Any, leaf: Any) -> Any:
    return jax.random.wrap_key_data(leaf) if _is_key(abstract) else leaf
