"""The ways to compute attention: what each needs, and cuDNN's against the score map.

On a machine with an NVIDIA GPU: JAX_PLATFORMS=cuda pytest tests/test_attention.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.model.attention import attend

SEQ = 128


def drawn(head_dim: int, seed: int = 0, seq: int = SEQ) -> tuple:
    """Queries, keys, values in bfloat16, and the pairs of packed rows that end in padding."""
    rng = np.random.default_rng(seed)
    shape = (3, seq, 4, head_dim)
    taps = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(3)]
    segments = np.repeat([[1, 2, 2, 0], [1, 1, 1, 1], [1, 0, 0, 0]], seq // 4, axis=1)
    pairs = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
    return *taps, jnp.asarray(pairs)


def has_cudnn() -> bool:
    return "cuda" in jax.local_devices()[0].client.platform_version.lower()


@pytest.mark.gpu
@pytest.mark.skipif(not has_cudnn(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("head_dim", [64, 26])
@pytest.mark.parametrize("is_packed", [True, False])
def test_cudnn_against_the_map(head_dim, is_packed):
    """Output and gradients against fp32; bfloat16 rounds at 2^-9, and here several times."""
    queries, keys, values, pairs = drawn(head_dim)
    if not is_packed:
        pairs = pairs[:, :1]  # the first segment of each row: columns alone are masked
    is_real = pairs.any(-1)[:, :, None, None]

    def value(backend, *taps):
        context = attend(*taps, pairs, 0.0, None, backend=backend)
        context = jnp.where(is_real, context.astype(jnp.float32), 0)
        return jnp.sum(jnp.sin(context)), context

    def run(backend, dtype):
        taps = [x.astype(dtype) for x in (queries, keys, values)]
        function = jax.jit(jax.grad(lambda *t: value(backend, *t), (0, 1, 2), has_aux=True))
        grads, context = function(*taps)
        return [x.astype(jnp.float32) for x in (context, *grads)]

    exact = run("xla", jnp.float32)
    for name, want, got in zip("oqkv", exact, run("cudnn", jnp.bfloat16), strict=True):
        error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        assert np.isfinite(got).all(), name
        assert error < 2e-2, (name, error)


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
    *taps, pairs = drawn(8)
    taps = [x[:, :seq].astype(change.get("dtype", jnp.bfloat16)) for x in taps]
    pairs, key = pairs[:, :seq, :seq], jax.random.key(0)
    with pytest.raises(ValueError, match=f"cudnn expects .*{part}.*compute.attention=auto"):
        attend(*taps, pairs, change.get("rate", 0.0), key, backend="cudnn")
    if "cpu" in jax.default_backend():
        got = attend(*taps, pairs, change.get("rate", 0.0), key, backend="auto")
        want = attend(*taps, pairs, change.get("rate", 0.0), key, backend="xla")
        assert np.array_equal(got, want)


def test_a_run_that_asks_for_cudnn_in_vain_is_refused(world):
    path = world.distil(compute={"attention": "cudnn"}, num_seeds=2)
    named = ("needs compute.dtype bfloat16, got float32", "cannot train several seeds at once")
    world.fails("run", path, naming=named)
