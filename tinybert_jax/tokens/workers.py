"""Worker processes that transform chunks, and waits for them that end.

A worker that has died, or that makes no progress, ends the run with an error that names it: its
process id, and the text that it was at work on.
"""

import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tinybert_jax.data.errors import LostWorkerError
from tinybert_jax.data.records import Chunk, unit_of

PATIENCE = 30.0  # seconds without progress after which a worker counts as lost
START_PATIENCE = 50.0  # seconds until a new worker has to tell its first progress
_NUM_LOOKS = 30  # in PATIENCE
_PROGRESS = 1e-3  # seconds of processor time that a worker at work has used from look to look


def run_in_processes(
    make: Callable[[Any], Callable[[Chunk], Any]],
    argument: Any,
    chunks: Iterable[Chunk],
    num_workers: int,
) -> Generator[Any, None, None]:
    """Yields the results of `make(argument)` in the order of the chunks.

    Each worker makes the function once. About 2·`num_workers` chunks are in memory. Raises
    LostWorkerError for a worker that dies, and for one that has a chunk and uses no processor time
    for `PATIENCE` seconds, because it is stopped or hangs.
    """
    interval = PATIENCE / _NUM_LOOKS
    workers = [_Worker((make, argument), interval) for _ in range(num_workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def ask(chunk: Chunk) -> Any:
        worker = idle.get()
        try:
            return worker.ask(chunk)
        finally:
            idle.put(worker)

    # One thread a worker: with a stopped worker, sending and receiving may take for ever.
    threads = ThreadPoolExecutor(num_workers)
    waiting: deque[Future] = deque()
    try:
        for chunk in chunks:
            waiting.append(threads.submit(ask, chunk))
            if len(waiting) > 2 * num_workers:
                yield _result(waiting.popleft(), workers, interval)
        while waiting:
            yield _result(waiting.popleft(), workers, interval)
    finally:
        for worker in workers:
            worker.process.kill()  # also ends a stopped process, and with it the wait of its thread
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.process.join(5)


def _result(future: Future, workers: list["_Worker"], interval: float) -> Any:
    """The result; looks at the workers while it waits for it.

    Looks are counted, not seconds: while this process is stopped too, no worker loses patience.
    """
    while True:
        try:
            return future.result(timeout=interval)
        except TimeoutError:
            if future.done():
                return future.result()
        for worker in workers:
            if worker.is_silent_for(_NUM_LOOKS, round(START_PATIENCE / interval)):
                raise worker.silent_error()


class _Worker:
    """A worker process, and the chunk that it is at work on."""

    def __init__(self, made: tuple[Callable, Any], interval: float):
        context = get_context("spawn")
        self.pipe, end = context.Pipe()
        self.used = context.RawValue("d", 0.0)  # seconds of processor time, told by the worker
        self.process: BaseProcess = context.Process(
            target=_work, args=(end, self.used, interval), daemon=True
        )
        self.process.start()
        end.close()  # so that a dead worker closes the pipe
        self.chunk: Chunk | None = None
        self._first: Any = made  # to be sent before the first chunk
        self._num_silent, self._used_before = 0, 0.0

    def ask(self, chunk: Chunk) -> Any:
        """The result for a chunk; raises what the function raised, or LostWorkerError."""
        self.chunk = chunk
        try:
            if self._first is not None:
                self.pipe.send(self._first)
                self._first = None
            self.pipe.send(chunk)
            result, error = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            raise self._lost(_end_of(self.process.exitcode), _MEMORY) from None
        self.chunk = None
        if error is not None:
            raise error
        return result

    def is_silent_for(self, num_looks: int, num_at_start: int) -> bool:
        """Whether so many looks in a row found the worker with a chunk and without progress."""
        used = self.used.value
        is_silent = self.chunk is not None and used - self._used_before < _PROGRESS
        self._num_silent = self._num_silent + 1 if is_silent else 0
        self._used_before = used
        return self._num_silent >= (num_looks if used else num_at_start)

    def silent_error(self) -> LostWorkerError:
        is_stopped = _state_of(self.process.pid) in ("T", "t")
        got = "one stopped by a signal (SIGSTOP)" if is_stopped else "one that hangs"
        seconds = PATIENCE if self.used.value else START_PATIENCE
        return self._lost(f"{got}, without progress for {seconds:g} s", "")

    def _lost(self, got: str, hint: str) -> LostWorkerError:
        first = self.chunk.pieces[0] if self.chunk else None
        place = ""
        if first is not None:
            unit = unit_of(first.source)
            place = f", at work on {first.source.path} from {unit} {first.first} on"
        return LostWorkerError(
            f"data worker {self.process.pid}: expected a running process; got {got}{place}; fix: "
            f"run the same command again, which resumes{hint}"
        )


_MEMORY = "; with fewer workers or a smaller chunk_bytes if memory ran out"


def _end_of(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"one killed by {signal.Signals(-exit_code).name}"
    return f"one that ended with status {exit_code}"


def _state_of(pid: int | None) -> str:
    """The letter that Linux has for the state of a process; empty elsewhere."""
    file = Path(f"/proc/{pid}/stat")
    return file.read_text().rpartition(")")[2].split()[0] if file.is_file() else ""


def _work(pipe: connection.Connection, used: Any, interval: float) -> None:
    """The life of a worker: makes its function, then answers chunks until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C: the parent process ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process
    threading.Thread(target=_watch, args=(used, interval), daemon=True).start()
    function = None
    while True:
        try:
            received = pipe.recv()
        except EOFError:
            return
        try:
            if function is None:
                make, argument = received
                function = make(argument)
                continue
            answer = function(received), None
        except Exception as error:
            answer = None, error
        pipe.send(answer)


def _watch(used: Any, interval: float) -> None:
    """Tells the processor time; ends the worker when the parent process is killed."""
    parent = parent_process()
    assert parent is not None
    while not connection.wait([parent.sentinel], timeout=interval):
        used.value = time.process_time()
    os._exit(1)
