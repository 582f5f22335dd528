"""The last layer runs where a head reads it, and gives what the whole one has there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tinybert_jax import cost
from tinybert_jax.model.heads import make_classifier, make_masked_lm
from tinybert_jax.sections import ModelConfig

ROWS, WIDTH = 5, 16
SIZES = ModelConfig(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=WIDTH,
)
IDS = jax.random.randint(jax.random.key(0), (ROWS, WIDTH), 5, 60)
LENGTHS = np.asarray([16, 3, 9, 5, 12])
MASKS = {
    "padded": jnp.asarray(np.arange(WIDTH) < LENGTHS[:, None]),
    "packed": jnp.asarray(
        [
            [1] * 3 + [2] * 5 + [3] * 8,
            [1] * 10 + [0] * 6,
            [1] * 2 + [2] * 2 + [3] * 2 + [4] * 2 + [0] * 8,
            [1] * 16,
            [1] * 7 + [2] * 8 + [0],
        ]
    ),
}
POSITIONS = jax.random.randint(jax.random.key(1), (ROWS, 4), 0, WIDTH)


def _model(head, mask, sizes=SIZES, **options):
    """(params, a function (params, taps) -> outputs)."""
    if head == "classifier":
        apply, init = make_classifier(sizes, 3, **options)
        reads = {"num_segments": 4 if mask == "packed" else None}
    else:
        apply, init = make_masked_lm(sizes, pair_head=head == "pairs", **options)
        reads = {"positions": POSITIONS}
    params = jax.tree.map(lambda leaf: 3 * leaf, init(jax.random.key(2)))

    def outputs(params, taps):
        output = apply(params, IDS, MASKS[mask], IDS % 2, taps=taps, **reads)
        assert (output.encoder is not None) == taps
        return [output.logits, *([output.pair_logits] if head == "pairs" else [])]

    return params, outputs


def _slope(outputs):
    return jax.grad(lambda *inputs: sum(jnp.sin(output).sum() for output in outputs(*inputs)))


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head", ["classifier", "masked_lm", "pairs"])
def test_outputs_and_gradients_are_those_of_a_whole_last_layer(head, mask, unroll, num_layers):
    sizes = SIZES.model_copy(update={"num_hidden_layers": num_layers})
    params, outputs = _model(head, mask, sizes, unroll=unroll)
    for ours, whole in zip(outputs(params, False), outputs(params, True), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)
    ours, whole = (_slope(outputs)(params, taps) for taps in (False, True))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest), ours, whole
    )


@pytest.mark.parametrize(
    ("head", "mask", "num_read"),
    [
        ("classifier", "padded", 1),
        ("classifier", "packed", 4),
        ("masked_lm", "padded", 4),
        ("pairs", "padded", 5),
    ],
)
def test_the_last_layer_multiplies_no_more_than_is_read(head, mask, num_read):
    params, outputs = _model(head, mask)
    made = _product_flops(jax.make_jaxpr(lambda params: outputs(params, False))(params).jaxpr)
    d, tokens = SIZES.hidden_size, ROWS * WIDTH
    expected = tokens * cost.forward_flops_per_token(SIZES, WIDTH, num_read=num_read)
    if head == "classifier":
        expected += 2 * ROWS * num_read * d * (d + 3)
    else:
        expected += cost.masked_lm_flops(SIZES, ROWS * 4, ROWS * 4)
    if head == "pairs":
        expected += 2 * ROWS * d * (d + 2)
    assert made == pytest.approx(expected, rel=1e-12)
    whole = tokens * cost.forward_flops_per_token(SIZES, WIDTH)
    assert expected < 0.9 * whole


def _product_flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            contracted = np.prod([equation.invars[0].aval.shape[dim] for dim in left])
            total += int(2 * contracted * np.prod(equation.outvars[0].aval.shape))
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += times * _product_flops(inner)
    return total
