"""The manifest of a checkpoint: the SHA-256 of its files and arrays, and what differs from it."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

MANIFEST = "manifest.json"
_READ_WAITS = (0.25, 1.0)  # seconds before a refused read is tried again
_T = TypeVar("_T")


def find_damage(checkpoint: Path) -> str | None:
    """Describes the difference between the files of a checkpoint and the manifest, if any.

    Raises OSError where the storage cannot be read.
    """
    try:
        expected = read_manifest(checkpoint)["files"]
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return f"expected a readable {MANIFEST}, got {type(error).__name__}"
    actual = hash_files(checkpoint)
    different = sorted(
        name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)
    )
    return f"files differ from {MANIFEST}: {different[:3]}" if different else None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """{files, arrays}: the hashes by name; a checkpoint of version 0.1 has none of arrays."""
    found = json.loads(_try_again((checkpoint / MANIFEST).read_text))
    if not isinstance(found, dict):
        raise ValueError(f"expected an object in {MANIFEST}, got {type(found).__name__}")
    if not isinstance(found.get("files"), dict):
        return {"files": found, "arrays": {}}
    if found.keys() != {"files", "arrays"}:
        raise ValueError(f"expected files and arrays in {MANIFEST}, got {sorted(found)}")
    return found


def hash_files(checkpoint: Path) -> dict[str, str]:
    """File -> SHA-256, without the manifest."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {
        str(path.relative_to(checkpoint)): _try_again(lambda path=path: _file_sha256(path))
        for path in files
    }


def _file_sha256(path: Path) -> str:
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
