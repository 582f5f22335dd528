"""The ways to compute attention: what each needs, and cuDNN's against the score map.

On a machine with an NVIDIA GPU: JAX_PLATFORMS=cuda pytest tests/test_attention.py
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax import sharding
from tinybert_jax.model.attention import attend, cudnn_attention, splash_attention, visible
from tinybert_jax.sections import MeshSection

SEQ = 128


def drawn(head_dim: int, *, is_packed: bool = True, dtype=jnp.bfloat16, seq: int = SEQ) -> tuple:
    """Queries, keys, values, what is seen and which tokens are real: packed, or in part padding."""
    rng = np.random.default_rng(0)
    shape = (8, seq, 2, head_dim)
    taps = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3)]
    segments = np.repeat([[1, 2, 2, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]] * 2, seq // 4, 1)
    mask = jnp.asarray(segments, jnp.int32)
    return taps, visible(mask if is_packed else mask == 1), mask > 0


def gradients(attention, taps, seen, is_real) -> list[jax.Array]:
    """Output, and gradients of a sum over real tokens, in fp32."""

    def value(*taps):
        context = attention(*taps, seen).astype(jnp.float32)
        context = jnp.where(is_real[:, :, None, None], context, 0)
        return jnp.sum(jnp.sin(context)), context

    grads, context = jax.jit(jax.grad(value, (0, 1, 2), has_aux=True))(*taps)
    return [x.astype(jnp.float32) for x in (context, *grads)]


def by_map(*inputs):
    return attend(*inputs, 0.0, None, backend="xla")


def has_cudnn() -> bool:
    return "cuda" in jax.local_devices()[0].client.platform_version.lower()


@pytest.mark.gpu
@pytest.mark.skipif(not has_cudnn(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("head_dim", [64, 26])
@pytest.mark.parametrize("is_packed", [True, False])
def test_cudnn_against_the_map(head_dim, is_packed):
    """Against fp32; bfloat16 rounds at 2^-9, and here several times."""
    taps, seen, is_real = drawn(head_dim, is_packed=is_packed)
    exact = gradients(by_map, [x.astype(jnp.float32) for x in taps], seen, is_real)
    for name, want, got in zip(
        "oqkv", exact, gradients(cudnn_attention, taps, seen, is_real), strict=True
    ):
        error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        assert error < 2e-2, (name, error)  # NaN is not


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("on_mesh", [False, True], ids=["one", "eight"])
def test_splash_against_the_map(is_packed, on_mesh):
    """Sums of 128 products in fp32, in another order; heads of 26 as they are."""
    taps, seen, is_real = drawn(26, is_packed=is_packed, dtype=jnp.float32)
    exact = gradients(by_map, taps, seen, is_real)
    splash = functools.partial(splash_attention, interpret=True)
    mesh = sharding.make_mesh(MeshSection())
    with jax.set_mesh(mesh) if on_mesh else contextlib.nullcontext():
        if on_mesh:
            taps, seen, is_real = jax.device_put(
                (taps, seen, is_real), sharding.batch_sharding(mesh)
            )
        got = gradients(splash, taps, seen, is_real)
    for name, want, theirs in zip("oqkv", exact, got, strict=True):
        np.testing.assert_allclose(theirs, want, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (dict(dtype=jnp.float32), "bfloat16 or float16, got float32"),
        (dict(rate=0.1), "no dropout of attention, got a rate of 0.1"),
        (dict(seq=64), "a multiple of 128 tokens, got 64"),
        (dict(), "an NVIDIA GPU"),
    ],
)
def test_cudnn_says_what_it_needs(change, part):
    if not change and has_cudnn():
        pytest.skip("here it can")
    seq = change.get("seq", SEQ)
    taps, seen, _ = drawn(8, seq=seq, dtype=change.get("dtype", jnp.bfloat16))
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=f"cudnn expects .*{part}.*compute.attention=auto"):
        attend(*taps, seen, change.get("rate", 0.0), key, backend="cudnn")
    with pytest.raises(ValueError, match="splash expects "):
        attend(*taps, seen, change.get("rate", 0.0), key, backend="splash")
    if "cpu" in jax.default_backend():
        got = attend(*taps, seen, change.get("rate", 0.0), key, backend="auto")
        want = attend(*taps, seen, change.get("rate", 0.0), key, backend="xla")
        assert np.array_equal(got, want)


def test_a_run_that_asks_for_cudnn_in_vain_is_refused(world):
    path = world.distil(compute={"attention": "cudnn"}, num_seeds=2)
    named = ("needs compute.dtype bfloat16, got float32", "cannot train several seeds at once")
    world.fails("run", path, naming=named)
