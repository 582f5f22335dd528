"""Compiles our training steps for TPUs and GPUs that are not here, and prints what they cost.

    python benchmarks/ahead_of_time.py [--runs runs/ahead-of-time] [--only WORD]

Needs the extra `tpu` for TPUs, and `jax[cuda13]` for GPUs (--only h200). Distillation of BERT-base
into tinybert-4l-312d and masked LM of that student, bfloat16: 64 rows of 128 tokens on a chip of
TPUs, 256 of 128 or 64 of 512 on a GPU. All times are a model. Cycles are those that the compiler of
TPUs estimates, which knows neither collectives nor waits for memory. Milliseconds of a GPU are a
roofline, kernel by kernel (see `Roofline`); products are not tuned, because that needs the GPU. A
line that is there already, in the folder of --runs, is only printed.
"""

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

CHUNK_SIZE, MASK_RATE = 4096, 0.15
SPECIAL_TOKEN_IDS, MASK_TOKEN_ID = (0, 101, 102, 103), 103
TINY = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


class Line(NamedTuple):
    """One step."""

    work: str
    topology: str
    layers: str = "unrolled"
    attention: str = (
        "auto"  # the setting of the student and of the term attention; the teacher: auto
    )
    rows: int = 64  # of a device
    width: int = 128
    teacher: str = "bfloat16"  # or float8: its products


