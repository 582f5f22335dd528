"""Registers and spills of the package's kernels on an H200 that is not here.

    python benchmarks/kernel_registers.py [--sizes 128x26,512x64]

Compiles attention (forward and backward, with dropout) and the distance of attention scores (to
heads of 64 dims) for rows of so many tokens and heads of so many dims, and has NVIDIA's `ptxas`
tell what they use. Needs `jax[cuda13]`, which brings it. A multiprocessor has 65,536 registers.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

TOKENS, HEADS, TEACHER_DIM, RATE = 32768, 12, 64, 0.1
SIZES = "64x26,64x64,128x26,128x32,128x64,256x26,256x64,512x26,512x32,512x64"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default=SIZES, help="tokens x head dim, …")
    args = parser.parse_args()
    print("| tokens | head dim | kernel | registers | bytes spilled |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is loaded
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder}"
        for size in args.sizes.split(","):
            width, head_dim = map(int, size.split("x"))
            for function, inputs in programs(width, head_dim):
                compile_for_a_gpu(function, inputs)
            for file in sorted(Path(folder).glob("*.ptx")):
                if re.search(r"\.entry \w*_kernel\(", file.read_text()):
                    print(f"| {width} | {head_dim} | {' | '.join(use_of(file))} |", flush=True)
            for file in Path(folder).iterdir():
                file.unlink()


def programs(width: int, head_dim: int) -> list[tuple[Any, list[tuple[Any, tuple[int, ...]]]]]:
    """(function, dtypes and shapes of its arguments) of both kernels with their gradients."""
    import jax
    import jax.numpy as jnp

    from tinybert_jax.models.attention_kernel import triton_attention
    from tinybert_jax.models.score_kernel import score_distance

    def attention(queries, keys, values, ids, seeds, cotangent):
        def run(*taps):
            return triton_attention(*taps, ids, ids, seeds, dropout_rate=RATE)

        context, pull = jax.vjp(run, queries, keys, values)
        return context, pull(cotangent)

    def distance(query, key, teacher_query, teacher_key, ids):
        def run(*taps):
            return score_distance(*taps, teacher_query, teacher_key, ids, ids).sum()

        return jax.value_and_grad(run, (0, 1))(query, key)

    rows = TOKENS // width
    tap = jnp.bfloat16, (rows, width, HEADS, head_dim)
    teacher = jnp.bfloat16, (rows, width, HEADS, TEACHER_DIM)
    ids, seeds = (jnp.int32, (rows, width)), (jnp.uint32, (rows, 3))
    return [
        (attention, [tap, tap, tap, ids, seeds, tap]),
        (distance, [tap, tap, teacher, teacher, ids]),
    ]


def compile_for_a_gpu(function: Any, inputs: list[tuple[Any, tuple[int, ...]]]) -> None:
    import jax

    from tinybert_jax.config.compute import MeshSection
    from tinybert_jax.parallel import sharding
    from tinybert_jax.parallel.mesh import make_mesh
    from tinybert_jax.runs.topologies import devices_of

    place = sharding.batch_sharding(make_mesh(MeshSection(), devices_of("h200:1")))
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype, shape in inputs]
    jax.jit(function).lower(*shapes).compile()


def use_of(ptx: Path) -> list[str]:
    """[kernel, registers of a thread, bytes that it spills to memory]."""
    command = [find_ptxas(), "-v", "--gpu-name", "sm_90a", str(ptx), "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    patterns = r"entry function '(\w+)'", r"Used (\d+) registers", r"(\d+) bytes spill stores"
    return [re.findall(pattern, told)[0] for pattern in patterns]


def find_ptxas() -> str:
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else None
    for folder in folders or ():
        for file in Path(folder).glob("*/bin/ptxas"):
            return str(file)
    return shutil.which("ptxas") or "ptxas"


if __name__ == "__main__":
    main()
