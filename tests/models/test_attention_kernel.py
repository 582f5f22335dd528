"""The attention kernels for GPUs, interpreted, against the formula with autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.config.compute import MeshSection
from tinybert_jax.models import attention
from tinybert_jax.models.attention import attend, make_visible
from tinybert_jax.models.attention_kernel import dropout_seeds, triton_attention
from tinybert_jax.models.dropout import dropout
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import make_mesh
from tinybert_jax.runs.topologies import devices_of, has_gpu_compiler

HEADS, KEY, RATE = 2, jax.random.key(5), 0.1


def draw(seq: int, head_dim: int, rows: int = 2) -> tuple:
    """([queries, keys, values] that bfloat16 holds, segment ids with padding at some ends)."""
    rng = np.random.default_rng(0)
    shape = (rows, seq, HEADS, head_dim)
    taps = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(jnp.float32) for _ in "qkv"]
    cuts = np.array([[seq // 3, seq // 2, seq - seq // 8], [seq // 5, seq, seq]] * (rows // 2))
    segments = 1 + (np.arange(seq)[None, None] >= cuts[:, :, None]).sum(1)
    return taps, jnp.asarray(np.where(segments == 4, 0, segments), jnp.int32)


def formula(queries, keys, values, visible, rate):
    """dropout(softmax(QKᵀ/√head_dim))·V in fp32 with the map in memory."""
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scores = exact("bthk,bshk->bhts", queries, keys) / queries.shape[-1] ** 0.5
    probs = jax.nn.softmax(jnp.where(visible.pairs[:, None], scores, -1e30))
    return exact("bhts,bshk->bthk", dropout(probs, rate, KEY), values)


def kernel(queries, keys, values, visible, rate):
    seeds = dropout_seeds(KEY, len(queries), HEADS, queries.shape[1])
    run = functools.partial(triton_attention, dropout_rate=rate, interpret=True)
    ids = visible.query_ids, visible.key_ids
    return sharding.shard_map_over_batch(run)(queries, keys, values, *ids, seeds)


@functools.partial(jax.jit, static_argnums=(0, 4))
def gradients(function, taps, visible, is_real, rate) -> tuple:
    """Context, and the gradients of a sum over the context of real tokens."""

    def value(*taps):
        context = function(*taps, visible, rate).astype(jnp.float32)
        return jnp.sum(jnp.sin(jnp.where(is_real[..., None, None], context, 0))), context

    grads, context = jax.grad(value, (0, 1, 2), has_aux=True)(*taps)
    return context, *grads


def errors(got, want) -> dict[str, float]:
    """Norm of the difference, of the norm; NaN does not pass."""
    got, want = ([np.asarray(x, np.float32) for x in each] for each in (got, want))
    norm = np.linalg.norm
    return {n: float(norm(g - w) / norm(w)) for n, g, w in zip("oqkv", got, want, strict=True)}


@pytest.mark.parametrize(
    ("seq", "head_dim", "rate"),
    [  # the last two: gradients in several blocks of queries
        *((64, 32, RATE), (64, 64, 0.0), (96, 26, 0.0), (128, 26, RATE), (128, 64, RATE)),
        *((160, 26, RATE), (256, 64, 0.0), (272, 26, RATE), (512, 26, RATE)),
    ],
)
def test_kernels_equal_the_formula(seq, head_dim, rate):
    """Value and gradients, of packed and of padded rows, in both dtypes."""
    taps, segments = draw(seq, head_dim)
    rounded = [x.astype(jnp.bfloat16) for x in taps]
    for mask in (segments, segments > 0):
        inputs = make_visible(mask), segments > 0, rate
        want = gradients(formula, taps, *inputs)
        found = errors(gradients(kernel, taps, *inputs), want)
        assert max(found.values()) < 1e-5, found
        found = errors(gradients(kernel, rounded, *inputs), want)
        assert max(found.values()) < 4e-3, found


def test_dropout_drops_the_same_entries_on_eight_devices():
    taps, segments = draw(32, 26, rows=8)
    inputs = taps, make_visible(segments), segments > 0, RATE
    want = gradients(kernel, *inputs)
    mesh = make_mesh(MeshSection())
    assert mesh.size == 8
    with jax.set_mesh(mesh):
        found = gradients(kernel, *jax.device_put(inputs[:3], sharding.batch_sharding(mesh)), RATE)
    for got, one in zip(found, want, strict=True):
        np.testing.assert_allclose(got, one, atol=1e-6)


def test_the_kernel_drops_the_entries_of_xla_and_auto_does_not_take_it(monkeypatch):
    """As on a GPU: `attend` passes the key, the rate and the ids on."""
    (queries, keys, values), segments = draw(64, 26)
    taps = [x.astype(jnp.bfloat16) for x in (queries, keys, values)]
    inputs = *taps, make_visible(segments), 0.5, KEY
    want, scores = attend(*inputs, backend="xla")
    assert scores is not None
    same, _ = attend(*inputs)
    np.testing.assert_array_equal(same, want)  # no GPU is here: auto is xla

    monkeypatch.setattr(attention, "missing_device", lambda backend: None)
    interpreted = functools.partial(triton_attention, interpret=True)
    monkeypatch.setattr(attention, "triton_attention", interpreted)
    got, scores = attend(*inputs, backend="triton")
    assert scores is None
    assert np.abs(np.asarray(got - want, np.float32)).max() < 0.05  # a wrong mask: above 1
    assert attend(*inputs)[1] is not None  # with dropout auto is xla there too


def test_gradients_do_not_depend_on_what_padding_holds():
    taps, segments = draw(40, 26)
    inputs = make_visible(segments > 0), segments > 0, RATE
    other = [jnp.where((segments > 0)[..., None, None], x, 7.0) for x in taps]
    found, want = (gradients(kernel, x, *inputs) for x in (other, taps))
    is_real = np.asarray(segments > 0)
    for got, one in zip(found, want, strict=True):
        np.testing.assert_array_equal(np.asarray(got)[is_real], np.asarray(one)[is_real])


@pytest.mark.skipif(not has_gpu_compiler(), reason="needs JAX's plugin for CUDA")
@pytest.mark.parametrize(("seq", "head_dim"), [(128, 26), (512, 64)])
def test_kernels_compile_for_a_gpu_that_is_not_here(seq, head_dim):
    """Two kernels, and nothing of the size of a map beside the operands."""
    mesh = make_mesh(MeshSection(), devices_of("h200:1"))
    place = sharding.batch_sharding(mesh)

    def leaf(dtype, *shape):
        return jax.ShapeDtypeStruct((64, *shape), dtype, sharding=place)

    def step(queries, keys, values, segments, cotangent):
        def run(*taps):
            return attend(*taps, make_visible(segments), RATE, KEY, backend="triton")[0]

        return jax.vjp(run, queries, keys, values)[1](cotangent)

    tap = leaf(jnp.bfloat16, seq, HEADS, head_dim)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(tap, tap, tap, leaf(jnp.int32, seq), tap).compile()
    assert compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 2
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * HEADS * seq**2
