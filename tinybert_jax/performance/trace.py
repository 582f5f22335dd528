"""Traces a few training steps and tabulates the time by part of the model and by operation.

A part is a `jax.named_scope` whose name begins with ~; the compiler keeps the scopes in the
metadata of operations. The whole time of a fusion counts for the scope in the fusion's metadata.
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

from tinybert_jax.performance import hlo

NUM_STEPS = 5

_NUM_WARMUP = 2  # first calls, which compile and warm up; not traced
_NUM_LISTED = 12  # rows of the table of operations
_CONTAINERS = ("while", "conditional", "call")  # left out: the operations inside are counted
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?[\])}] ([a-z][\w\-]*)\(")

Step = Callable[[Any, Any], tuple[Any, Any]]  # (state, batch) -> (state, metrics)


class Operation(NamedTuple):
    """One operation of a compiled program."""

    part: str  # the named scopes around it, "teacher: attention"; "rest" outside all scopes
    source: str  # the JAX primitive it was traced from, "dot_general"
    is_product: bool = False  # a matrix product, or a fusion that contains one


class Event(NamedTuple):
    """One run of an operation. `seconds`: overlapping operations share the time evenly."""

    operation: Operation
    name: str
    device: Any
    seconds: float


@contextlib.contextmanager
def traced_step(
    step: Step,
    program: Callable[[Any, Any], str],
    folder: Path,
    say: Callable[[str], None],
    pause: Callable[[Any], contextlib.AbstractContextManager[None]],
) -> Iterator[Step]:
    """Yields a step that traces `NUM_STEPS` of its calls into `folder` and logs and writes a table.

    A call is traced once the batch shape has been compiled, and waits for the step before it. The
    results do not change. `program(state, batch)` returns the text of the compiled step, `say` logs
    a message, and `pause(state)` stops the clock of training while traces are started and read.
    """
    tracer = _Tracer(step, program, folder, say, pause)
    yield tracer
    if not tracer.is_done:
        say(
            f"{folder}: no profile table; expected at least {_NUM_WARMUP + NUM_STEPS} steps, "
            f"{NUM_STEPS} of them with a batch shape seen before, got {tracer.num_calls} steps and "
            f"traced {len(tracer.traced)}; train for more steps"
        )


def read_program(text: str) -> dict[str, Operation]:
    """The operations in the text of a compiled program, by name. Containers are left out."""
    operations, computations_with_product = {}, set()
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.removeprefix("ENTRY ").split()[0].lstrip("%")
        found = _INSTRUCTION.match(line)
        if found is None or found[2] in _CONTAINERS:
            continue
        name, opcode = found.groups()
        if opcode in ("dot", "convolution"):
            computations_with_product.add(computation)
        path = re.search(r'op_name="([^"]*)"', line)
        called = re.search(r"calls=%?([\w.\-]+)", line)
        target = re.search(r'custom_call_target="[^"]*(gemm|matmul)', line)
        operations[name] = Operation(
            _part(path[1] if path else "", opcode),
            path[1].rsplit("/", 1)[-1] if path else opcode,
            opcode in ("dot", "convolution")
            or bool(target)
            or bool(called and called[1] in computations_with_product),
        )
    return operations


def _part(path: str, opcode: str) -> str:
    if opcode.startswith(hlo.COLLECTIVES):
        return "communication between devices"
    return hlo.scope_of(path)


def read_events(folder: Path, operations: Mapping[str, Operation]) -> list[Event]:
    """All runs of the program's operations in the traces under `folder`."""
    runs: dict[Any, list[tuple[str, float, float]]] = defaultdict(list)  # name, begin, end
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    stats = dict(event.stats)
                    name = str(stats.get("hlo_op", ""))
                    if name in operations:
                        device = stats.get("device_ordinal", plane.name)
                        end = event.start_ns + event.duration_ns
                        runs[device].append((name, event.start_ns / 1e9, end / 1e9))
    return [
        Event(operations[name], name, device, seconds)
        for device, device_runs in runs.items()
        for (name, _, _), seconds in zip(
            device_runs, share_overlaps([run[1:] for run in device_runs]), strict=True
        )
    ]


