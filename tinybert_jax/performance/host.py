"""What a `tinybert` process asks of its machine. The process of a library's user is left alone."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed; does nothing where there is no glibc.

    XLA:CPU allocates its scratch memory anew in every step. By default glibc gives large blocks
    back to the kernel each time, and the page faults of getting them again take a fifth of a step.
    One arena, since only the first can grow without mapping memory anew. Has to be called before
    the first thread starts: those that exist keep arenas of their own.
    """
    for name, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
        _glibc("mallopt", name, value)


def give_back_freed_memory() -> None:
    """What is kept and free goes back to the kernel: a step's time, if done now and then.

    Small blocks come to lie in what a step's scratch leaves behind, and its next scratch beyond
    them: over a thousand steps a process of 4 GB grew to 16.
    """
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
    if function is not None:  # musl has none
        function(*arguments)


@contextlib.contextmanager
def locked(folder: Path, setting: str) -> Iterator[None]:
    """Makes the folder and holds it; ValueError, naming the setting, where another process does."""
    import fcntl  # not on every system that only predicts

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{setting}: {folder} is in use by another process; wait for it or choose "
                f"another {setting}"
            ) from None
        yield
