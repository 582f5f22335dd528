"""Stops a run on SIGTERM, SIGINT or SIGUSR1, so that the same command goes on with it.

Imports no JAX. Python calls its signal handlers between two instructions of the main thread, so not
while XLA compiles or a device computes. Therefore a thread reads the signals, and where the main
thread cannot end a step soon, that thread saves the work and ends the process.
"""

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from tinybert_jax.parallel import processes
from tinybert_jax.report import console
from tinybert_jax.report.console import printable

STOPPED = 75  # exit status, EX_TEMPFAIL of sysexits.h: stopped and saved, run again
STATUSES = """\
exit status:
  0    done
  2    wrong input, or a file system that does not work: the message says which
  3    refused by a gate
  4    lost a process or a worker
  5    diverged
  75   stopped by SIGTERM, SIGINT or SIGUSR1, and saved: repeat the command to go on
  128 + n  ended at once by the second signal n; the command goes on from the last checkpoint"""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SOON = b"stops when the step is done and saved; Ctrl-C again stops at once\n"
_SAME_SECONDS = 0.5  # a terminal and a launcher may both send the same signal: that is one request

_SAVE = "save"  # what processes agree on, beside the names of signals

Act = Callable[[], None]


def _nothing() -> None:
    """Nothing is to be saved."""


class Stopped(Exception):
    """The run has stopped as a signal asked; the message says where, and how to go on."""


_BEFORE = "before its first stage"


class Stop:
    """A request to stop a run, and what has to be saved then.

    Nobody asks unless `handled` or `interruptible` gave this object.
    """

    def __init__(self, command: str = "", how: str = "repeat the command"):
        self.command, self._how = command, how  # to go on
        self.place = _BEFORE  # where the run is
        self._signal = ""
        self._agreed = ""  # of several processes: the signal, until the step that they agreed on
        self._lock = threading.Lock()
        self._act: Act | None = _nothing  # None: the main thread looks at `is_asked` after the step

    @property
    def is_asked(self) -> bool:
        return bool(self._signal)

    def at_step(self, *, is_save_due: bool) -> tuple[bool, bool]:
        """(whether to stop, whether to save) after a step: the same in all processes.

        Of several processes process 0 alone says when a save is due, and all of them stop some
        steps after the request, after the same step.
        """
        if processes.count() == 1:
            return self.is_asked, is_save_due
        wanted = {_SAVE} if is_save_due and processes.is_main() else set()
        agreed = processes.arrive(wanted)
        stops = sorted(agreed - {_SAVE})
        if stops:
            self._signal = stops[0]
            processes.end_alone()
        return bool(stops), _SAVE in agreed

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """A request waits until the main thread asks for it; it raises Stopped at the end."""
        with self._during(None):
            yield

    @contextlib.contextmanager
    def saving_with(self, save: Act, *, is_joint: bool = False) -> Iterator[None]:
        """At a request inside the block another thread calls `save` and ends the process.

        Only for blocks that do not change what `save` reads. Raises Stopped, after `save`, where
        the request came before. `is_joint`: several processes can only save together; their main
        threads then go on, through the block, to the step that they agree on.
        """
        with self._during(None if is_joint and processes.count() > 1 else save):
            yield

    @contextlib.contextmanager
    def _during(self, act: Act | None) -> Iterator[None]:
        before = self._change(act)
        try:
            yield
        except BaseException:
            with self._lock:
                self._act = before
            raise
        self._change(before)

    def _change(self, act: Act | None) -> Act | None:
        with self._lock:  # while the other thread saves, the main thread waits here for the end
            before, self._act = self._act, act
            if self._agreed and act is not None:  # the stage has ended before the agreed step
                self._signal = self._agreed
                processes.end_alone()
            if self.is_asked and act is not None:
                act()
                raise Stopped(self.describe())
        return before

    def describe(self) -> str:
        """The line that tells where the run stopped and how to go on."""
        where = ""
        if processes.count() > 1:
            own = " with its own --process-id" if "--process-id" in self.command else ""
            where = f" in all processes, each{own}" if own else " in all processes"
        is_begun = self.place != _BEFORE
        kept = "everything until then is saved" if is_begun else "nothing was to be saved"
        return (
            f"stopped by {self._signal} {self.place}; {kept}. To go on, {self._how}{where}: "
            f"{self.command}"
        )

    def ask(self, name: str, report: Callable[[Exception], int]) -> None:
        """Asks the run to stop; ends the process at once where the main thread need not save."""
        if processes.count() > 1:
            return processes.request(name)
        with self._lock:
            self._signal = name
            if self._act is not None:
                os._exit(self._finish(self._act, report))
            if name == "SIGINT" and os.isatty(2):  # before the main thread can end the step
                console.close_view()
                with contextlib.suppress(OSError):
                    os.write(2, _SOON)

    def ask_softly(self, name: str) -> bool:
        """Stops the run, from a signal handler in the main thread; whether it has to go on first.

        True within a step: the run saves and raises Stopped after it. False elsewhere: what had to
        be saved is saved when this returns, and the handler may raise.
        """
        self._signal = name
        if self._act is None:
            return True
        self._act()
        return False

    def agree(self, report: Callable[[Exception], int], what: set[str]) -> None:
        """Hears what all processes agreed on; ends this one where it saves nothing with others."""
        with self._lock:
            self._agreed = min(what - {_SAVE}, default=self._agreed)
            if self._agreed and self._act is not None:
                self._signal = self._agreed
                processes.leave(self._finish(self._act, report), self.describe())

    def _finish(self, act: Act, report: Callable[[Exception], int]) -> int:
        """Saves, tells where the run stopped, and returns the exit status."""
        try:
            act()
            return report(Stopped(self.describe()))
        except (ValueError, OSError, ArithmeticError) as error:
            return report(error)
        except Exception:
            traceback.print_exc()
            return 1


