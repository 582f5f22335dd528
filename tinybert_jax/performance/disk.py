"""Files that outlast a loss of power: synced to the disk before anything relies on them."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Returns when the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Syncs all files and folders below `folder`, and `folder` itself."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, unless they exist."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Writes a file, complete or not at all."""
    partial = path.with_name(f".{path.name}-partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)
