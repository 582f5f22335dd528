"""Attention backends: xla against the formula, the fused backends against xla; refusals.

On a machine with an NVIDIA GPU: JAX_PLATFORMS=cuda pytest tests/models/test_attention.py
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.config.compute import MeshSection
from tinybert_jax.models.attention import (
    attend,
    cudnn_attention,
    make_visible,
    missing_device,
    splash_attention,
)
from tinybert_jax.models.dropout import dropout
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import make_mesh

SEQ = 128


def draw(head_dim: int, *, is_packed: bool = True, dtype=jnp.bfloat16, seq: int = SEQ) -> tuple:
    """([queries, keys, values], visible) of packed or padded rows; one row in four is padding."""
    rng = np.random.default_rng(0)
    shape = (8, seq, 2, head_dim)
    taps = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3)]
    segments = np.repeat([[1, 2, 2, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]] * 2, seq // 4, 1)
    mask = jnp.asarray(segments, jnp.int32)
    return taps, make_visible(mask if is_packed else mask == 1)


def gradients(attention, taps, visible) -> list[jax.Array]:
    """Output, and the gradients of a sum over the output, in fp32."""

    def value(*taps):
        context = attention(*taps, visible).astype(jnp.float32)
        return jnp.sum(jnp.sin(context)), context

    grads, context = jax.jit(jax.grad(value, (0, 1, 2), has_aux=True))(*taps)
    return [x.astype(jnp.float32) for x in (context, *grads)]


def xla_attention(*inputs):
    return attend(*inputs, 0.0, None, backend="xla")[0]


def reference_attention(queries, keys, values, visible, rate=0.0):
    """dropout(softmax(QKᵀ/√head_dim))·V with einsum and autodiff."""
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scores = exact("bthk,bshk->bhts", queries, keys) / queries.shape[-1] ** 0.5
    probs = jax.nn.softmax(jnp.where(visible.pairs[:, None], scores, -1e30))
    probs = dropout(probs, rate, jax.random.key(5))
    return exact("bhts,bshk->bthk", probs, values)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("head_dim", [26, 32])
@pytest.mark.parametrize("is_packed", [True, False])
def test_xla_equals_the_formula(head_dim, is_packed, rate):
    taps, visible = draw(head_dim, is_packed=is_packed, dtype=jnp.float32, seq=24)

    def attention(*inputs):
        return attend(*inputs, rate, jax.random.key(5), backend="xla")[0]

    with jax.default_matmul_precision("highest"):
        expected = gradients(functools.partial(reference_attention, rate=rate), taps, visible)
        results = gradients(attention, taps, visible)
    for got, want in zip(results, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_xla_in_bfloat16_with_a_large_common_part_of_all_keys():
    """The common part has to cancel in the gradient of the queries: score gradients sum to 0."""
    (queries, *others), visible = draw(32, dtype=jnp.float32, seq=24)
    common = 3 * jax.random.normal(jax.random.key(1), (1, 1, 1, 32))
    taps = [x.astype(jnp.bfloat16) for x in (queries, *(x + common for x in others))]
    expected = gradients(reference_attention, [x.astype(jnp.float32) for x in taps], visible)
    results = gradients(xla_attention, taps, visible)
    for name, want, got in zip("oqkv", expected, results, strict=True):
        error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        assert error < 1.5e-2, (name, error)


@pytest.mark.gpu
@pytest.mark.skipif(missing_device("cudnn") is not None, reason="no NVIDIA GPU for cuDNN")
@pytest.mark.parametrize("head_dim", [64, 26])
@pytest.mark.parametrize("is_packed", [True, False])
def test_cudnn_equals_xla(head_dim, is_packed):
    """Against xla in fp32; bfloat16 rounds at 2^-9, and cuDNN rounds several times."""
    taps, visible = draw(head_dim, is_packed=is_packed)
    expected = gradients(xla_attention, [x.astype(jnp.float32) for x in taps], visible)
    results = gradients(cudnn_attention, taps, visible)
    for name, want, got in zip("oqkv", expected, results, strict=True):
        error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        assert error < 2e-2, (name, error)  # also fails for NaN


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("on_mesh", [False, True], ids=["one", "eight"])
def test_splash_equals_xla(is_packed, on_mesh):
    """fp32 sums of 128 products in another order; a head_dim of 26 without padding."""
    inputs = draw(26, is_packed=is_packed, dtype=jnp.float32)
    expected = gradients(xla_attention, *inputs)
    mesh = make_mesh(MeshSection())
    assert mesh.size == 8
    with jax.set_mesh(mesh) if on_mesh else contextlib.nullcontext():
        if on_mesh:
            inputs = jax.device_put(inputs, sharding.batch_sharding(mesh))
        splash = sharding.shard_map_over_batch(functools.partial(splash_attention, interpret=True))
        results = gradients(splash, *inputs)
    for name, want, got in zip("oqkv", expected, results, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("backend", "change", "part"),
    [
        ("cudnn", dict(dtype=jnp.float32), "bfloat16, got float32"),
        ("cudnn", dict(head_dim=136), "at most 128 dims, got 136"),
        ("cudnn", dict(rate=0.1), "no attention dropout, got a rate of 0.1"),
        ("triton", dict(dtype=jnp.float32), "bfloat16, got float32"),
        ("triton", dict(head_dim=72), "at most 64 dims, got 72"),
        ("splash", dict(seq=64), "a multiple of 128 tokens, got 64"),
        ("cudnn", {}, "an NVIDIA GPU"),
        ("triton", {}, "an NVIDIA GPU"),
        ("splash", {}, "a TPU"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_with_the_requirement(backend, change, part):
    if not change and missing_device(backend) is None:
        pytest.skip(f"{backend} can run here")
    dtype, seq = change.get("dtype", jnp.bfloat16), change.get("seq", SEQ)
    taps, visible = draw(change.get("head_dim", 8), seq=seq, dtype=dtype)
    inputs = *taps, visible, change.get("rate", 0.0), jax.random.key(0)
    with pytest.raises(ValueError, match=f"{backend} expects .*{part}.*compute.attention=auto"):
        attend(*inputs, backend=backend)
    if missing_device("cudnn"):
        results = (attend(*inputs, backend=name) for name in ("auto", "xla"))
        jax.tree.map(np.testing.assert_array_equal, *results)


def test_the_device_is_that_of_the_mesh():
    """A program may be compiled for another machine than the one that compiles it."""
    for kind, platform, expected in (
        ("X", "tpu", None),
        ("NVIDIA X", "gpu", "a TPU, got NVIDIA X"),
    ):
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
        mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert missing_device("splash") == expected
            if jax.default_backend() != "gpu":
                assert "an NVIDIA GPU of" in missing_device("cudnn")
                assert (missing_device("triton") is None) == (platform == "gpu")


def test_a_run_whose_config_does_not_suit_the_backend_is_refused(world):
    path = world.distil(compute={"attention": "cudnn"}, num_seeds=2)
    named = (
        "expected compute.dtype bfloat16, got float32",
        "expected one seed, got 2 in prediction",
        "expected rows of a multiple of 128 tokens, got [16] in intermediate",
        "set compute.attention=auto",
    )
    world.fails("run", path, naming=named)
    path = world.distil(compute={"attention": "triton"}, num_seeds=2)
    world.fails("run", path, naming=named[:2])


@pytest.mark.skipif(missing_device("splash") is None, reason="splash can run here")
def test_a_run_on_a_machine_without_the_device_is_refused(world):
    stage = {"batching": "pack", "max_length": 128}
    sections = {"intermediate": stage, "prediction": stage, "compute": {"attention": "splash"}}
    world.fails("run", world.distil(**sections), naming=("expected a TPU, got cpu; run it there",))


def test_heads_that_are_too_wide_for_a_kernel_are_refused_before_the_run(world):
    compute = {"attention": "triton", "dtype": "bfloat16"}
    wide = {"num_hidden_layers": 1, "hidden_size": 96, "num_attention_heads": 1}
    world.fails(
        "run",
        world.distil(compute=compute, student=wide),
        naming=("compute.attention triton: expected heads of at most 64 dims, got 96",),
    )
