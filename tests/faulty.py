"""The library of faulty_files.c, and what its record of synced files says of a loss of power."""

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("faulty_files.c")


def build(folder: Path) -> str | None:
    """Compiles the library; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    library = folder / "faulty_files.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return str(library)


def after_power_loss(root: Path, shadow: Path, target: Path) -> None:
    """Writes to `target` what a loss of power leaves of the folder `root`.

    Of each folder the names of its last fsync, of each file the bytes of its last fsync: a file
    that was never synced is empty, a folder too. The folder `root` itself is taken to be there.
    """
    shutil.rmtree(target, ignore_errors=True)
    _copy(str(root.stat().st_ino), True, shadow, target)


def _copy(inode: str, is_folder: bool, shadow: Path, target: Path) -> None:
    kept = shadow / (f"{inode}.folder" if is_folder else inode)
    if not is_folder:
        target.write_bytes(kept.read_bytes() if kept.exists() else b"")
        return
    target.mkdir()
    for line in kept.read_text().splitlines() if kept.exists() else ():
        inner, is_inner_folder, name = line.split("/", 2)
        if name not in (".", ".."):
            _copy(inner, is_inner_folder == "1", shadow, target / name)


def keep_all(root: Path, shadow: Path) -> None:
    """Begins a record in which all of `root` is on the disk, as after a start of the machine."""
    shadow.mkdir()
    for folder, inner, files in os.walk(root):
        entries = [(name, 1) for name in inner] + [(name, 0) for name in files]
        inodes = [os.stat(os.path.join(folder, name)).st_ino for name, _ in entries]
        lines = [f"{i}/{kind}/{name}\n" for i, (name, kind) in zip(inodes, entries, strict=True)]
        (shadow / f"{os.stat(folder).st_ino}.folder").write_text("".join(lines))
        for name in files:
            path = os.path.join(folder, name)
            shutil.copyfile(path, shadow / str(os.stat(path).st_ino))