def share_overlaps(intervals: Sequence[tuple[float, float]]) -> list[float]:
    """The lengths of (begin, end) intervals; overlapping intervals share the common time evenly.

    The lengths add up to the length of the union.
    """
    edges = sorted((edge, i) for i, interval in enumerate(intervals) for edge in interval)
    lengths, running, last_edge = [0.0] * len(intervals), set(), 0.0
    for edge, i in edges:
        for other in running:
            lengths[other] += (edge - last_edge) / len(running)
        running ^= {i}
        last_edge = edge
    return lengths


def tabulate(events: Iterable[Event], *, seconds: float, num_steps: int) -> str:
    """Two Markdown tables of milliseconds per step, averaged over devices: by part, by operation.

    `seconds`: wall-clock time of all steps together.
    """
    events = list(events)
    share = 1 / num_steps / max(len({event.device for event in events}), 1)
    by_part: dict[str, float] = defaultdict(float)
    in_products: dict[str, float] = defaultdict(float)
    by_operation: dict[tuple[str, Operation], float] = defaultdict(float)
    for event in events:
        by_part[event.operation.part] += event.seconds * share
        in_products[event.operation.part] += event.seconds * share * event.operation.is_product
        by_operation[event.name, event.operation] += event.seconds * share
    step_seconds = seconds / num_steps

    def line(spent: float, *cells: str) -> str:
        first, *others = cells
        columns = (first, f"{1e3 * spent:.2f}", f"{spent / step_seconds:.1%}", *others)
        return f"| {' | '.join(columns)} |\n"

    text = "| part | ms | share | of which matrix products |\n|---|---|---|---|\n"
    for part, spent in _longest_first(by_part):
        text += line(spent, part, f"{in_products[part] / spent:.0%}" if spent else "")
    idle = step_seconds - sum(by_part.values())
    if idle > 0:
        text += line(idle, "no operation running", "")
    text += "\n| operation | ms | share | JAX primitive | part |\n|---|---|---|---|---|\n"
    for (name, operation), spent in _longest_first(by_operation)[:_NUM_LISTED]:
        text += line(spent, name, operation.source, operation.part)
    return text


def _longest_first(seconds: Mapping[Any, float]) -> list[tuple[Any, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])


class _TracedCall(NamedTuple):
    batch_shape: tuple[int, int]
    seconds: float
    events: list[Event]


class _Tracer:
    """Calls the step; a traced call gets a separate trace, which holds nothing but that call."""

    def __init__(self, step: Step, program, folder: Path, say, pause):
        self.step, self.program, self.folder = step, program, folder
        self.say, self.pause = say, pause
        self.num_calls, self.is_done = 0, False
        self.compiled_shapes: set[tuple[int, int]] = set()
        self.traced: list[_TracedCall] = []

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
        shape = batch.shape
        self.num_calls += 1
        is_warm = self.num_calls > _NUM_WARMUP and shape in self.compiled_shapes
        if self.is_done or not is_warm:
            self.compiled_shapes.add(shape)
            return self.step(state, batch)
        return self._trace_call(state, batch)

    def _trace_call(self, state: Any, batch: Any) -> tuple[Any, Any]:
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
            self.traced.append(_TracedCall(batch.shape, seconds, events))
            if len(self.traced) == NUM_STEPS:
                self._write_table()
        return result

    def _write_table(self) -> None:
        self.is_done = True
        shapes = sorted({"{} × {}".format(*call.batch_shape) for call in self.traced})
        seconds = sum(call.seconds for call in self.traced)
        events = [event for call in self.traced for event in call.events]
        if not events:
            self.say(f"{self.folder}: no profile table; the trace names no operation of the step")
            return
        table = (
            f"{NUM_STEPS} steps of {', '.join(shapes)} (rows × tokens): "
            f"{1e3 * seconds / NUM_STEPS:.1f} ms per step, wall-clock time with tracing; "
            "operations that run at the same time share the time\n\n"
        ) + tabulate(events, seconds=seconds, num_steps=NUM_STEPS)
        (self.folder / "table.md").write_text(table, encoding="utf-8")
        self.say(
            f"{table}{self.folder} holds the traces; open a perfetto_trace.json.gz at "
            "ui.perfetto.dev"
        )
