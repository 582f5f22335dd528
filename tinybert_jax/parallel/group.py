"""One process among the others of a run: it talks to them, watches them, and ends if one is lost.

They talk through the key-value store of JAX's coordinator, which process 0 holds. Imports no JAX.
"""

import collections
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

LOST = 4  # exit status: a process of the run is gone
_STOPPED = 75  # exit status of a run that a signal stopped
_POLL_SECONDS = 1.0
_LOST_SECONDS = 45.0  # after which a process without a sign of life counts as lost
_SUSPECT_SECONDS = 15.0  # the same, after a collective has failed
_GRACE_SECONDS = 5.0  # in which a process that hears of an end may end by itself
_LINGER_SECONDS = 20.0  # for which process 0 keeps the store up when it ends
_LONGEST_SECONDS = 6 * 3600.0  # of work that others wait for; that its process lives is watched
_STATES, _CALLS = "tinybert/", "tinybert-calls/"  # prefixes of keys
_ERRORS = (RuntimeError, ValueError)  # of JAX's client
_T = TypeVar("_T")


class LostProcessError(RuntimeError):
    """A process of the run is gone, or cannot be reached."""


class Group:
    """This process among the others."""

    def __init__(self, client: Any, index: int, count: int):
        self.client, self.index, self.count = client, index, count
        self.names = [f"process {number}" for number in range(count)]
        self.lock = threading.Lock()  # for the four below
        self.steps = 0  # that this process has counted
        self.round = 0  # number of agreements
        self.wanted: set[str] = set()
        self.due: dict[int, set[str]] = {}  # by the number of the step to do it after
        self.on_agreement: Callable[[set[str]], None] = lambda what: None
        self.ends_alone = False  # this process has stopped, and ends by itself
        self._calls: collections.Counter[str] = collections.Counter()
        self._patience = _LOST_SECONDS
        self._status: int | None = None  # that this process ends with, once it does
        self._num_lost = 0  # that will not say that they have ended
        self._leaving = threading.Lock()
        self._changes: dict[int, tuple[str | None, float]] = {}  # last sign of life, and its time
        self._ends: dict[int, float] = {}  # time at which the end of another was seen

    def exchange(self, name: str, value: str) -> list[str]:
        """The values of all processes."""
        number = self._calls[name]
        self._calls[name] += 1
        key = f"{_CALLS}{name}/{number}/"
        try:
            self.client.key_value_set(f"{key}{self.index}", value)
            self.client.wait_at_barrier(key, int(1000 * _LONGEST_SECONDS))
            found = dict(self.client.key_value_dir_get(key))
            if number:  # all have read the values of the call before
                self.client.key_value_delete(f"{_CALLS}{name}/{number - 1}/{self.index}")
        except _ERRORS as error:
            raise self.explained(LostProcessError(f"coordination: {first_line(error)}")) from error
        return [found[f"{key}{number}"] for number in range(self.count)]

    def call(
        self, name: str, work: Callable[[], _T], sent: Callable[[_T], Any]
    ) -> tuple[_T, list[Any]]:
        """(the result of `work`, what all have sent of theirs); see `together`."""
        result: Any = None
        error: Exception | None = None
        answer: dict[str, Any] = {}
        try:
            result = work()
            answer["value"] = sent(result)
        except Exception as raised:
            error, answer = raised, {"kind": _kind(raised), "text": str(raised)}
        answers = [json.loads(own) for own in self.exchange(name, json.dumps(answer))]
        if error is not None:
            raise error
        for number, own in enumerate(answers):
            if "kind" in own:
                raise _KINDS[own["kind"]](f"{self.names[number]}: {own['text']}")
        return result, [own["value"] for own in answers]

    def explained(self, error: Exception) -> Exception:
        """The error, or a LostProcessError for one of a collective, whose message names no process.

        Waits until the loss is noticed: the process then ends with a message that names it.
        """
        if not _FAILED.search(str(error)):
            return error
        self._patience = _SUSPECT_SECONDS
        time.sleep(_SUSPECT_SECONDS + 3 * _GRACE_SECONDS)
        with self._leaving:  # for ever, where the thread that watches has ended the process
            pass
        why = first_line(error)
        return LostProcessError(f"the processes lost touch: {why}; repeat the command in all")

    def handle_aborts(self, address: str) -> None:
        """Names process 0 where JAX aborts this one, as the coordinator at `address` is gone."""
        host, _, port = address.rpartition(":")

        def explain() -> tuple[int, str] | None:
            if self._status is not None:  # this process is ending anyway
                return self._status, ""
            with contextlib.suppress(OSError):
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
                return None
            return LOST, self._lost(0, "it coordinates the others, and does not answer")

        handle_aborts(explain)

    def watch(self) -> None:
        """Shows that this process lives, and looks at the others, until the process ends."""
        for beat in range(2**62):
            entries = self._beat(beat)
            self._look(entries)
            if self.wanted or any(key.startswith(f"at/{self.round}/") for key in entries):
                self._agree(beat)
            time.sleep(_POLL_SECONDS)

    def _beat(self, beat: int) -> dict[str, str]:
        """Gives a sign of life; returns the states of all processes by key."""
        try:
            self._set(f"alive/{self.index}", f"{beat} {time.monotonic()}")
            found = self.client.key_value_dir_get(_STATES)
        except _ERRORS as error:
            self._leave_with(LOST, self._lost(0, first_line(error)))
        return {key.removeprefix(_STATES): value for key, value in found}

    def _look(self, entries: dict[str, str]) -> None:
        """Ends this process where another has failed or is lost."""
        now = time.monotonic()
        for other in (number for number in range(self.count) if number != self.index):
            if f"ended/{other}" in entries:
                status, message = json.loads(entries[f"ended/{other}"])
                first = self._ends.setdefault(other, now)
                is_expected = not status or (self.ends_alone and status == _STOPPED)
                if not is_expected and now - first > _GRACE_SECONDS:
                    self._leave_with(status, f"{self.names[other]}: {message}")
                continue
            sign = entries.get(f"alive/{other}")
            before, since = self._changes.get(other, (None, now))
            if sign != before:
                since = now
            self._changes[other] = sign, since
            if now - since > self._patience:
                self._num_lost = 1
                self._leave_with(
                    LOST, self._lost(other, f"no sign of life for {now - since:.0f} s")
                )

    def _agree(self, beat: int) -> None:
        """Agrees with all processes on the step after which they do what is wanted.

        Their main threads count no step meanwhile, so that none of them is past that step.
        """
        with self.lock:
            prefix = f"at/{self.round}/"
            self._set(f"{prefix}{self.index}", json.dumps([self.steps, sorted(self.wanted)]))
            told: list[str] = []
            num_ended = 0  # without an answer
            while len(told) + num_ended < self.count:
                entries = self._beat(beat := beat + 1)
                self._look(entries)
                told = [value for key, value in entries.items() if key.startswith(prefix)]
                num_ended = sum(
                    f"ended/{other}" in entries and f"{prefix}{other}" not in entries
                    for other in range(self.count)
                )
                time.sleep(0.05 * _POLL_SECONDS)
            answers = [json.loads(value) for value in told]
            what = set().union(*(own for _, own in answers))
            due = max(steps for steps, _ in answers) + 1
            self.due[due] = self.due.get(due, set()) | what
            self.wanted -= what
            if self.round:  # who has answered this round has read the answers of the one before
                before = f"{_STATES}at/{self.round - 1}/{self.index}"
                self.client.key_value_delete(before)
            self.round += 1
        self.on_agreement(what)

    def _set(self, key: str, value: str) -> None:
        self.client.key_value_set(_STATES + key, value, allow_overwrite=True)

    def _lost(self, number: int, why: str) -> str:
        return (
            f"lost {self.names[number]}: {why}. Checkpoints are kept: repeat the command in all "
            "processes; a stage goes on from its last one, or begins again where it has none yet"
        )

    def _leave_with(self, status: int, message: str) -> NoReturn:
        if self._status is None and (status != _STOPPED or self.index == 0):
            _write_line(message)
        self.leave(status, message)

    def leave(self, status: int, message: str) -> NoReturn:
        """Ends this process; process 0 first waits until the others have ended.

        The others wait for it, where they end well: it may still copy the run, and JAX ends it some
        minutes after it has missed a process. Another signal ends the wait.
        """
        if self._status is not None and status > 128:
            os._exit(status)
        self._leaving.acquire()  # one thread alone, and for ever
        self._status = status
        with contextlib.suppress(*_ERRORS):  # process 0 may be gone
            self._set(f"ended/{self.index}", json.dumps([status, message]))
            while self.index and status in (0, _STOPPED) and not self._has_ended(0):
                time.sleep(0.1 * _POLL_SECONDS)
            end = time.monotonic() + _LINGER_SECONDS
            while self.index == 0 and time.monotonic() < end:
                ended = self.client.key_value_dir_get(f"{_STATES}ended/")
                if len(ended) + self._num_lost == self.count:
                    break
                time.sleep(0.1 * _POLL_SECONDS)
            if self.index == 0:
                time.sleep(0.1 * _POLL_SECONDS)  # the others leave the store first
        _flush()
        os._exit(status)

    def _has_ended(self, other: int) -> bool:
        ended = self.client.key_value_dir_get(f"{_STATES}ended/")
        return any(key == f"{_STATES}ended/{other}" for key, _ in ended)


# In messages of collectives and of the store.
_FAILED = re.compile(
    r"^(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|coordination): "
    "|Gloo|NCCL"
)

_KINDS: dict[str, type[Exception]] = {
    "value": ValueError,
    "number": FloatingPointError,
    "system": OSError,
    "lost": LostProcessError,
    "other": RuntimeError,
}


def _kind(error: Exception) -> str:
    kinds = (name for name, kind in _KINDS.items() if isinstance(error, kind))
    return next((name for name in kinds if name != "other"), "other")


def handle_aborts(explain: Callable[[], tuple[int, str] | None]) -> None:
    """Ends the process with the (status, message) of `explain` where it would abort; None: it does.

    JAX's client calls abort() as soon as it cannot reach the coordinator, and takes no function of
    Python to call instead. So this handles C's SIGABRT, which comes in the thread that aborts.
    """

    def act(number: int) -> None:
        found = explain()
        if found is not None:
            status, message = found
            if message:
                _write_line(message)
            os._exit(status)

    global _handler
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(act)
    ctypes.CDLL(None).signal(signal.SIGABRT, _handler)


_handler: Any = None  # C keeps no reference to it


def _write_line(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads standard error any more
        os.write(2, f"tinybert: {text}\n".encode(errors="replace"))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
