"""Memory settings of a `tinybert` process, its processor, and locks on folders.

Importing it changes nothing.
"""

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}  # of /proc/cpuinfo
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation; does nothing without glibc.

    XLA:CPU allocates scratch memory anew in every step. By default glibc returns large blocks to
    the kernel, and the page faults of getting them back take a fifth of a step. One arena, since
    only the first arena grows without a new mapping. Call this before the first thread starts:
    existing threads keep their arenas.
    """
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
        _call_glibc("mallopt", option, value)


def return_freed_memory() -> None:
    """Returns free memory to the kernel (malloc_trim); an occasional call costs about one step.

    Small blocks settle in the memory that a step's scratch has freed, so that the next scratch
    extends the heap: over a thousand steps a process of 4 GB grew to 16 GB.
    """
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
    if function is not None:  # musl lacks both functions
        function(*arguments)


def multiplies_bfloat16() -> bool:
    """Whether Linux says that the processor has products of bfloat16 (AVX-512 or AMX)."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return False
    flags = re.search(r"^flags\s*:(.*)$", file.read_text(), re.MULTILINE)
    return flags is not None and not _BFLOAT16_FLAGS.isdisjoint(flags[1].split())


@contextlib.contextmanager
def locked_folder(folder: Path, setting: str) -> Iterator[None]:
    """Makes the folder and locks it; raises ValueError where another process holds the lock."""
    import fcntl  # Unix only; prediction, which needs no lock, runs without it

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
