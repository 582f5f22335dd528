"""The ways to compute attention: what each needs, each against the score map, it by the formula.

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


def drawn(head_dim: int, *, is_packed: bool = True, dtype=jnp.bfloat16, seq: int = SEQ) -> tuple:
    """Queries, keys, values and what is visible: packed or padded, a row in four without text."""
    rng = np.random.default_rng(0)
    shape = (8, seq, 2, head_dim)
    taps = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3)]
    segments = np.repeat([[1, 2, 2, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]] * 2, seq // 4, 1)
    mask = jnp.asarray(segments, jnp.int32)
    return taps, make_visible(mask if is_packed else mask == 1)


def gradients(attention, taps, visible) -> list[jax.Array]:
    """Output, and gradients of a sum over all of it, in fp32."""

    def value(*taps):
        context = attention(*taps, visible).astype(jnp.float32)
        return jnp.sum(jnp.sin(context)), context

    grads, context = jax.jit(jax.grad(value, (0, 1, 2), has_aux=True))(*taps)
    return [x.astype(jnp.float32) for x in (context, *grads)]


def by_map(*inputs):
    return attend(*inputs, 0.0, None, backend="xla")[0]


def of_the_formula(queries, keys, values, visible, rate=0.0):
    """dropout(softmax(QKᵀ/√head_dim))·V and what autodiff makes of it."""
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scores = exact("bthk,bshk->bhts", queries, keys) / queries.shape[-1] ** 0.5
    probs = jax.nn.softmax(jnp.where(visible.pairs[:, None], scores, -1e30))
    probs = dropout(probs, rate, jax.random.key(5))
    return exact("bhts,bshk->bthk", probs, values)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("head_dim", [26, 32])
@pytest.mark.parametrize("is_packed", [True, False])
def test_the_map_against_the_formula(head_dim, is_packed, rate):
    taps, visible = drawn(head_dim, is_packed=is_packed, dtype=jnp.float32, seq=24)

    def by_map(*inputs):
        return attend(*inputs, rate, jax.random.key(5), backend="xla")[0]

    with jax.default_matmul_precision("highest"):
        wanted = gradients(functools.partial(of_the_formula, rate=rate), taps, visible)
        ours = gradients(by_map, taps, visible)
    for want, got in zip(wanted, ours, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_the_map_in_bfloat16_where_all_keys_have_much_in_common():
    """What all keys share must cancel in the queries' gradient: a row of slopes adds up to 0."""
    (queries, *others), visible = drawn(32, dtype=jnp.float32, seq=24)
    shared = 3 * jax.random.normal(jax.random.key(1), (1, 1, 1, 32))
    taps = [x.astype(jnp.bfloat16) for x in (queries, *(x + shared for x in others))]
    wanted = gradients(of_the_formula, [x.astype(jnp.float32) for x in taps], visible)
    for name, want, got in zip("oqkv", wanted, gradients(by_map, taps, visible), strict=True):
        error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        assert error < 1.5e-2, (name, error)


@pytest.mark.gpu
@pytest.mark.skipif(missing_device("cudnn") is not None, reason="no NVIDIA GPU that can")
@pytest.mark.parametrize("head_dim", [64, 26])
@pytest.mark.parametrize("is_packed", [True, False])
def test_cudnn_against_the_map(head_dim, is_packed):
    """Against fp32; bfloat16 rounds at 2^-9, and here several times."""
    taps, visible = drawn(head_dim, is_packed=is_packed)
    exact = gradients(by_map, [x.astype(jnp.float32) for x in taps], visible)
    for name, want, got in zip(
        "oqkv", exact, gradients(cudnn_attention, taps, visible), strict=True
    ):
        error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        assert error < 2e-2, (name, error)  # NaN is not


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("on_mesh", [False, True], ids=["one", "eight"])
def test_splash_against_the_map(is_packed, on_mesh):
    """Sums of 128 products in fp32, in another order; heads of 26 as they are."""
    given = drawn(26, is_packed=is_packed, dtype=jnp.float32)
    exact = gradients(by_map, *given)
    mesh = make_mesh(MeshSection())
    assert mesh.size == 8
    with jax.set_mesh(mesh) if on_mesh else contextlib.nullcontext():
        if on_mesh:
            given = jax.device_put(given, sharding.batch_sharding(mesh))
        splash = sharding.over_batch(functools.partial(splash_attention, interpret=True))
        got = gradients(splash, *given)
    for name, want, theirs in zip("oqkv", exact, got, strict=True):
        np.testing.assert_allclose(theirs, want, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("backend", "change", "part"),
    [
        ("cudnn", dict(dtype=jnp.float32), "bfloat16, got float32"),
        ("cudnn", dict(head_dim=136), "at most 128 dims, got 136"),
        ("cudnn", dict(rate=0.1), "no dropout of attention, got a rate of 0.1"),
        ("splash", dict(seq=64), "a multiple of 128 tokens, got 64"),
        ("cudnn", {}, "an NVIDIA GPU"),
        ("splash", {}, "a TPU"),
    ],
)
def test_a_backend_says_what_it_needs(backend, change, part):
    if not change and missing_device(backend) is None:
        pytest.skip("here it can")
    dtype, seq = change.get("dtype", jnp.bfloat16), change.get("seq", SEQ)
    taps, visible = drawn(change.get("head_dim", 8), seq=seq, dtype=dtype)
    inputs = *taps, visible, change.get("rate", 0.0), jax.random.key(0)
    with pytest.raises(ValueError, match=f"{backend} expects .*{part}.*compute.attention=auto"):
        attend(*inputs, backend=backend)
    if missing_device("cudnn"):
        both = (attend(*inputs, backend=name) for name in ("auto", "xla"))
        jax.tree.map(np.testing.assert_array_equal, *both)


def test_a_run_that_asks_for_it_in_vain_is_refused(world):
    path = world.distil(compute={"attention": "cudnn"}, num_seeds=2)
    named = (
        "expected compute.dtype bfloat16, got float32",
        "expected one seed, got 2 in prediction",
        "expected rows of a multiple of 128 tokens, got [16] in intermediate",
        "set compute.attention=auto",
    )
    world.fails("run", path, naming=named)


@pytest.mark.skipif(missing_device("splash") is None, reason="here it can")
def test_a_run_on_a_machine_without_the_device_is_refused(world):
    stage = {"batching": "pack", "max_length": 128}
    sections = {"intermediate": stage, "prediction": stage, "compute": {"attention": "splash"}}
    world.fails("run", world.distil(**sections), naming=("expected a TPU, got cpu; run it there",))