NEVER = Stop()  # nobody asks


@contextlib.contextmanager
def handled(command: str, report: Callable[[Exception], int]) -> Iterator[Stop]:
    """Handles the signals until the block ends, and gives what they ask.

    `report` prints an exception and returns the exit status. A second signal ends the process at
    once with status 128 + its number; checkpoints and models are only ever renamed into place, so
    it does no harm. In another thread than the main one nothing is handled, as Python allows it
    only there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield NEVER
        return
    stop, numbers = Stop(command), []
    processes.on_agreement(functools.partial(stop.agree, report))
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def read() -> None:
        asked = -float("inf")
        while received := reader.recv(1):
            number = received[0]
            if number not in _SIGNALS or (
                number in numbers and time.monotonic() - asked < _SAME_SECONDS
            ):
                continue
            if numbers:
                console.close_view()
                processes.leave(128 + number, "ended by a second signal")
                os._exit(128 + number)
            numbers.append(number)
            asked = time.monotonic()
            name = signal.Signals(number).name
            threading.Thread(target=stop.ask, args=(name, report), daemon=True).start()

    thread = threading.Thread(target=read, name="signals", daemon=True)
    thread.start()
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # Python writes to the descriptor only for signals that have a handler of Python.
    earlier = {number: signal.signal(number, _handle) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        reader.shutdown(socket.SHUT_RD)
        thread.join()
        reader.close()
        writer.close()


@contextlib.contextmanager
def interruptible(call: str) -> Iterator[Stop]:
    """Ctrl-C stops a run that Python calls: it saves, says so in a line, and raises as Ctrl-C does.

    The process goes on, unlike in `handled`. A second Ctrl-C raises at once. In another thread than
    the main one, and where the program has its own handler, nothing is handled.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield NEVER
        return
    stop = Stop(call, "call again")

    def ask(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not stop.ask_softly("SIGINT"):
            raise KeyboardInterrupt
        os.write(2, _SOON)

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    except Stopped as stopped:
        say(stopped)
        raise KeyboardInterrupt from None
    except KeyboardInterrupt:
        say(Stopped(f"interrupted {stop.place}; to go on from what is saved, call again: {call}"))
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def say(error: Exception) -> None:
    """Prints a message as one line on standard error, also where another thread prints."""
    console.close_view()
    text = f"tinybert: {printable(str(error))}\n"
    with contextlib.suppress(OSError):  # nobody reads standard error any more
        if threading.current_thread() is threading.main_thread():
            sys.stderr.write(text)
            sys.stderr.flush()
        else:  # the main thread may hold the lock of `sys.stderr`
            os.write(2, text.encode(errors="replace"))


def _handle(number: int, frame: object) -> None:
    """Does nothing: the thread reads the signal from the descriptor."""
