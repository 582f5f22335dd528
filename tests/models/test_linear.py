"""Linear maps with bfloat16 and int8 products, and their gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from tinybert_jax.models.heads import make_classifier, make_masked_lm
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.linear import (
    Form,
    affine,
    bfloat16_affine,
    dense,
    make_linear,
    merge_form,
    rounded_kernels,
    split_form,
)
from tinybert_jax.models.params import frozen_params
from tinybert_jax.settings.sizes import ModelConfig

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def _rounded(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def _bfloat16_gradients(platform):
    """The program of a bfloat16 map's gradients for a platform, before XLA splits it."""
    x, kernel, bias = jnp.ones((4, 5, 24), jnp.bfloat16), jnp.ones((24, 12)), jnp.ones(12)
    loss = lambda *operands: bfloat16_affine(Form(affine), *operands).sum()  # noqa: E731
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, kernel, bias)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_sum_the_gradients_of_bfloat16_maps_in_fp32(platform):
    """A sum over devices comes right after the product, so it has the dtype of the product."""
    assert re.search(r"dot_general.*-> tensor<24x12xf32>", _bfloat16_gradients(platform))
    assert re.search(r"dot_general.*-> tensor<..x..xbf16>", _bfloat16_gradients("cpu"))


def test_the_gradients_of_a_bfloat16_map_are_those_of_float64_to_its_digits(monkeypatch):
    """In both forms; the form of accelerators has no rounding but that of its operands."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (4, 5, 24), (24, 12), (12,), (4, 5, 12)
    x, kernel, bias, slope = map(jax.random.normal, keys, shapes)
    x = x.astype(jnp.bfloat16)

    def by_weights():
        def loss(kernel, bias):
            return jnp.sum(
                bfloat16_affine(Form(affine), x, kernel, bias) * slope.astype(jnp.bfloat16)
            )

        return jax.grad(loss, argnums=(0, 1))(kernel, bias)

    rounded = _rounded(slope).reshape(-1, 12)
    wanted = _rounded(x).reshape(-1, 24).T @ rounded, rounded.sum(0)
    for got, want in zip(by_weights(), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-2, atol=5e-2)
    take_default = lambda *operands, cpu, default: default(*operands)  # noqa: E731
    monkeypatch.setattr(jax.lax, "platform_dependent", take_default)
    for got, want in zip(by_weights(), wanted, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to_split", [True, False])
def test_heads_of_tpus_are_those_of_other_devices(monkeypatch, to_split):
    """Value and gradients of the einsum, with operands in fp32."""
    form = split_form(24, 4) if to_split else merge_form(4, 6)
    keys = jax.random.split(jax.random.key(0), 4)
    (inner, outer) = ((24,), (4, 6)) if to_split else ((4, 6), (24,))
    shapes = (2, 5, *inner), (24, 24), (24,), (2, 5, *outer)
    x, kernel, bias, slope = map(jax.random.normal, keys, shapes)
    results = []
    for platform in ("tpu", "default", "cpu"):
        take = lambda *operands, name=platform, **forms: (  # noqa: E731
            forms.get(name, forms["default"])(*operands)
        )
        monkeypatch.setattr(jax.lax, "platform_dependent", take)
        y, pull = jax.vjp(lambda *own: bfloat16_affine(form, *own), x, kernel, bias)
        results.append([y, *pull(slope)])
    for result in results[1:]:
        for got, want in zip(results[0], result, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-6)


def test_bfloat16_products_round_their_operands_and_nothing_else():
    """Forward and both gradients, against float64 sums over rounded operands."""
    linear = make_linear(
        24, 12, CONFIG, dtype=jnp.float32, product_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    linear.bias[...] = jnp.linspace(-1, 1, 12)  # not representable in bfloat16
    x = jax.random.normal(jax.random.key(1), (4, 5, 24))
    slope = jax.random.normal(jax.random.key(2), (4, 5, 12))
    graphdef, params = nnx.split(linear, nnx.Param)

    def loss(params, x):
        return jnp.sum(dense(nnx.merge(graphdef, params), x) * slope)

    y = dense(linear, x)
    by_params, by_x = jax.grad(loss, argnums=(0, 1))(params, x)
    kernel, bias = _rounded(linear.kernel[...]), np.asarray(linear.bias[...])
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, _rounded(x) @ kernel + bias, atol=1e-6)
    np.testing.assert_allclose(by_x, _rounded(slope) @ kernel.T, atol=1e-6)
    expected = np.einsum("btd,btf->df", _rounded(x), _rounded(slope))
    np.testing.assert_allclose(by_params["kernel"][...], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_params["bias"][...], slope.sum((0, 1)), rtol=1e-5, atol=1e-5)
    exact = np.asarray(x) @ np.asarray(linear.kernel[...]) + bias
    assert np.abs(y - exact).max() > 1e-4


def test_both_gradients_of_bfloat16_products_are_bfloat16_products():
    """On CPUs with bfloat16 products; XLA:CPU had run the gradient of the kernel in fp32."""
    linear = make_linear(
        384, 256, CONFIG, dtype=jnp.float32, product_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    graphdef, params = nnx.split(linear, nnx.Param)
    x, slope = jnp.ones((4, 64, 384)), jnp.ones((4, 64, 256))

    def num_products(function) -> int:
        """Number of products with bfloat16 operands in the compiled program."""
        text = jax.jit(function).lower(params, x).compile().as_text()
        rounded = set(re.findall(r"%([\w.]+) = bf16\[", text))
        products = re.findall(r" dot\(%([\w.]+), %([\w.]+)\)", text)
        return sum(set(operands) <= rounded for operands in products)

    def forward(params, x):
        return dense(nnx.merge(graphdef, params), x)

    if not num_products(forward):
        pytest.skip("no bfloat16 products on this CPU")
    assert num_products(lambda *inputs: jax.vjp(forward, *inputs)[1](slope)) == 2


@pytest.mark.parametrize("unroll", [False, True])
def test_a_classifier_with_bfloat16_products_is_close_to_fp32(unroll):
    ids = jax.random.randint(jax.random.key(0), (3, 8), 5, 50)
    inputs = Text(ids, jnp.zeros_like(ids)), jnp.ones(ids.shape, bool)
    exact, init = make_classifier(CONFIG, 3, unroll=unroll)
    rounded, _ = make_classifier(CONFIG, 3, unroll=unroll, product_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda leaf: 5 * leaf, init(jax.random.key(1)))
    outputs = [
        jax.jit(functools.partial(apply, taps=True))(params, *inputs) for apply in (exact, rounded)
    ]
    errors = [
        float(np.abs(np.subtract(*(getattr(output.encoder, name) for output in outputs))).max())
        for name in ("hidden", "queries", "values")
    ]
    assert all(0 < error < 0.05 for error in errors), errors
    assert outputs[1].logits.dtype == outputs[1].encoder.hidden[-1].dtype == jnp.float32


def test_a_masked_lm_with_bfloat16_products_decodes_rounded_states():
    """The products of the head round their operands too: the transform and the word table."""
    ids = jax.random.randint(jax.random.key(0), (3, 8), 5, 50)
    inputs = Text(ids, jnp.zeros_like(ids)), jnp.ones(ids.shape, bool)
    exact, init = make_masked_lm(CONFIG)
    rounded, _ = make_masked_lm(CONFIG, product_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda leaf: 5 * leaf, init(jax.random.key(1)))
    outputs = [jax.jit(apply)(params, *inputs) for apply in (exact, rounded)]
    assert outputs[1].hidden.dtype == jnp.bfloat16
    assert outputs[1].logits.dtype == outputs[0].logits.dtype == jnp.float32
    table = _rounded(outputs[1].table)
    expected = np.asarray(outputs[1].hidden, np.float64) @ table.T + np.asarray(outputs[1].bias)
    np.testing.assert_allclose(outputs[1].logits, expected, atol=1e-5)
    error = float(jnp.abs(outputs[0].logits - outputs[1].logits).max())
    assert 0 < error < 0.05, error


@pytest.mark.parametrize(
    "make", [functools.partial(make_classifier, num_classes=2), make_masked_lm]
)
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": jnp.float32},
        {"dtype": jnp.bfloat16},
        {"dtype": jnp.float32, "product_dtype": jnp.bfloat16},
    ],
)
def test_kernels_rounded_once_give_the_same_bits(options, make):
    apply, init = make(CONFIG, **options)
    params = init(jax.random.key(0))
    rounded = rounded_kernels(params, **options)
    ids = jax.random.randint(jax.random.key(1), (3, 8), 1, 50)
    inputs = Text(ids, jnp.zeros_like(ids)), jnp.ones_like(ids, bool)
    forward = jax.jit(lambda params: apply(params, *inputs))
    jax.tree.map(np.testing.assert_array_equal, forward(rounded), forward(params))


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-8)])
def test_the_gradient_of_a_bias_is_the_sum_over_tokens(dtype, error):
    """In bfloat16 the sum is fp32 and rounded once."""
    linear = make_linear(8, 12, CONFIG, dtype=dtype, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, slope = (jnp.asarray(rng.uniform(size=(3, 500, n)), dtype) for n in (8, 12))
    loss = nnx.grad(lambda linear: jnp.sum(dense(linear, x) * slope))
    expected = np.asarray(slope, np.float64).sum((0, 1))
    np.testing.assert_allclose(loss(linear).bias[...], expected, rtol=error)


def test_int8_products_have_a_scale_per_token_and_per_column():
    """Against float64 sums of rounded operands; a zero token or column stays zero."""
    x = jax.random.normal(jax.random.key(1), (4, 5, 24)) * jnp.arange(5)[None, :, None]
    kernel = jax.random.normal(jax.random.key(2), (24, 12)) * jnp.arange(12)[None]
    bias = jnp.linspace(-1, 1, 12)
    params = {"layers": {"query": {"kernel": kernel, "bias": bias}}}
    params = rounded_kernels(params, dtype=jnp.float32, product_dtype=jnp.int8)
    linear = make_linear(
        24, 12, CONFIG, dtype=jnp.float32, product_dtype=jnp.int8, rngs=nnx.Rngs(0)
    )
    nnx.update(linear, params["layers"]["query"])

    def rounded(array, axis):
        scale = np.abs(array).max(axis, keepdims=True) / np.float32(127)
        scale = np.where(scale == 0, 1, scale)
        return np.round(array / scale).astype(np.float64) * scale

    assert linear.kernel[...].dtype == jnp.int8
    y = dense(linear, x)
    expected = rounded(np.asarray(x), -1) @ rounded(np.asarray(kernel), 0) + np.asarray(bias)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias)
    assert 1e-3 < np.abs(y - exact).max() / np.abs(exact).max() < 2e-2
    np.testing.assert_array_equal(y[:, 0], jnp.tile(bias, (4, 1)))
    np.testing.assert_array_equal(y[..., 0], jnp.full((4, 5), bias[0]))


@pytest.mark.parametrize("unroll", [False, True])
def test_an_int8_masked_lm_is_close_to_fp32(unroll):
    """Both start from the same parameters; the products of the head stay fp32."""
    ids = jax.random.randint(jax.random.key(0), (3, 8), 5, 50)
    inputs = Text(ids, jnp.zeros_like(ids)), jnp.ones(ids.shape, bool)
    exact, init = make_masked_lm(CONFIG)
    apply, same_init = make_masked_lm(CONFIG, unroll=unroll, product_dtype=jnp.int8)
    params = init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, same_init(jax.random.key(1)), params)
    params = jax.tree.map(lambda leaf: 5 * leaf, params)
    frozen = frozen_params(params, dtype=jnp.float32, product_dtype=jnp.int8, unroll=unroll)
    expected = jax.jit(exact)(params, *inputs).logits
    got = jax.jit(apply)(frozen, *inputs).logits
    error = float(jnp.linalg.norm(expected - got) / jnp.linalg.norm(expected))
    assert 1e-4 < error < 0.05, error


def test_float8_products_round_both_operands_to_three_bits():
    """Against sums of operands that are rounded here, digit by digit."""
    x = jax.random.normal(jax.random.key(1), (4, 5, 24)) * 10.0 ** jnp.arange(-2, 3)[None, :, None]
    kernel = jax.random.normal(jax.random.key(2), (2, 24, 12)) * jnp.array([0.02, 3])[:, None, None]
    bias = jnp.tile(jnp.linspace(-1, 1, 12)[None], (2, 1))
    params = {"layers": {"query": {"kernel": np.asarray(kernel), "bias": np.asarray(bias)}}}
    params = rounded_kernels(params, dtype=jnp.bfloat16, product_dtype=jnp.float8_e4m3fn)
    stacked = params["layers"]["query"]
    assert stacked["kernel"].dtype == jnp.float8_e4m3fn

    def rounded(array, scale):
        """Three bits after the leading one, from 2^-6 on; even numbers where it is halfway."""
        array = np.clip(np.asarray(array, np.float64) / scale, -448, 448)
        unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(array), 2.0**-6))) - 3)
        return np.round(array / unit) * unit * scale

    in_bfloat16 = x.astype(jnp.bfloat16)
    for layer in range(2):
        options = {"dtype": jnp.bfloat16, "product_dtype": jnp.float8_e4m3fn}
        linear = make_linear(24, 12, CONFIG, **options, rngs=nnx.Rngs(0))
        nnx.update(linear, jax.tree.map(lambda leaf, own=layer: jnp.asarray(leaf[own]), stacked))
        scale = 2.0 ** np.ceil(np.log2(np.abs(kernel[layer]).max() / 448))
        own = rounded(kernel[layer], scale), np.asarray(bias[layer])
        expected = rounded(in_bfloat16, 0.25) @ own[0] + own[1]
        y = np.asarray(jax.jit(dense)(linear, in_bfloat16), np.float64)
        np.testing.assert_allclose(
            y, expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max(-1).min()
        )
        exact = np.asarray(x[:, :4], np.float64) @ np.asarray(kernel[layer], np.float64) + own[1]
        assert 5e-3 < np.linalg.norm(y[:, :4] - exact) / np.linalg.norm(exact) < 5e-2


def test_a_float8_input_that_is_not_finite_stays_visible():
    options = {"dtype": jnp.bfloat16, "product_dtype": jnp.float8_e4m3fn}
    linear = make_linear(3, 2, CONFIG, **options, rngs=nnx.Rngs(0))
    x = jnp.array(
        [[[1, jnp.inf, 0], [-jnp.inf, 0, 0], [jnp.nan, 0, 0], [5000, 0, 0]]], jnp.bfloat16
    )
    y = dense(linear, x)  # the kernel is zero
    assert jnp.isnan(y[:, :3]).all() and (y[:, 3] == 0).all()


@pytest.mark.parametrize("unroll", [False, True])
def test_a_float8_masked_lm_is_close_to_bfloat16(unroll):
    ids = jax.random.randint(jax.random.key(0), (3, 8), 5, 50)
    inputs = Text(ids, jnp.zeros_like(ids)), jnp.ones(ids.shape, bool)
    exact, init = make_masked_lm(CONFIG, dtype=jnp.bfloat16)
    options = {"dtype": jnp.bfloat16, "product_dtype": jnp.float8_e4m3fn, "unroll": unroll}
    apply, _ = make_masked_lm(CONFIG, **options)
    params = jax.tree.map(lambda leaf: np.asarray(5 * leaf), init(jax.random.key(1)))
    frozen = frozen_params(params, **options)
    expected = jax.jit(exact)(params, *inputs).logits
    got = jax.jit(apply)(frozen, *inputs).logits
    error = float(jnp.linalg.norm(expected - got) / jnp.linalg.norm(expected))
    assert 1e-4 < error < 0.1, error
