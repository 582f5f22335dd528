"""What the text of a compiled program tells, against programs whose figures are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tinybert_jax.config.compute import MeshSection
from tinybert_jax.parallel.mesh import make_mesh
from tinybert_jax.performance import hlo

ROWS, WIDTH, ROUNDS = 16, 32, 5


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshSection())


def program(function, *inputs, mesh, specs):
    places = [NamedSharding(mesh, spec) for spec in specs]
    compiled = jax.jit(
        function, in_shardings=places, out_shardings=NamedSharding(mesh, PartitionSpec())
    ).lower(*inputs)
    return hlo.read(compiled.compile().as_text())


def test_gradient_of_a_split_batch_is_reduced(mesh):
    def gradient(kernel, rows):
        with jax.named_scope("~layer"):
            return jax.grad(lambda kernel: jnp.sum((rows @ kernel) ** 2))(kernel)

    inputs = np.ones((WIDTH, WIDTH), np.float32), np.ones((ROWS, WIDTH), np.float32)
    specs = (PartitionSpec(), PartitionSpec("data"))
    (own,) = program(gradient, *inputs, mesh=mesh, specs=specs).collectives()
    assert own.kind == "all-reduce" and own.num_calls == 1
    assert own.num_bytes == WIDTH * WIDTH * 4
    assert own.scope.startswith("layer")


def test_a_collective_in_a_loop_counts_once_a_round(mesh):
    def rounds(rows):
        def add(total, _):
            return total + jnp.sum(rows * total[0], axis=0), None

        return jax.lax.scan(add, jnp.ones(WIDTH), None, length=ROUNDS)[0]

    inputs = (np.ones((ROWS, WIDTH), np.float32),)
    found = program(rounds, *inputs, mesh=mesh, specs=(PartitionSpec("data"),)).collectives()
    assert sum(own.num_calls for own in found) == ROUNDS
    assert sum(own.num_bytes for own in found) == ROUNDS * WIDTH * 4


def test_a_gathered_array_counts_whole(mesh):
    inputs = (np.ones((ROWS, WIDTH), np.float32),)
    read = program(lambda rows: rows * 2, *inputs, mesh=mesh, specs=(PartitionSpec("data"),))
    (own,) = read.collectives()
    assert (own.kind, own.num_bytes) == ("all-gather", ROWS * WIDTH * 4)


def test_traffic_of_a_loop_over_layers_reads_each_layer_once():
    """The stack is read in slices: a whole stack a round would be ROUNDS times as much."""
    size = 256

    def layers(stack, rows):
        return jax.lax.scan(lambda rows, kernel: (rows @ kernel, None), rows, stack)[0]

    stack, rows = np.ones((ROUNDS, size, size), np.float32), np.ones((8, size), np.float32)
    text = jax.jit(layers).lower(stack, rows).compile().as_text()
    traffic = hlo.read(text).memory_traffic()
    assert stack.nbytes <= traffic < 4 * stack.nbytes


def test_flops_and_kinds_of_kernels():
    """A product with a loop around it, one that cuBLAS computes, and a fusion that only moves."""
    text = jax.jit(lambda x, y: jax.lax.fori_loop(0, ROUNDS, lambda _, x: x @ y, x))
    square = np.ones((WIDTH, WIDTH), np.float32)
    kernels = hlo.read(text.lower(square, square).compile().as_text()).kernels()
    assert sum(own.num_runs * own.flops for own in kernels) == ROUNDS * 2 * WIDTH**3

    text = """HloModule m

%moves (p: f32[4,8]) -> f32[8,4] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %t = f32[8,4]{1,0} transpose(%p), dimensions={1,0}
}

ENTRY %main (x: f32[4,8], y: f32[8,3]) -> f32[8,4] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[8,3]{1,0} parameter(1)
  %gemm = (f32[4,3]{1,0}, s8[64]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %fusion.1 = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%moves
}
"""  # noqa: E501
    first, second = hlo.read(text).kernels()
    assert (first.kind, first.flops) == ("product", 2 * 4 * 3 * 8)
    assert (second.kind, second.flops, second.num_bytes) == ("copy", 0, 2 * 4 * 8 * 4)


def test_shapes():
    assert hlo.num_bytes("(f32[2,3]{1,0}, bf16[8]{0:T(8,128)S(1)}, pred[])") == 24 + 16 + 1
    assert hlo.num_bytes("(f32[2,3]{1,0}, bf16[8]{0:T(8,128)S(1)})", in_memory=True) == 24


def test_cycles_of_the_tpu_compiler_count_once_a_round():
    text = """HloModule m

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  ROOT %f = (s32[], f32[4]{0}) fusion(%p), kind=kLoop, calls=%none, backend_config={"window_config":{"estimated_cycles":"7"}}
}

%cond (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]{0}) parameter(0)
  %bound = s32[] constant(6)
  ROOT %less = pred[] compare(%p, %bound), direction=LT
}

ENTRY %main (x: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = (s32[], f32[4]{0}) parameter(0)
  ROOT %w = (s32[], f32[4]{0}) while(%x), condition=%cond, body=%body
}
"""  # noqa: E501
    assert hlo.read(text).estimated_cycles() == 6 * 7
