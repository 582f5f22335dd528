"""Compiles the step of a stage for devices that need not be here, and says what it costs.

Nothing is trained and no weights are read. Memory and collectives are those of the compiled
program. FLOPs are counted by `performance.flops`; times are a model: FLOPs, bytes of memory and
bytes between chips, each divided by the rate that the vendor states.
"""

import functools
import math
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import ShapeDtypeStruct
from jax.sharding import Mesh

from tinybert_jax.batches.batch import Batch
from tinybert_jax.models.params import unstack_layers
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import BATCH_AXES, num_batch_shards
from tinybert_jax.performance import flops, hlo
from tinybert_jax.performance.device_peaks import peak_flops
from tinybert_jax.report.tables import format_si
from tinybert_jax.runs.estimate import batch_flops
from tinybert_jax.runs.run import Run
from tinybert_jax.runs.stage_state import Training
from tinybert_jax.runs.stage_step import make_optimizer, make_step
from tinybert_jax.runs.topologies import device_of
from tinybert_jax.runs.workload import count_last_layer_tokens, words_of, work_of
from tinybert_jax.training.members import merge_members
from tinybert_jax.training.step import abstract_state

_NUM_SAMPLED = 8  # batches among which the largest is looked for
_TOLERANCE = 1.02  # collectives over what the gradients need
_SMALL = 1024  # bytes of metrics and counts
_MOST_ROWS = 2**17  # of a batch that is looked for: tiny models fit more than anyone trains with


class Memory(NamedTuple):
    """Bytes on one device."""

    arguments: int  # state, teacher and batch
    temporaries: int
    outputs: int  # without those that take the place of arguments
    limit: float  # of the device; infinity where it is not known

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs


class Compiled(NamedTuple):
    """The step of one stage on one topology; figures are of one step, and of one device."""

    stage: str
    topology: str
    device: str
    num_devices: int
    mesh: str
    rows: int  # of the global batch
    width: int
    seconds: float  # of compiling
    memory: Memory
    collectives: tuple[hlo.Collective, ...]
    gradient_bytes: int  # of the trained parameters
    flops: dict[str, float]  # by part
    useful_share: float  # of the matrix units' work; the rest is padding of tiles
    cycles: int  # what the compiler of TPUs expects
    times: dict[str, float]  # seconds by bound; empty where the device's rates are not known
    problems: tuple[str, ...]
    largest_rows: int | None = None  # of a global batch that fits, where it was looked for


def compile_stage(run: Run, training: Training, topology: str) -> Compiled:
    """Compiles the step of a stage with the largest of its batches.

    `run`: its mesh is of the devices of the topology. `training`: as the stage trains.
    """
    batch = _largest_batch(training)
    trained = _trained(run, training)
    begin = time.perf_counter()
    try:
        program = _compile(run, training, batch)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_large(run, training, topology, batch, trained, str(error))
    seconds = time.perf_counter() - begin
    text = hlo.read(program.as_text())
    stats = program.memory_analysis()
    compiled = _about(run, training, topology, batch, trained)._replace(
        seconds=seconds,
        memory=_memory(stats, topology),
        collectives=_summed(text.collectives()),
        cycles=text.estimated_cycles(),
    )
    compiled = compiled._replace(times=_times(run, compiled, text))
    return compiled._replace(problems=tuple(_problems(run.mesh, compiled)))


