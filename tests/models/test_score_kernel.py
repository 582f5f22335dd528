"""The kernel for the distance of attention scores, interpreted, against the loss with maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.config.compute import MeshSection
from tinybert_jax.losses.attention import attention_mse
from tinybert_jax.models import attention
from tinybert_jax.models.score_kernel import score_distance
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import make_mesh
from tinybert_jax.runs.topologies import devices_of, has_gpu_compiler

HEADS = 2
interpreted = functools.partial(score_distance, interpret=True)


def draw(seq: int, dims: tuple[int, int], rows: int = 2) -> tuple:
    """([queries and keys of student and teacher] that bfloat16 holds, segment ids)."""
    rng = np.random.default_rng(1)
    shapes = [(rows, seq, HEADS, dim) for dim in (dims[0], dims[0], dims[1], dims[1])]
    taps = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    segments = np.where(np.arange(seq) < seq // 3, 1, 2)[None].repeat(rows, 0)
    segments[0, seq - seq // 7 :] = 0
    return [x.astype(jnp.float32) for x in taps], jnp.asarray(segments, jnp.int32)


@functools.partial(jax.jit, static_argnums=(2, 3))
def value_and_gradients(taps, mask, normalisation, distance) -> list:
    def loss(query, key):
        teacher = taps[2:]
        return attention_mse(
            *(query, key, *teacher, mask),
            normalisation=normalisation,
            distance=distance,
            build_maps=None if distance else True,
        )

    value, gradients = jax.value_and_grad(loss, (0, 1))(*taps[:2])
    return [value, *gradients]


def check(taps, mask, normalisation="valid_only") -> None:
    want = value_and_gradients(taps, mask, normalisation, None)
    for dtype, limit in ((jnp.float32, 1e-5), (jnp.bfloat16, 4e-3)):
        rounded = [x.astype(dtype) for x in taps]
        got = value_and_gradients(rounded, mask, normalisation, interpreted)
        for name, g, w in zip("lqk", got, want, strict=True):
            g, w = np.asarray(g, np.float32), np.asarray(w)
            error = np.linalg.norm(g - w) / np.linalg.norm(w)
            assert error < (1e-5 if name == "l" else limit), (name, dtype, error)


@pytest.mark.parametrize(
    ("seq", "dims"), [(64, (26, 64)), (128, (32, 32)), (96, (64, 26)), (272, (26, 64))]
)
def test_kernel_equals_the_loss_with_maps(seq, dims):
    """Packed and padded rows; one block of queries, and several."""
    taps, segments = draw(seq, dims)
    check(taps, segments)
    check(taps, segments > 0)


def test_kernel_equals_the_loss_with_maps_of_all_queries():
    taps, segments = draw(40, (26, 64))
    check(taps, segments > 0, "paper_code")


def test_kernel_on_eight_devices():
    taps, segments = draw(32, (26, 64), rows=8)
    want = value_and_gradients(taps, segments, "valid_only", interpreted)
    mesh = make_mesh(MeshSection())
    assert mesh.size == 8
    with jax.set_mesh(mesh):
        inputs = jax.device_put((taps, segments), sharding.batch_sharding(mesh))
        sharded = sharding.shard_map_over_batch(interpreted)
        got = value_and_gradients(*inputs, "valid_only", sharded)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)


def test_the_kernel_is_taken_in_bfloat16_where_the_device_is(monkeypatch):
    taps = [x.astype(jnp.bfloat16) for x in draw(32, (26, 64))[0]]
    assert attention.fused_score_distance(*taps) is None  # no GPU is here
    monkeypatch.setattr(attention, "missing_device", lambda backend: None)
    assert attention.fused_score_distance(*taps) is score_distance
    wide = [jnp.zeros((*x.shape[:3], 72), x.dtype) for x in taps]
    assert attention.fused_score_distance(*wide) is None
    assert attention.fused_score_distance(*taps[:3], taps[3].astype(jnp.float32)) is None


@pytest.mark.skipif(not has_gpu_compiler(), reason="needs JAX's plugin for CUDA")
def test_the_kernel_compiles_for_a_gpu_that_is_not_here():
    """One kernel for value and gradient, and nothing of the size of a map."""
    mesh = make_mesh(MeshSection(), devices_of("h200:1"))
    place = sharding.batch_sharding(mesh)

    def leaf(dtype, *shape):
        return jax.ShapeDtypeStruct((64, *shape), dtype, sharding=place)

    taps = [leaf(jnp.bfloat16, 128, HEADS, dim) for dim in (26, 26, 64, 64)]
    with jax.set_mesh(mesh):
        lowered = value_and_gradients.lower(
            taps, leaf(jnp.int32, 128), "valid_only", score_distance
        )
        compiled = lowered.compile()
    assert compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * HEADS * 128**2
