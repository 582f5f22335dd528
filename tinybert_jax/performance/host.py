"""Memory settings of a `tinybert` process, its processor, its output, and locks on folders.

Importing it changes nothing.
"""

import contextlib
import ctypes
import math
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tinybert_jax.performance import disk
from tinybert_jax.report.console import printable

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
    """Makes the folder and locks it; raises ValueError where another process holds the lock.

    Both `.lock` and the folder are locked: whoever deletes the file does not open the folder.
    """
    import fcntl  # Unix only; prediction, which needs no lock, runs without it

    try:
        disk.make_folder(folder)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        if any(folder.glob("[!.]*")):  # with content that another folder lacks
            raise OSError(
                f"{setting}: {folder} cannot be locked: {error.strerror}; what is in it is kept: "
                "mend the storage or its permissions, and repeat the command"
            ) from error
        raise ValueError(
            f"{setting}: expected a folder that can be written, got {folder}: {error.strerror}; "
            f"choose another {setting}"
        ) from error
    with lock, contextlib.ExitStack() as stack:
        descriptor = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{setting}: {folder} is in use by another process; wait for it or choose "
                f"another {setting}"
            ) from None
        yield


def is_output_closed() -> bool:
    """Whether the reader of standard output has closed the pipe; then redirects it to /dev/null."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    # Otherwise Python reports the same error again when it flushes standard output at exit.
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), sys.stdout.fileno())
    return True


def make_progress_printer(seconds: float) -> Callable[[str], None]:
    """print_line(line): prints the first line, and later at most one line every `seconds`."""
    due = -math.inf

    def print_line(line: str) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + seconds
            print(printable(line), flush=True)

    return print_line


def explain_missing_device(error: Exception) -> Exception:
    """The error; one line where JAX has none of the devices that `JAX_PLATFORMS` asks for."""
    asked, frame = os.environ.get("JAX_PLATFORMS"), error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__") if frame is not None else None
    if not asked or module != "jax._src.xla_bridge":
        return error
    told = " ".join(str(error).split())
    return ValueError(
        f"JAX_PLATFORMS={asked}: expected devices of that platform, JAX has none"
        f"{f' ({told})' if told else ''}; unset the variable to run on what is here, or check the "
        "driver and install jax[cuda13] or jax[tpu]"
    )
