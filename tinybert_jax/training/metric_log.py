"""Logs a run: one line on the console and one JSON object in `metrics.jsonl` per report."""

import contextlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinybert_jax.data.json_text import parse_json
from tinybert_jax.parallel import processes
from tinybert_jax.performance import disk
from tinybert_jax.report.console import printable
from tinybert_jax.training import trackers
from tinybert_jax.training.live_view import LiveView, duration, thousands


class MetricLog:
    """Appends to `metrics.jsonl`, tells `trackers` and prints progress; process 0 only.

    When a run resumes, `rewind` drops the rows that the run will write again, so that the file
    holds every step once.
    """

    def __init__(self, path: Path):
        self.path, self.trackers = path, trackers.NONE
        self.is_writer = processes.is_main()
        self.view: LiveView | None = None  # in place of the lines of progress

    def rewind(self, stage: str, step: int, unwritten: Sequence[str] = ()) -> None:
        """Drops the rows of a stage after `step`, and a last line that a kill cut short.

        `unwritten`: kinds of rows that the run has yet to write for `step` itself.
        """
        if not self.is_writer or not self.path.exists():
            return
        kept = [
            line
            for line, row in _read_lines(self.path)
            if row["stage"] != stage or row["step"] < step + (row["kind"] not in unwritten)
        ]
        _replace_lines(self.path, kept)

    def write(self, kind: str, stage: str, step: int, values: dict[str, Any]) -> None:
        """Appends a row; first drops a last line that a kill cut short."""
        if not self.is_writer:
            return
        if not _ends_in_line_break(self.path):
            _replace_lines(self.path, [line for line, _ in _read_lines(self.path)])
        row = {"kind": kind, "stage": stage, "step": step, "time": round(time.time(), 3)}
        row |= {name: _plain(value) for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.trackers.write(kind, stage, step, values)

    def sync(self) -> None:
        """Returns when all rows are on the disk."""
        if self.is_writer and self.path.exists():
            disk.sync(self.path)
            disk.sync(self.path.parent)

    def say(self, text: str) -> None:
        if self.view is not None:
            self.view.say(text)
        elif self.is_writer:
            print(printable(text), flush=True)

    def enter(self, stage: str) -> None:
        """Tells the view that a stage begins."""
        if self.view is not None:
            self.view.enter(stage)

    def at_step(self, step: int, num_steps: int) -> None:
        """Tells the view, which alone shows every step."""
        if self.view is not None:
            self.view.at_step(step, num_steps)

    def foresee(self, stage: str, step_seconds: float, num_left: int) -> None:
        """Tells, before the first line of a long stage, how long it will take."""
        if self.view is not None:
            self.view.step_seconds = step_seconds
        else:
            left = duration(step_seconds * num_left)
            self.say(f"{stage}: about {step_seconds:.1f} s a step, {left} left")

    def doing(self, text: str) -> contextlib.AbstractContextManager[None]:
        """Tells the view, inside the block, what takes so long; lines do not tell it."""
        return contextlib.nullcontext() if self.view is None else self.view.doing(text)

    def evaluated(self, stage: str, step: int, num_steps: int, text: str) -> None:
        """Prints the scores at a step as one line."""
        if self.view is not None:
            self.view.score = f"{text} at step {step:,}"
        else:
            self.say(f"{stage:<12} {step:>6}/{num_steps}  {text}")

    def tell_best(self, text: str) -> None:
        """Tells the view the best scores; as a line they come at the end of the stage."""
        if self.view is not None:
            self.view.best = text.partition(": ")[2]

    def progress(self, stage: str, step: int, num_steps: int, values: dict[str, Any]) -> None:
        """Prints the progress of a stage as one line."""
        if self.view is not None:
            if "skipped" in values:
                self.say(f"{stage}: {values['skipped']} steps were skipped before step {step}")
            return self.view.progress(step, num_steps, values)
        parts = [
            f"{name.removeprefix('loss/')} {value:.4g}"
            for name, value in values.items()
            if name == "loss" or name.startswith("loss/")
        ]
        if "skipped" in values:
            parts.append(f"skipped {values['skipped']}")
        remaining = duration(values["seconds_left"])
        self.say(
            f"{stage:<12} {step:>6}/{num_steps}  {'  '.join(parts)}  "
            f"lr {values['learning_rate']:.2g}  |g| {values['grad_norm']:.2f}  "
            f"{thousands(values['tokens_per_second'])} tok/s  "
            f"pad {values['padding_share']:.0%}  mfu {values['mfu']:.0%}  {remaining} left"
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without a last line that a kill cut short.

    Raises ValueError for any other line that is not a JSON object with a kind, a stage and a step.
    """
    return [row for _, row in _read_lines(path)]


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line without the line break, row); see `read_rows`."""
    *lines, end = path.read_bytes().split(b"\n")
    parsed = [(line, _parse(line)) for line in lines]
    for number, (line, row) in enumerate(parsed, 1):
        if row is None:
            got = line[:60].decode(errors="backslashreplace")
            raise ValueError(
                f"{path}, line {number}: expected a JSON object, got {got!r}; remove the line"
            )
    parsed.append((end, _parse(end)))  # without a line break: complete, cut short or empty
    return [(line.decode(), row) for line, row in parsed if row is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """The row; None for a line that is no object with a kind, a stage and a step."""
    try:
        row = parse_json(line)
        line.decode()  # JSON may also be UTF-16
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return row if isinstance(row.get("kind"), str) and isinstance(row.get("stage"), str) else None


def _replace_lines(path: Path, lines: list[str]) -> None:
    disk.replace_text(path, "".join(line + "\n" for line in lines))


def _ends_in_line_break(path: Path) -> bool:
    """Also True for a file that is empty or missing."""
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return float(f"{value:.9g}") if isinstance(value, float) else value
