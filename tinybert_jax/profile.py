"""Where a step goes: a trace of a few steps, and a table of their operations by part of the model.

Parts are the `jax.named_scope`s whose names begin with ~; the compiler keeps them in the metadata
of its operations. A fusion counts for the part that the compiler names it after.
"""

import contextlib
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

NUM_STEPS = 5  # at most; fewer where the rows' width changes before

_FIRST = 2  # the calls before it compile and settle
_NUM_LISTED = 12
_CONTAINERS = ("while", "conditional", "call")  # their time is that of the operations inside


class Operation(NamedTuple):
    """One operation of a compiled program."""

    part: str  # the scopes it is in, "teacher: attention"; "rest" outside of all
    source: str  # what it was traced from, "dot_general"

    @property
    def is_product(self) -> bool:
        return self.source == "dot_general"


class Event(NamedTuple):
    """One operation as it ran."""

    name: str
    device: Any
    seconds: float


@contextlib.contextmanager
def profiled(
    step_fn: Callable[[Any, Any], tuple[Any, Any]],
    program: Callable[[Any, Any], str],
    folder: Path,
    say: Callable[[str], None],
) -> Iterator[Callable[[Any, Any], tuple[Any, Any]]]:
    """`step_fn(state, batch)` that traces a few of its calls: the trace and `table.md` in `folder`.

    `program(state, batch)` is the text of the compiled step. Nothing that is computed changes.
    """
    tracer = _Tracer(step_fn, program, folder)
    yield tracer
    tracer.finish()
    if tracer.table:
        say(f"{tracer.table}{folder}: the trace; its perfetto_trace.json.gz opens in a browser")
    else:
        say(f"{folder}: no profile; expected more than {_FIRST} steps of one width")


def read_program(text: str) -> dict[str, Operation]:
    """The operations of a compiled program, by name, from its text. Containers are left out."""
    pattern = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?[\])}] ([a-z][\w\-]*)\(", re.MULTILINE)
    operations = {}
    for line in text.splitlines():
        found = pattern.match(line)
        if found is None or found[2] in _CONTAINERS:
            continue
        scope = re.search(r'op_name="([^"]*)"', line)
        path = scope[1] if scope else ""
        operations[found[1]] = Operation(_part(path), path.rsplit("/", 1)[-1])
    return operations


def _part(path: str) -> str:
    """Of jit(train_step)/vmap(transpose(jvp(~head)))/mul: "head, backward"."""
    scopes = re.findall(r"~([^/()]+)", path)
    if not scopes:
        return "rest"
    return ": ".join(dict.fromkeys(scopes)) + (", backward" if "transpose(" in path else "")


def read_events(folder: Path) -> list[Event]:
    """All operations of compiled programs in a trace."""
    events = []
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    stats = dict(event.stats)
                    if "hlo_op" in stats:
                        device = stats.get("device_ordinal", plane.name)
                        name = str(stats["hlo_op"])
                        events.append(Event(name, device, event.duration_ns / 1e9))
    return events


def tabulate(
    operations: Mapping[str, Operation],
    events: Iterable[Event],
    *,
    num_steps: int,
    seconds_a_step: float,
) -> str:
    """Two Markdown tables of milliseconds a step, means over devices: by part, and by operation."""
    by_name: dict[str, float] = defaultdict(float)
    devices = set()
    for event in events:
        devices.add(event.device)
        if event.name in operations:
            by_name[event.name] += event.seconds
    each = {name: total / num_steps / len(devices) for name, total in by_name.items()}
    by_part: dict[str, float] = defaultdict(float)
    in_products: dict[str, float] = defaultdict(float)
    for name, seconds in each.items():
        by_part[operations[name].part] += seconds
        in_products[operations[name].part] += seconds * operations[name].is_product
    idle = max(seconds_a_step - sum(each.values()), 0.0)
    whole = sum(each.values()) + idle

    def line(seconds: float, *cells: str) -> str:
        first, *others = cells
        columns = (first, f"{1e3 * seconds:.2f}", f"{seconds / whole:.1%}", *others)
        return f"| {' | '.join(columns)} |\n"

    text = "| part | ms | share | of it matrix products |\n|---|---|---|---|\n"
    for part, seconds in _longest_first(by_part):
        text += line(seconds, part, f"{in_products[part] / seconds:.0%}")
    text += line(idle, "between operations", "")
    text += "\n| operation | ms | share | from | part |\n|---|---|---|---|---|\n"
    for name, seconds in _longest_first(each)[:_NUM_LISTED]:
        text += line(seconds, name, operations[name].source, operations[name].part)
    return text


def _longest_first(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])


class _Tracer:
    """Calls the step, and begins and ends the trace between two calls."""

    def __init__(self, step_fn, program, folder: Path):
        self.step_fn, self.program, self.folder = step_fn, program, folder
        self.widths: list[tuple[int, ...]] = []  # of every call's rows
        self.num_traced, self.is_tracing = 0, False
        self.state: Any = None
        self.operations: dict[str, Operation] = {}
        self.begin, self.table = 0.0, ""

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
        shape = batch.input_ids.shape
        if self.is_tracing and (shape != self.widths[-1] or self.num_traced == NUM_STEPS):
            self.finish()
        is_warm = len(self.widths) >= _FIRST and shape in self.widths
        if is_warm and not self.is_tracing and not self.table:
            self._start(state, batch)
        self.widths.append(shape)
        self.num_traced += self.is_tracing
        self.state, metrics = self.step_fn(state, batch)
        return self.state, metrics

    def finish(self) -> None:
        """Ends the trace, if one is going, and tells what it says."""
        if not self.is_tracing:
            return
        jax.block_until_ready(self.state)
        seconds = (time.perf_counter() - self.begin) / self.num_traced
        jax.profiler.stop_trace()
        self.is_tracing = False
        rows, width = self.widths[-1]
        self.table = (
            f"{self.num_traced} steps of {rows} rows × {width} tokens, {1e3 * seconds:.1f} ms "
            "each; operations that run side by side add up to more\n\n"
        ) + tabulate(
            self.operations,
            read_events(self.folder),
            num_steps=self.num_traced,
            seconds_a_step=seconds,
        )
        (self.folder / "table.md").write_text(self.table, encoding="utf-8")

    def _start(self, state: Any, batch: Any) -> None:
        jax.block_until_ready(state)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.operations = read_program(self.program(state, batch))
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)
        self.begin, self.is_tracing = time.perf_counter(), True
