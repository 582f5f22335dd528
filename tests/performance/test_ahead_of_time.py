"""The compiled text of our steps for a TPU or GPU that is not here, at a tiny size."""

import importlib.util
from pathlib import Path

import pytest

from tinybert_jax.performance import hlo
from tinybert_jax.runs.topologies import has_gpu_compiler

FILE = Path(__file__).parents[2] / "benchmarks" / "ahead_of_time.py"
has_libtpu = bool(importlib.util.find_spec("libtpu"))


def load_benchmark():
    spec = importlib.util.spec_from_file_location("ahead_of_time", FILE)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


@pytest.mark.skipif(not has_libtpu, reason="needs libtpu")
@pytest.mark.parametrize("work", ["distill", "mlm"])
def test_a_step_reduces_its_gradients_once_in_fp32_and_copies_little(work):
    benchmark = load_benchmark()
    found = benchmark.compile_line(benchmark.Line(work, "v5e:2x2"), tiny=True)
    reduced = found["reduced"]
    assert "bf16" not in reduced
    assert 0.7 * found["gradients"] < reduced["f32"] <= found["gradients"] + 1024
    assert found["kinds"]["copy"] < 0.15 * found["cycles"]


@pytest.mark.skipif(not has_gpu_compiler(), reason="needs JAX's plugin for CUDA")
def test_the_kernels_of_a_gpu_take_memory_from_a_step():
    """With score maps in memory, and with attention and its loss by the package's kernels."""
    benchmark = load_benchmark()
    line = benchmark.Line("distill", "h200:1", attention="auto", rows=32)
    maps, kernels = (
        benchmark.compile_line(own, tiny=True) for own in (line, line._replace(attention="triton"))
    )
    assert kernels["temporaries"] < 0.8 * maps["temporaries"]
    assert kernels["kernels"] < maps["kernels"]
    for found in (maps, kernels):
        assert sum(found["parts"].values()) == pytest.approx(found["milliseconds"])
        assert {"teacher", "student", "student, backward", "loss"} <= set(found["parts"])


def test_cycles_by_kind_and_reduced_bytes_of_a_text_by_hand():
    program = hlo.read(
        """%product (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  ROOT %dot.1 = f32[4,4]{1,0} dot(%p, %p)
}

ENTRY %main (x: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4]{1,0} parameter(0)
  %copy.1 = f32[4,4]{0,1} copy(%x), backend_config={"estimated_cycles":"30"}
  %fusion.1 = f32[4,4]{1,0} fusion(%copy.1), calls=%product, backend_config={"estimated_cycles":"5"}
  %all-reduce.1 = (f32[4,4]{1,0}, bf16[2]{0}) all-reduce(%fusion.1, %y), to_apply=%sum
  ROOT %add.1 = f32[4,4]{1,0} add(%fusion.1, %x), backend_config={"estimated_cycles":"7"}
}
"""
    )
    assert program.cycles_by_kind() == {"product": 5, "copy": 30, "rest": 7}
    assert program.reduced_bytes() == {"f32": 64, "bf16": 4}
