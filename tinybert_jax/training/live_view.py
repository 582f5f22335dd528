"""The view of a run on a terminal: the stage, what is left, the losses and the score.

It stands below the lines that a run prints and is drawn anew every second. The cursor stays above
it and no mode of the terminal changes, so a process that ends at any moment leaves a terminal that
works. Whatever else is printed takes the place of the view, and the next drawing comes below it.
Writes no file; nothing in a run reads it.
"""

import contextlib
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tinybert_jax.report import console
from tinybert_jax.report.console import printable

_SECONDS = 1.0  # between two drawings
_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVE = 24  # characters of a curve
_ERASE = "\r\x1b[J"  # from the first column of this line to the end of the screen


def is_possible() -> bool:
    """Whether standard output is a terminal that can show the view."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return False
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    return encoding == "utf8" and importlib.util.find_spec("rich") is not None


class LiveView:
    """Draws a run until `close`; `work` has the cost of each stage to come, in any unit."""

    def __init__(self, stages: Sequence[str], work: Mapping[str, float]):
        from rich.console import Console

        self._out, self._is_drawn = sys.stdout, False
        self._console = Console(file=self._out)
        self.stages, self.work = list(stages), dict(work)
        self.stage, self.step, self.num_steps = "", 0, 0
        self.values: dict[str, Any] = {}
        self.step_seconds: float | None = None
        self.curves: dict[str, list[float]] = {}
        self.score = self.best = ""
        self._task, self._task_began = "", 0.0
        self._lock, self._is_closed = threading.RLock(), threading.Event()
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (_Stream(self.hide, stream) for stream in self._streams)
        console.close_view = self.close
        threading.Thread(target=self._draw_on, name="live view", daemon=True).start()

    # What the run tells

    def enter(self, stage: str) -> None:
        """A stage begins."""
        self.stage, self.step, self.num_steps = stage, 0, 0
        self.values, self.curves, self.step_seconds = {}, {}, None
        self.score = self.best = ""

    def at_step(self, step: int, num_steps: int) -> None:
        self.step, self.num_steps = step, num_steps

    def progress(self, step: int, num_steps: int, values: Mapping[str, Any]) -> None:
        """The values of a log line."""
        self.at_step(step, num_steps)
        self.values = dict(values)
        if step < num_steps:
            self.step_seconds = values["seconds_left"] / (num_steps - step)
        for name, value in values.items():
            if name == "loss" or name.startswith("loss/"):
                self.curves.setdefault(name, []).append(value)
        self._draw()

    @contextlib.contextmanager
    def doing(self, text: str) -> Iterator[None]:
        """Shows, inside the block, what takes so long."""
        before = self._task, self._task_began
        self._task, self._task_began = text, time.monotonic()
        try:
            yield
        finally:
            self._task, self._task_began = before

    def say(self, text: str) -> None:
        """Prints lines above the view."""
        with self._lock:
            self._out.write(f"{_ERASE}{printable(text)}\n{self._rendered()}")
            self._out.flush()

    def hide(self) -> None:
        """Erases the view before the output of others; the next drawing comes below that."""
        with self._lock:
            if self._is_drawn and not self._is_closed.is_set():
                self._out.write(_ERASE)
                self._out.flush()
            self._is_drawn = False

    def close(self) -> None:
        """Erases the view, for good; any thread may call it, and more than once."""
        console.close_view = console.nothing
        sys.stdout, sys.stderr = self._streams
        is_mine = self._lock.acquire(timeout=1.0)  # a thread that ends the process waits no longer
        try:
            if not self._is_closed.is_set():
                self._is_closed.set()
                with contextlib.suppress(OSError, ValueError):
                    self._out.write(_ERASE)
                    self._out.flush()
        finally:
            if is_mine:
                self._lock.release()

    # The drawing

    def _draw_on(self) -> None:
        while not self._is_closed.wait(_SECONDS):
            try:
                self._draw()
            except (OSError, ValueError):  # the terminal is gone
                return

    def _draw(self) -> None:
        with self._lock:
            self._out.write(self._rendered())
            self._out.flush()

    def _rendered(self) -> str:
        """The view, with the cursor back above it; empty while it may not be drawn."""
        if self._is_closed.is_set() or not self.stage or not _is_in_front(self._out):
            return ""
        with self._console.capture() as captured:
            for line in self._lines():
                self._console.print(line, overflow="ellipsis", no_wrap=True, crop=True)
        # The cursor stays in an empty line, where the output of others finds room.
        lines = ["", *captured.get().splitlines()][: max(self._console.height - 1, 1)]
        self._is_drawn = True
        drawn = "".join(f"{line}\x1b[K\n" for line in lines)
        return f"\r{drawn}{_ERASE}\x1b[{len(lines)}A"

    def _lines(self) -> Iterator[Any]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 2), expand=True)
        for _ in range(3):
            head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        name = Text(self.stage, style="bold")
        if self.stage not in self.stages:
            head.add_row(name)
        elif not self.num_steps:
            head.add_row(name, self._place(), "prepares")
        else:
            bar = ProgressBar(total=1.0, completed=self.step / self.num_steps)
            head.add_row(name, self._place(), f"{self.step:,}/{self.num_steps:,}", bar)
        yield head
        if self.num_steps:
            yield Text("  ".join(self._rates()), style="dim")
        if self.curves:
            yield Text("  ".join(self._losses()))
        yield from (Text(text) for text in (self.score, self.best) if text)
        if self._task:
            seconds = duration(time.monotonic() - self._task_began)
            yield Text(f"{self._task}: {seconds}", style="yellow")

    def _place(self) -> str:
        return f"stage {self.stages.index(self.stage) + 1} of {len(self.stages)}"

    def _rates(self) -> Iterator[str]:
        if self.values:
            yield f"{thousands(self.values['tokens_per_second'])} tokens/s"
            yield f"padding {self.values['padding_share']:.0%}"
            yield f"learning rate {self.values['learning_rate']:.2g}"
        if self.step_seconds is None:
            yield "time left: not known yet"
            return
        left = self.step_seconds * (self.num_steps - self.step)
        yield f"{duration(left)} left of the stage"
        later = self._seconds_of_later_stages()
        if later:
            yield f"about {duration(left + later)} of the run"

    def _seconds_of_later_stages(self) -> float:
        """Their work at the rate of this stage; without compilation and evaluation."""
        own = self.work.get(self.stage)
        if self.stage not in self.stages or not own or self.step_seconds is None:
            return 0.0
        later = self.stages[self.stages.index(self.stage) + 1 :]
        work = sum(self.work.get(name, 0.0) for name in later)
        return work / own * self.step_seconds * self.num_steps

    def _losses(self) -> Iterator[str]:
        for name, values in self.curves.items():
            if len(self.curves) == 2 and name != "loss":
                continue  # the only part is the loss itself
            yield f"{name.removeprefix('loss/')} {values[-1]:.4g} {curve(values)}"


class _Stream:
    """A stream that calls `before()` before it writes; in all else it is the stream."""

    def __init__(self, before: Callable[[], None], stream: Any):
        self._before, self._stream = before, stream

    def write(self, text: str) -> int:
        self._before()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def curve(values: Sequence[float], width: int = _CURVE) -> str:
    """A line of blocks: the means of `width` equal slices of the finite values, low to high."""
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return ""
    count = min(width, len(finite))
    ends = [len(finite) * i // count for i in range(count + 1)]
    means = [
        sum(finite[start:stop]) / (stop - start)
        for start, stop in zip(ends, ends[1:], strict=False)
    ]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BLOCKS[round((len(_BLOCKS) - 1) * (mean - low) / span)] for mean in means)


def thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value < 1e6 else f"{value / 1e6:.2f}M"


def duration(seconds: float) -> str:
    """1h02m or 3m05s."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _is_in_front(out: Any) -> bool:
    """Whether the terminal belongs to this process, which may run in the background of a shell."""
    try:
        return os.tcgetpgrp(out.fileno()) == os.getpgrp()
    except (OSError, ValueError):  # not the controlling terminal: nobody else writes to it
        return True
