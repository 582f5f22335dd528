"""Where a step goes: traces of a few steps, and a table of their operations by part of the model.

Parts are the `jax.named_scope`s whose names begin with ~; the compiler keeps them in the metadata
of its operations. A fusion counts for the part that the compiler names it after.
"""

import contextlib
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

NUM_STEPS = 5

_FIRST = 2  # the calls before it compile and settle
_NUM_LISTED = 12
_CONTAINERS = ("while", "conditional", "call")  # their time is that of the operations inside
_EXCHANGES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?[\])}] ([a-z][\w\-]*)\(")

Step = Callable[[Any, Any], tuple[Any, Any]]  # (state, batch) -> (state, metrics)


class Operation(NamedTuple):
    """One operation of a compiled program."""

    part: str  # the scopes it is in, "teacher: attention"; "rest" outside of all
    source: str  # what it was traced from, "dot_general"
    is_product: bool = False  # a matrix product, or a fusion with one


class Event(NamedTuple):
    """One operation as it ran. `seconds`: those that run at one time share it."""

    operation: Operation
    name: str
    device: Any
    seconds: float


@contextlib.contextmanager
def profiled(
    step: Step,
    program: Callable[[Any, Any], str],
    folder: Path,
    say: Callable[[str], None],
    pause: Callable[[Any], contextlib.AbstractContextManager[None]],
) -> Iterator[Step]:
    """A step that traces `NUM_STEPS` of its calls into `folder`, says their table and writes it.

    Each of these waits for the one before; of widths it takes what comes, once compiled. Nothing
    that is computed changes. `program(state, batch)` is the text of the compiled step, and
    `pause(state)` stops the clock of what is no training.
    """
    tracer = _Tracer(step, program, folder, say, pause)
    yield tracer
    if not tracer.is_done:
        say(
            f"{folder}: no profile; expected {_FIRST + NUM_STEPS} steps or more, of widths that "
            f"come again, got {tracer.num_calls} with {len(tracer.traced)} to trace"
        )


def read_program(text: str) -> dict[str, Operation]:
    """The operations of a compiled program, by name, from its text. Containers are left out."""
    operations, with_product = {}, set()
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.removeprefix("ENTRY ").split()[0].lstrip("%")
        found = _INSTRUCTION.match(line)
        if found is None or found[2] in _CONTAINERS:
            continue
        name, opcode = found.groups()
        if opcode in ("dot", "convolution"):
            with_product.add(computation)
        path = re.search(r'op_name="([^"]*)"', line)
        called = re.search(r"calls=%?([\w.\-]+)", line)
        target = re.search(r'custom_call_target="[^"]*(gemm|matmul)', line)
        operations[name] = Operation(
            _part(path[1] if path else "", opcode),
            path[1].rsplit("/", 1)[-1] if path else opcode,
            opcode in ("dot", "convolution")
            or bool(target)
            or bool(called and called[1] in with_product),
        )
    return operations


def _part(path: str, opcode: str) -> str:
    """Of jit(train_step)/vmap(transpose(jvp(~head)))/mul: "head, backward"."""
    if opcode.startswith(_EXCHANGES):
        return "exchange between devices"
    scopes = re.findall(r"~([^/()]+)", path)
    if not scopes:
        return "rest"
    return ": ".join(dict.fromkeys(scopes)) + (", backward" if "transpose(" in path else "")


def read_events(folder: Path, operations: Mapping[str, Operation]) -> list[Event]:
    """All operations of the program that ran in a trace."""
    ran: dict[Any, list[tuple[str, float, float]]] = defaultdict(list)  # name, begin, end
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    stats = dict(event.stats)
                    name = str(stats.get("hlo_op", ""))
                    if name in operations:
                        device = stats.get("device_ordinal", plane.name)
                        end = event.start_ns + event.duration_ns
                        ran[device].append((name, event.start_ns / 1e9, end / 1e9))
    return [
        Event(operations[name], name, device, seconds)
        for device, own in ran.items()
        for (name, _, _), seconds in zip(
            own, shared([(begin, end) for _, begin, end in own]), strict=True
        )
    ]


def shared(intervals: Sequence[tuple[float, float]]) -> list[float]:
    """The length of each (begin, end), where those that overlap share it evenly.

    They add up to the length of their union.
    """
    edges = sorted((edge, i) for i, interval in enumerate(intervals) for edge in interval)
    lengths, running, last = [0.0] * len(intervals), set(), 0.0
    for edge, i in edges:
        for other in running:
            lengths[other] += (edge - last) / len(running)
        running ^= {i}
        last = edge
    return lengths


def tabulate(events: Iterable[Event], *, seconds: float, num_steps: int) -> str:
    """Two Markdown tables of milliseconds a step, means over devices: by part, and by operation.

    `seconds`: of all the steps, by the clock.
    """
    events = list(events)
    each = 1 / num_steps / max(len({event.device for event in events}), 1)
    by_part: dict[str, float] = defaultdict(float)
    in_products: dict[str, float] = defaultdict(float)
    by_operation: dict[tuple[str, Operation], float] = defaultdict(float)
    for event in events:
        by_part[event.operation.part] += event.seconds * each
        in_products[event.operation.part] += event.seconds * each * event.operation.is_product
        by_operation[event.name, event.operation] += event.seconds * each
    whole = seconds / num_steps

    def line(milliseconds: float, *cells: str) -> str:
        first, *others = cells
        columns = (first, f"{1e3 * milliseconds:.2f}", f"{milliseconds / whole:.1%}", *others)
        return f"| {' | '.join(columns)} |\n"

    text = "| part | ms | share | of it matrix products |\n|---|---|---|---|\n"
    for part, spent in _longest_first(by_part):
        text += line(spent, part, f"{in_products[part] / spent:.0%}" if spent else "")
    idle = whole - sum(by_part.values())
    if idle > 0:
        text += line(idle, "between operations", "")
    text += "\n| operation | ms | share | from | part |\n|---|---|---|---|---|\n"
    for (name, operation), spent in _longest_first(by_operation)[:_NUM_LISTED]:
        text += line(spent, name, operation.source, operation.part)
    return text


def _longest_first(seconds: Mapping[Any, float]) -> list[tuple[Any, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])


class _Traced(NamedTuple):
    shape: tuple[int, int]  # of the batch
    seconds: float
    events: list[Event]


class _Tracer:
    """Calls the step; each traced call has a trace of its own, which nothing else gets into."""

    def __init__(self, step: Step, program, folder: Path, say, pause):
        self.step, self.program, self.folder = step, program, folder
        self.say, self.pause = say, pause
        self.num_calls, self.is_done = 0, False
        self.known: set[tuple[int, int]] = set()  # shapes of batches that are compiled
        self.traced: list[_Traced] = []

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
        shape = batch.shape
        self.num_calls += 1
        if self.is_done or self.num_calls <= _FIRST or shape not in self.known:
            self.known.add(shape)
            return self.step(state, batch)
        return self._traced_call(state, batch)

    def _traced_call(self, state: Any, batch: Any) -> tuple[Any, Any]:
        folder = self.folder / f"step-{self.num_calls}"
        with self.pause(state):
            if not self.traced:
                shutil.rmtree(self.folder, ignore_errors=True)
            operations = read_program(self.program(state, batch))
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)
        begin = time.perf_counter()
        try:
            result = jax.block_until_ready(self.step(state, batch))
            seconds = time.perf_counter() - begin
        finally:
            jax.profiler.stop_trace()
        with self.pause(result[0]):
            events = read_events(folder, operations)
            self.traced.append(_Traced(batch.shape, seconds, events))
            if len(self.traced) == NUM_STEPS:
                self._tell()
        return result

    def _tell(self) -> None:
        self.is_done = True
        shapes = sorted({f"{rows} × {width}" for rows, width in (own.shape for own in self.traced)})
        seconds = sum(own.seconds for own in self.traced)
        events = [event for own in self.traced for event in own.events]
        if not events:
            self.say(f"{self.folder}: the trace names no operation of the step on this device")
            return
        table = (
            f"{NUM_STEPS} steps of rows × tokens {', '.join(shapes)}: "
            f"{1e3 * seconds / NUM_STEPS:.1f} ms each, by the clock and with tracing; what runs "
            "side by side shares the time\n\n"
        ) + tabulate(events, seconds=seconds, num_steps=NUM_STEPS)
        (self.folder / "table.md").write_text(table, encoding="utf-8")
        self.say(f"{table}{self.folder}: the traces; a perfetto_trace.json.gz opens in a browser")
