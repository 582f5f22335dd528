"""Whether all processes of a run see one run folder, and waits until they see what is new in it."""

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from tinybert_jax.parallel import processes

_SECONDS = 90.0  # for which another machine may keep what it knew of a folder (NFS: up to 60)


def check(folder: Path) -> None:
    """Raises ValueError where a process sees another folder than process 0.

    Process 0 writes a file with a random name, which the others have to see. Nothing is left of it.
    """
    if processes.count() == 1:
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    token = processes.from_main("token", lambda: secrets.token_hex(16))
    file = folder / f".shared-{token}"

    def write() -> None:
        with contextlib.suppress(FileExistsError, NotADirectoryError):  # `check_folder` tells
            folder.mkdir(parents=True, exist_ok=True)
            file.touch()

    def remove() -> None:
        file.unlink()
        for path in missing:
            path.rmdir()

    processes.on_main("shared folder", write)
    if processes.from_main("is written", file.exists):
        try:
            processes.together("sees", lambda: _find(file))
        finally:
            processes.on_main("remove", remove)


def _find(file: Path) -> None:
    end = time.monotonic() + _SECONDS
    while not file.exists() and time.monotonic() < end:
        if not file.parent.exists() and end - time.monotonic() < _SECONDS - 10:
            break
        time.sleep(0.1)
        if file.parent.is_dir():
            os.listdir(file.parent)  # a network file system then looks again
    if not file.exists():
        raise ValueError(
            f"run_dir: expected a folder that all processes share, got another one on "
            f"{processes.describe(processes.index())} than on {processes.describe(0)}: "
            f"{file.parent}; choose a run_dir on storage that every machine mounts"
        )


def wait_until(is_there: Callable[[], bool], what: str) -> None:
    """Returns when this process sees what process 0 has written; raises OSError after a while."""
    end = time.monotonic() + _SECONDS
    while processes.count() > 1 and not is_there():
        if time.monotonic() > end:
            raise OSError(
                f"{what}: expected the files that {processes.describe(0)} wrote, found none after "
                f"{_SECONDS:.0f} s; check the storage of the run folder"
            )
        time.sleep(0.1)
