"""Writes checkpoints in a thread of its own, so that the step does not wait for the storage.

Another thread may copy what is written elsewhere, so that a slow network delays no write.
"""

import contextlib
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

_WAITS = (0.5, 1.0, 2.0)  # seconds before a refused write is tried again
# Orbax turns errors of the file system into the last two.
_REFUSALS: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError)
_T = TypeVar("_T")
_Quiet = Callable[[], contextlib.AbstractContextManager[None]]


class SaveError(OSError):
    """A checkpoint that the storage refused for good."""


class Saver:
    """Writes what is submitted, one after the other; an error is raised in the main thread.

    `say(text)` prints a line.
    """

    def __init__(self, say: Callable[[str], None], quiet: _Quiet | None = None):
        self._say, self._quiet = say, quiet or _without_echoes
        self._copies: Saver | None = None
        self._copy: tuple[str, Callable[[], None]] = ("", lambda: None)
        # One job is written and one waits: a job holds a copy of the state.
        self._jobs: queue.Queue[tuple[str, Callable[[], None]]] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._is_started = False

    def submit(self, name: str, write: Callable[[], None]) -> None:
        """Has `write()` called soon; waits only while an earlier write keeps another one waiting.

        `name`: what is written, for messages. Raises SaveError for an earlier write.
        """
        self._start()
        self._jobs.put((name, write))
        self.check()

    def copy_with(self, name: str, copy: Callable[[], None]) -> None:
        """Has `copy()` called in another thread after every write, and when `copy_soon` asks."""
        self._copies, self._copy = Saver(self._say, contextlib.nullcontext), (name, copy)
        self.copy_soon()

    def copy_soon(self) -> None:
        """Asks for a copy of all that is there now; never waits."""
        if self._copies is not None:
            self._copies._start()
            with contextlib.suppress(queue.Full):  # a copy that waits will have all of it
                self._copies._jobs.put_nowait(self._copy)

    def check(self) -> None:
        """Raises the error of an earlier write, if there is one: a SaveError, or a bug's."""
        if self._error is not None:
            raise self._error
        if self._copies is not None:
            self._copies.check()

    def wait(self) -> None:
        """Returns when all is written, but perhaps not copied; raises SaveError otherwise."""
        self._jobs.join()
        self.check()

    def drain(self) -> None:
        """Returns when all is written and copied; raises SaveError otherwise."""
        self.wait()
        if self._copies is not None:
            self._copies.wait()

    def finish(self, seconds: float) -> str:
        """Waits for what is being written and copied, but not longer; raises nothing.

        Returns what was not done and why; "" where all is done.
        """
        end = time.monotonic() + seconds
        while self._jobs.unfinished_tasks and self._error is None and time.monotonic() < end:
            time.sleep(0.01)
        if self._error is not None:
            return str(self._error)
        if self._jobs.unfinished_tasks:
            return f"not done within {seconds:.0f} s"
        return self._copies.finish(end - time.monotonic()) if self._copies is not None else ""

    def _start(self) -> None:
        if not self._is_started:
            self._is_started = True
            threading.Thread(target=self._work, name="saver", daemon=True).start()

    def _work(self) -> None:
        while True:
            name, write = self._jobs.get()
            try:
                if self._error is None:
                    self._write(name, write)
                    self.copy_soon()
            except BaseException as error:  # raised in the main thread, by `check`
                self._error = error
            finally:
                self._jobs.task_done()

    def _write(self, name: str, write: Callable[[], None]) -> None:
        with self._quiet():
            try:
                try_again(name, write, self._say, _REFUSALS)
            except _REFUSALS as error:
                time.sleep(_WAITS[0])  # for the last echoes
                raise SaveError(
                    f"{name} was refused {len(_WAITS) + 1} times: {reason(error)}; the "
                    "checkpoints before it are kept. Make room or mend the storage, then repeat "
                    "the command"
                ) from error


def try_again(
    name: str,
    call: Callable[[], _T],
    say: Callable[[str], None],
    refusals: tuple[type[Exception], ...] = (OSError,),
) -> _T:
    """`call()`, up to three times more where it raises one of `refusals`; says so once."""
    for number, wait in enumerate(_WAITS):
        try:
            return call()
        except refusals as error:
            if not number:
                say(f"{name} was refused ({reason(error)}); it is tried again")
            time.sleep(wait)
    return call()


def reason(error: Exception) -> str:
    """The error of the system, also where Orbax has wrapped it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else str(error).split("\n")[0][:200]


@contextlib.contextmanager
def _without_echoes() -> Iterator[None]:
    """Silences what Orbax prints of a refused write before it raises the error.

    At the first refusal it closes an event loop while other writes of the checkpoint go on: every
    one of them then finds the loop closed, besides the tracebacks that two loggers print.
    """

    def is_no_error(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before, sys.unraisablehook = sys.unraisablehook, hook
    for logger in loggers:
        logger.addFilter(is_no_error)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_no_error)
        sys.unraisablehook = before