TPU_LINES = [
    Line(work, topology, layers)
    for topology in ("v5e:4x4", "v6e:4x4")
    for work in ("distill", "mlm")
    for layers in ("loop", "unrolled")
]
TPU_LINES += [Line("distill", "v6e:16x16")]
GPU_LINES = [
    Line(work, "h200:1", "unrolled", attention, 32768 // width, width)
    for work, width in (("distill", 128), ("distill", 512), ("mlm", 128))
    for attention in ("auto", "triton")
]
GPU_LINES += [
    line._replace(teacher="float8")
    for line in GPU_LINES
    if line.work == "distill" and line.attention == "triton"
]
TPU_COLUMNS = ("step", "topology", "layers", "Mcycles", "products", "copies", "temporaries")
TPU_COLUMNS += ("gradients", "reduced", "of it bf16", "compiled in")
GPU_COLUMNS = ("step", "tokens", "attention", "teacher", "ms", "by part", "products", "copies")
GPU_COLUMNS += ("kernels", "temporaries", "compiled in")


class Roofline(NamedTuple):
    """What a GPU does in a second: a kernel takes its largest share, and the launch.

    Rates that kernels of our steps reach in a trace of an H200, below those of its data sheet.
    """

    memory: float = 4.0e12  # bytes
    products: float = 700e12  # FLOPs
    float8: float = 1260e12  # FLOPs; not seen in a trace: the data sheet's ratio is 2
    vector: float = 16.7e12  # integer operations: 132 multiprocessors, 64 lanes, 1.98 GHz
    launch: float = 1.5e-6  # seconds

    def seconds(
        self, num_bytes: float, flops: float, operations: float, *, is_float8: bool = False
    ) -> float:
        rate = self.float8 if is_float8 else self.products
        bounds = num_bytes / self.memory, flops / rate, operations / self.vector
        return max(bounds) + self.launch


# Integer operations of an entry of a map each time that a kernel computes it, counted in its PTX:
# of the hash of dropout and the masks; of a difference of scores, half of all operations.
MAP_OPERATIONS = 22
SCORE_OPERATIONS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/ahead-of-time"))
    parser.add_argument("--only", default="", help="lines with this word")
    parser.add_argument("--line", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.line:
        print(json.dumps(compile_line(Line(*json.loads(args.line)))))
        return
    args.runs.mkdir(parents=True, exist_ok=True)
    for lines, columns, cells in (
        (TPU_LINES, TPU_COLUMNS, tpu_cells),
        (GPU_LINES, GPU_COLUMNS, gpu_cells),
    ):
        named = [(re.sub(r"\W", "-", "-".join(map(str, line))), line) for line in lines]
        chosen = [(name, line) for name, line in named if args.only in name]
        if chosen:
            print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
        for name, line in chosen:
            file = args.runs / f"{name}.json"
            if not file.is_file():  # a process for each: libtpu compiles for one topology
                command = [sys.executable, __file__, "--line", json.dumps(line)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                file.write_text(done.stdout.splitlines()[-1])
            print(f"| {' | '.join(cells(line, json.loads(file.read_text())))} |", flush=True)


def tpu_cells(line: Line, found: dict[str, Any]) -> list[str]:
    total = found["cycles"]
    return [
        *line[:3],
        f"{total / 1e6:.1f}",
        f"{found['kinds'].get('product', 0) / total:.0%}",
        f"{found['kinds'].get('copy', 0) / total:.0%}",
        f"{found['temporaries'] / 1e6:,.0f} MB",
        f"{found['gradients'] / 1e6:.1f} MB",
        f"{sum(found['reduced'].values()) / 1e6:.1f} MB",
        f"{found['reduced'].get('bf16', 0) / 1e6:.1f} MB",
        f"{found['seconds']:.0f} s",
    ]


def gpu_cells(line: Line, found: dict[str, Any]) -> list[str]:
    parts = sorted(found["parts"].items(), key=lambda part: -part[1])
    return [
        *(line.work, f"{line.rows} × {line.width}", line.attention, line.teacher),
        f"{found['milliseconds']:.1f}",
        ", ".join(f"{name} {value:.1f}" for name, value in parts if value >= 0.05),
        f"{found['kinds'].get('product', 0):.1f}",
        f"{found['kinds'].get('copy', 0):.1f}",
        f"{found['kernels']:,}",
        f"{found['temporaries'] / 1e6:,.0f} MB",
        f"{found['seconds']:.0f} s",
    ]


def compile_line(line: Line, tiny: bool = False) -> dict[str, Any]:
    """Figures of the step of one device."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the devices to compile for are not here
    import jax

    from tinybert_jax.config.compute import MeshSection
    from tinybert_jax.parallel.mesh import make_mesh
    from tinybert_jax.performance import hlo
    from tinybert_jax.runs.topologies import devices_of

    mesh = make_mesh(MeshSection(), devices_of(line.topology))
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    with as_if_a_gpu_were_here() if is_gpu else contextlib.nullcontext():
        state, step = make_step(line, mesh, tiny=tiny)
        begin = time.perf_counter()
        compiled = step()
    program = hlo.read(compiled.as_text())
    found = {
        "seconds": time.perf_counter() - begin,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "gradients": sum(4 * leaf.size for leaf in jax.tree.leaves(state.params)),
        "reduced": program.reduced_bytes(),
    }
    if is_gpu:
        return found | roofline(program)
    return found | {"cycles": program.estimated_cycles(), "kinds": program.cycles_by_kind()}


@contextlib.contextmanager
def as_if_a_gpu_were_here():
    """JAX and `attend` admit cuDNN's attention only where the GPU is that they ask for its kind."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    from tinybert_jax.models import attention

    def missing_device(backend: str) -> str | None:
        return "a TPU" if backend == "splash" else None

    with (
        mock.patch.object(attention, "missing_device", missing_device),
        mock.patch.object(cudnn, "check_cudnn_version", lambda: 91000),
        mock.patch.object(cudnn, "check_compute_capability", lambda own: float(own) <= 9),
        mock.patch.object(cudnn, "is_cuda_compute_capability_equal", lambda own: own == "9.0"),
    ):
        yield


def roofline(program: Any) -> dict[str, Any]:
    """Milliseconds of a step on a GPU, also by part of the step and by kind of kernel."""
    parts: dict[str, float] = defaultdict(float)
    kinds: dict[str, float] = defaultdict(float)
    num_kernels = 0
    for kernel in program.kernels():
        flops, operations = attention_work(kernel.instruction)
        is_float8 = "matmul$f8" in kernel.instruction.text
        seconds = Roofline().seconds(
            kernel.num_bytes, kernel.flops + flops, operations, is_float8=is_float8
        )
        parts[part_of(kernel.instruction.scope)] += 1e3 * seconds * kernel.num_runs
        kind = "attention" if flops else kernel.kind
        kinds[kind] += 1e3 * seconds * kernel.num_runs
        num_kernels += kernel.num_runs
    total = sum(parts.values())
    return {"milliseconds": total, "parts": parts, "kinds": kinds, "kernels": num_kernels}


def attention_work(instruction: Any) -> tuple[float, float]:
    """(FLOPs, integer operations) of one of the kernels that XLA's text tells nothing of."""
    target = re.search(r'custom_call_target="([^"]*)"', instruction.text)
    name = re.search(r'op_name="([^"]*)"', instruction.text)
    shapes = re.findall(r"\[(\d+),(\d+),(\d+),(\d+)\]", instruction.type + instruction.text)
    if not target or not shapes or not re.search("fmha|triton", target[1]):
        return 0.0, 0.0
    word, shapes = name[1] if name else "", [tuple(map(int, shape)) for shape in shapes]
    rows, width, heads, head_dim = shapes[0]
    entries = rows * heads * width**2
    if "fmha" in target[1]:
        return (10.0 if "ackward" in target[1] else 4.0) * entries * head_dim, 0.0
    num_maps = 1 if "short" in word or "forward_kernel" in word else 2
    dims = [2 ** math.ceil(math.log2(shape[3])) for shape in shapes]  # filled up
    if "score_kernel" in word:  # two scores for each map, and the gradients of queries and keys
        flops = 2 * num_maps * (min(dims) + max(dims)) + 4 * dims[0]
        return float(flops * entries), float(SCORE_OPERATIONS * num_maps * entries)
    flops = (6 + 4 * num_maps if "backward_kernel" in word else 4) * dims[0]
    return float(flops * entries), float(MAP_OPERATIONS * num_maps * entries)


def part_of(scope: str) -> str:
    for word in ("teacher", "loss", "optimizer", "prepare"):
        if scope.startswith(word):
            return word
    if scope == "rest":
        return scope
    return "student, backward" if scope.endswith("backward") else "student"


def make_step(line: Line, mesh: Any, *, tiny: bool) -> Any:
    """(abstract state, function that compiles the step)."""
    import jax

    from tinybert_jax.models.params import unstack_layers
    from tinybert_jax.parallel import sharding
    from tinybert_jax.training import optimizer as optimizers
    from tinybert_jax.training.members import join_optimizer
    from tinybert_jax.training.step import abstract_state, make_train_step

    unroll = line.layers == "unrolled"
    objective, init, frozen = make_objective(line, mesh, tiny=tiny)
    schedule = optimizers.make_schedule(
        "constant", learning_rate=1e-4, num_steps=10**6, warmup_steps=0
    )
    optimizer = join_optimizer(optimizers.make_optimizer(schedule), objective.members)
    key = jax.random.key(0)
    params = jax.eval_shape(lambda k: unstack_layers(init(k)) if unroll else init(k), key)
    state = abstract_state(params, optimizer, key, mesh)
    places = sharding.named_shardings(sharding.param_specs(frozen, mesh), mesh)
    frozen = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        frozen,
        places,
    )
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(objective, optimizer, schedule, mesh, placed, num_steps=10**6)
    return state, lambda: step.compile(state, make_batch(line, mesh), frozen)


def make_objective(line: Line, mesh: Any, *, tiny: bool) -> Any:
    """(objective, init of the trained parameters, the teacher's abstract parameters)."""
    import jax
    import jax.numpy as jnp

    from tinybert_jax.config.distillation import DistillSection
    from tinybert_jax.models.heads import make_encoder, make_masked_lm
    from tinybert_jax.models.params import frozen_params
    from tinybert_jax.objectives.alignment import init_projection
    from tinybert_jax.objectives.distillation import Options, Role, make_distill
    from tinybert_jax.objectives.masked_lm import make_mlm
    from tinybert_jax.parallel.mesh import num_batch_shards
    from tinybert_jax.settings.sizes import PRESETS, ModelConfig
    from tinybert_jax.terms.table import reads_of

    unroll = line.layers == "unrolled"
    options: dict[str, Any] = {"unroll": unroll, "dtype": jnp.bfloat16}
    small = {**TINY, "hidden_size": 32, "vocab_size": 1200} if tiny else {}
    student = ModelConfig(**PRESETS["tinybert-4l-312d"] | small)
    shards = num_batch_shards(mesh)
    if line.work == "mlm":
        apply, init = make_masked_lm(student, attention=line.attention, **options)
        objective = make_mlm(
            apply,
            mask_rate=MASK_RATE,
            mask_token_id=MASK_TOKEN_ID,
            special_token_ids=SPECIAL_TOKEN_IDS,
            vocab_size=student.vocab_size,
            max_chunk_size=CHUNK_SIZE,
            num_shards=shards,
        )
        return objective, init, ()
    wide = {**small, "hidden_size": 64} if tiny else {}
    teacher = ModelConfig(**PRESETS["bert-base"] | wide)
    terms = DistillSection().terms("general")
    apply, init = make_encoder(student, attention=line.attention, **options)
    if line.teacher == "float8":
        options["product_dtype"] = jnp.float8_e4m3fn
    teacher_apply, teacher_init = make_encoder(teacher, **options)
    frozen = jax.eval_shape(lambda k: frozen_params(teacher_init(k), **options), jax.random.key(0))
    objective = make_distill(
        Role(apply, reads_of(terms), student.num_hidden_layers),
        Role(teacher_apply, reads_of(terms, of_teacher=True), teacher.num_hidden_layers),
        terms,
        Options(num_shards=shards, fuses_scores=line.attention == "triton"),
    )

    def start(key: jax.Array) -> Any:
        projection = init_projection(key, student.hidden_size, teacher.hidden_size, 1)
        return {"student": init(key), "projection": projection}

    return objective, start, frozen


def make_batch(line: Line, mesh: Any) -> Any:
    """The abstract batch of all devices."""
    import jax
    import jax.numpy as jnp

    from tinybert_jax.batches.batch import Batch
    from tinybert_jax.models.inputs import Text
    from tinybert_jax.parallel import sharding

    def leaf(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        place = sharding.batch_sharding(mesh)
        return jax.ShapeDtypeStruct((line.rows * mesh.size, *shape), dtype, sharding=place)

    ids = leaf(jnp.int32, line.width)
    return Batch(
        Text(ids, ids), leaf(bool, line.width), {"labels": leaf(jnp.int32)}, leaf(jnp.float32)
    )


if __name__ == "__main__":
    main()