def largest_batch(run: Run, training: Training, compiled: Compiled) -> int:
    """The most rows of a global batch that fit on the devices, within a tenth; at most 131,072.

    Temporaries grow with the rows: two programs tell by how much, and a third shows that the answer
    fits. Raises ValueError where the memory of the devices is not known.
    """
    limit, own = compiled.memory.limit, compiled.memory
    if not math.isfinite(limit):
        raise ValueError(
            f"--largest-batch: expected a topology such as v5e:4x4 or h200:8, got "
            f"{compiled.topology}; its memory is not known"
        )
    batch = _largest_batch(training)
    unit = num_batch_shards(run.mesh) * training.section.gradient_accumulation_steps

    def memory(times: int) -> float:
        rows = jax.tree.map(
            lambda x: ShapeDtypeStruct((times * len(x), *x.shape[1:]), x.dtype), batch
        )
        try:
            stats = _compile(run, training, rows).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return math.inf
        return _memory(stats, compiled.topology).total

    rows, twice = compiled.rows, memory(2)
    a_row = max((twice - own.total) / rows, 1.0)
    guess = rows * max(min(int(1 + (limit - own.total) / a_row / rows), _MOST_ROWS // rows), 1)
    while guess > rows and (used := memory(guess // rows)) > limit:
        fitting = rows + (limit - own.total) / (used - own.total) * (guess - rows)
        guess = max(int(min(max(fitting, 0.6 * guess), 0.9 * guess) / rows), 1) * rows
    return guess // unit * unit if own.total <= limit else 0


def describe(compiled: Compiled) -> str:
    """The figures as text; times and FLOPs are estimates."""
    memory = compiled.memory
    if not memory.total:  # the compiler has made no program
        head = f"{compiled.stage} on {compiled.num_devices} × {compiled.device}"
        batches = f"batches of {compiled.rows:,} × {compiled.width}"
        lines = [f"{head} ({compiled.topology}), mesh {compiled.mesh}: {batches}"]
        return "\n".join(lines + [f"  NOT GOOD     {own}" for own in compiled.problems])
    limit = f" of {format_si(memory.limit, 'B')}" if math.isfinite(memory.limit) else ""
    per_kind = defaultdict(int)
    for own in compiled.collectives:
        per_kind[own.kind] += own.num_bytes
    lines = [
        f"{compiled.stage} on {compiled.num_devices} × {compiled.device} ({compiled.topology}), "
        f"mesh {compiled.mesh}: batches of {compiled.rows:,} × {compiled.width}, compiled in "
        f"{compiled.seconds:.0f} s",
        f"  memory       {format_si(float(memory.total), 'B')}{limit} on each device: arguments "
        f"{format_si(float(memory.arguments), 'B')}, temporaries "
        f"{format_si(float(memory.temporaries), 'B')}, results "
        f"{format_si(float(memory.outputs), 'B')}",
        "  collectives  "
        + (
            ", ".join(f"{kind} {format_si(float(n), 'B')}" for kind, n in per_kind.items())
            or "none"
        )
        + f" (gradients: {format_si(float(compiled.gradient_bytes), 'B')})",
        *(
            f"    {own.kind:<20} {format_si(float(own.num_bytes), 'B'):>8} in {own.num_calls} "
            f"call{'s' * (own.num_calls > 1)}, {own.scope}"
            for own in compiled.collectives
        ),
        "  FLOPs        "
        + ", ".join(f"{name} {format_si(n)}" for name, n in compiled.flops.items())
        + f" on each device; {1 - compiled.useful_share:.0%} of the matrix units' work is padding",
    ]
    if compiled.times:
        bound = max(compiled.times, key=compiled.times.__getitem__)
        shown = ", ".join(f"{name} {1e3 * t:.2f} ms" for name, t in compiled.times.items())
        rate = compiled.rows * compiled.width / compiled.times[bound]
        lines.append(f"  estimate     {shown}: bound by {bound}, at most {format_si(rate)} slots/s")
    if compiled.largest_rows is not None:
        lines.append(f"  largest      global batch that fits: {compiled.largest_rows:,} rows")
    lines += [f"  NOT GOOD     {problem}" for problem in compiled.problems]
    if not compiled.problems:
        fits = "it fits" if math.isfinite(memory.limit) else "memory is not known"
        is_split = "fsdp 1 × tensor 1" not in compiled.mesh
        sends = "are not judged, as models are split" if is_split else "are the gradients' alone"
        lines.append(f"  GOOD         {fits}; collectives {sends}")
    return "\n".join(lines)


def to_json(compiled: Compiled) -> dict[str, Any]:
    """The figures as a JSON object."""
    limit = compiled.memory.limit
    return compiled._asdict() | {
        "memory": compiled.memory._asdict()
        | {"total": compiled.memory.total, "limit": limit if math.isfinite(limit) else None},
        "collectives": [own._asdict() for own in compiled.collectives],
    }


def _largest_batch(training: Training) -> Batch:
    steps = np.unique(np.linspace(0, training.num_steps - 1, _NUM_SAMPLED).astype(int))
    batches = (training.batches.batch_at(int(step)) for step in steps)
    return max(batches, key=lambda batch: batch.num_slots)


def _trained(run: Run, training: Training) -> Any:
    """The trained parameters of all members and seeds, as shapes."""

    def start(key: jax.Array) -> Any:
        params = merge_members({name: m.random_params(key) for name, m in training.members.items()})
        return unstack_layers(params) if run.compute.unroll_layers else params

    seeds = training.plan.seeds
    if len(seeds) == 1:
        return jax.eval_shape(start, jax.random.key(0))
    return jax.eval_shape(jax.vmap(start), jax.random.split(jax.random.key(0), len(seeds)))


def _compile(run: Run, training: Training, batch: Batch) -> Any:
    seeds, mesh = training.plan.seeds, run.mesh
    key = jax.random.key(0) if len(seeds) == 1 else jax.random.split(jax.random.key(0), len(seeds))
    schedule, optimizer = make_optimizer(training)
    averaged = training.section.average_decay is not None
    state = abstract_state(_trained(run, training), optimizer, key, mesh, averaged=averaged)
    zeros = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(training.frozen.random, jax.random.key(0)),
    )
    frozen = training.frozen.read(zeros)  # rounds and splits them as for the step
    places = sharding.named_shardings(sharding.param_specs(frozen, mesh), mesh)
    step = make_step(training, schedule, optimizer, mesh, state)
    place = sharding.batch_sharding(mesh)
    return step.compile(
        state,
        jax.tree.map(functools.partial(_abstract, place=place), batch),
        jax.tree.map(lambda leaf, place: _abstract(leaf, place=place), frozen, places),
    )


def _memory(stats: Any, topology: str) -> Memory:
    return Memory(
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.output_size_in_bytes - stats.alias_size_in_bytes,
        _memory_limit(topology),
    )


def _abstract(leaf: Any, *, place: Any) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=place)


def _about(run: Run, training: Training, topology: str, batch: Batch, trained: Any) -> Compiled:
    """What is known before the program is compiled."""
    plan, mesh, (rows, width) = training.plan, run.mesh, batch.shape
    work = work_of(run, plan)
    counted = batch_flops(
        work,
        batch,
        words_of(run, plan, batch, 0.0),
        count_last_layer_tokens(run, plan, width, batch.num_segments),
    )
    counted = {name: value / mesh.size for name, value in counted.items()}
    leaves = jax.tree.leaves(trained)
    return Compiled(
        stage=plan.name,
        topology=topology,
        device=mesh.devices.flat[0].device_kind,
        num_devices=mesh.size,
        mesh=" × ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        rows=rows,
        width=width,
        seconds=0.0,
        memory=Memory(0, 0, 0, _memory_limit(topology)),
        collectives=(),
        gradient_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        flops=counted,
        useful_share=_useful_share(run, topology, work, width),
        cycles=0,
        times={},
        problems=(),
    )


def _useful_share(run: Run, topology: str, work: Any, width: int) -> float:
    """The share of the encoders' products that is no padding of tiles."""
    device = device_of(topology)
    tile = device.tile if device else 1
    useful = done = 0.0
    models = [(model, 3 * work.num_seeds) for model in work.trained.values()]
    models += [(work.teacher, 1)] if work.teacher else []
    for model, times in models:
        own = times * flops.forward_flops_per_token(model, width)
        useful += own
        done += own / flops.useful_tile_share(model, width, tile)
    return useful / done


# "Used 24.6G of 15.7G hbm"; "total memory required for … (24.65G) exceeds available HBM (15.75G)".
_TOO_MUCH = (
    r"Used ([\d.]+\w+) of ([\d.]+\w+) hbm",
    r"required for .*?\(([\d.]+\w)\) exceeds .*?\(([\d.]+\w)\)",
)


def _too_large(
    run: Run, training: Training, topology: str, batch: Batch, trained: Any, error: str
) -> Compiled:
    """The compiler itself has refused a program that does not fit."""
    used = next((found for form in _TOO_MUCH if (found := re.search(form, error))), None)
    told = f"{used[1]} of {used[2]}" if used else error.splitlines()[0]
    problem = f"memory: it does not fit, the compiler needs {told}; {_SMALLER}"
    return _about(run, training, topology, batch, trained)._replace(problems=(problem,))


_SMALLER = (
    "lower global_batch_size or max_length, raise gradient_accumulation_steps, or split the models "
    "with mesh.fsdp"
)


def _memory_limit(topology: str) -> float:
    device = device_of(topology)
    return device.memory_bytes if device else math.inf


def _summed(collectives: Sequence[hlo.Collective]) -> tuple[hlo.Collective, ...]:
    """One entry for each kind and scope, the largest first."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for own in collectives:
        calls, size = sums.get((own.kind, own.scope), (0, 0))
        sums[own.kind, own.scope] = calls + own.num_calls, size + own.num_bytes
    found = [hlo.Collective(*key, *value) for key, value in sums.items()]
    return tuple(sorted(found, key=lambda own: -own.num_bytes))


def _times(run: Run, compiled: Compiled, program: hlo.Program) -> dict[str, float]:
    """Seconds that each part of a device needs at the rates that its vendor states."""
    device = device_of(compiled.topology)
    if device is None:
        return {}
    dtype = run.compute.dtype.removesuffix("_products")
    peak = peak_flops(compiled.device, dtype)
    assert peak is not None, compiled.device
    share = (compiled.num_devices - 1) / compiled.num_devices
    sent = sum(_SENT[own.kind] * share * own.num_bytes for own in compiled.collectives)
    return {
        "matrix units": sum(compiled.flops.values()) / compiled.useful_share / peak,
        "memory": program.memory_traffic() / device.memory_rate,
        "network": sent / device.link_rate,
    }


# Bytes that a device sends for a byte of the result, in a ring.
_SENT = {kind: 2.0 if kind == "all-reduce" else 1.0 for kind in hlo.COLLECTIVES}


def _problems(mesh: Mesh, compiled: Compiled) -> list[str]:
    """Why the program should not be run: it does not fit, or sends what the mesh does not need."""
    problems = []
    memory = compiled.memory
    if memory.total > memory.limit:
        problems.append(
            f"memory: {format_si(float(memory.total), 'B')} of "
            f"{format_si(memory.limit, 'B')}; {_SMALLER}"
        )
    if num_batch_shards(mesh) != mesh.size or mesh.shape[BATCH_AXES[1]] > 1:
        return problems  # split models gather weights and add up activations
    gathered = [own for own in compiled.collectives if own.kind != "all-reduce"]
    problems += [
        f"collectives: expected none but all-reduce, got {own.kind} of "
        f"{format_si(float(own.num_bytes), 'B')} for {own.scope}"
        for own in gathered
        if own.num_bytes > _SMALL
    ]
    reduced = sum(own.num_bytes for own in compiled.collectives if own.kind == "all-reduce")
    if reduced > _TOLERANCE * compiled.gradient_bytes + _SMALL:
        problems.append(
            f"collectives: expected all-reduce of the gradients, "
            f"{format_si(float(compiled.gradient_bytes), 'B')}, got "
            f"{format_si(float(reduced), 'B')}"
        )
    return problems
