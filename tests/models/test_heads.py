"""The last layer runs where a head reads it, and gives what the whole one has there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.compute import MeshSection
from tinybert_jax.config.distillation import DistillSection
from tinybert_jax.models.encoder import Encoder
from tinybert_jax.models.heads import (
    is_few,
    make_classifier,
    make_encoder,
    make_masked_lm,
    make_token_classifier,
)
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.params import frozen_params, restack_layers, unstack_layers
from tinybert_jax.objectives.alignment import init_projection
from tinybert_jax.objectives.distillation import Role, make_distill
from tinybert_jax.objectives.objective import count_units
from tinybert_jax.parallel.mesh import make_mesh
from tinybert_jax.parallel.sharding import param_specs, place_params
from tinybert_jax.performance import flops
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.terms.table import reads_of

ROWS, WIDTH = 5, 16
TOKENS = ROWS * WIDTH
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
        output = apply(params, Text(IDS, IDS % 2), MASKS[mask], taps=taps, **reads)
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
    _, scanned = _model(head, mask, sizes)
    for ours, whole in zip(outputs(params, False), scanned(params, True), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)
    ours, whole = _slope(outputs)(params, False), _slope(scanned)(params, True)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest), ours, whole
    )


@pytest.mark.parametrize(
    ("head", "mask", "num_last_layer_tokens"),
    [
        ("classifier", "padded", 1),
        ("classifier", "packed", 4),
        ("masked_lm", "padded", 4),
        ("pairs", "padded", 5),
    ],
)
def test_the_last_layer_multiplies_no_more_than_is_read(head, mask, num_last_layer_tokens):
    params, outputs = _model(head, mask)
    made = _product_flops(jax.make_jaxpr(lambda params: outputs(params, False))(params).jaxpr)
    d = SIZES.hidden_size
    expected = TOKENS * flops.forward_flops_per_token(
        SIZES, WIDTH, num_last_layer_tokens=num_last_layer_tokens
    )
    if head == "classifier":
        expected += 2 * ROWS * num_last_layer_tokens * d * (d + 3)
    else:
        expected += flops.masked_lm_flops(SIZES, ROWS * 4, ROWS * 4)
    if head == "pairs":
        expected += 2 * ROWS * d * (d + 2)
    assert made == pytest.approx(expected, rel=1e-12)
    whole = TOKENS * flops.forward_flops_per_token(SIZES, WIDTH)
    assert expected < 0.9 * whole


def _product_flops(jaxpr) -> int:
    return sum(
        2 * times * _contracted(equation) * int(np.prod(equation.outvars[0].aval.shape))
        for equation, times in _products(jaxpr)
    )


def _contracted(product) -> int:
    (dims, _), _ = product.params["dimension_numbers"]
    return int(np.prod([product.invars[0].aval.shape[dim] for dim in dims]))


def _products(jaxpr):
    """(equation, how often it runs) of every matrix product."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation, 1
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            yield from ((product, times * n) for product, n in _products(inner))


@pytest.mark.parametrize(
    ("stage", "terms", "is_whole"),
    [
        ("prediction", ["logits", "label"], False),
        ("prediction", ["logits", "hidden"], True),
        ("general", ["masked_lm", {"term": "word_logits", "at": "masked"}], False),
        ("general", [{"term": "word_logits", "at": "real"}], True),
        ("general", ["masked_lm", {"term": "word_logits", "at": "masked"}, "cosine"], True),
    ],
)
def test_distillation_runs_the_last_layer_where_terms_read_it(stage, terms, is_whole):
    """Of teacher and student, forward and backward: products of all tokens into the inner width."""
    terms = [{"term": term} if isinstance(term, str) else term for term in terms]
    terms = DistillSection.model_validate({stage: terms}).terms(stage)
    teacher_sizes = SIZES.model_copy(update={"intermediate_size": 56, "num_hidden_layers": 6})
    make = make_masked_lm if stage == "general" else lambda sizes: make_classifier(sizes, 3)
    (student, init), (teacher, teacher_init) = make(SIZES), make(teacher_sizes)
    roles = Role(student, reads_of(terms), 3), Role(teacher, reads_of(terms, of_teacher=True), 6)
    objective = make_distill(*roles, terms)
    masked = {"positions": POSITIONS, "tokens": POSITIONS, "pair_labels": jnp.full(ROWS, -1)}
    batch = Batch(
        Text(IDS, 0 * IDS),
        MASKS["padded"],
        masked if stage == "general" else {"labels": jnp.zeros(ROWS, jnp.int32)},
        weights=jnp.ones(ROWS),
    )
    key = jax.random.key(0)
    frozen, params = teacher_init(key), {"student": init(key)}
    if reads_of(terms).projection:
        params["projection"] = init_projection(key, 32, 32, 1)

    def value(params):
        goal = objective.targets(batch, frozen)
        return objective.loss(params, batch, count_units(batch), key, goal)[0]

    program = jax.make_jaxpr(jax.grad(value))(params).jaxpr
    inner = {"student": SIZES.intermediate_size, "teacher": teacher_sizes.intermediate_size}
    found = {
        name: sum(n for e, n in _products(program) if e.outvars[0].aval.shape == (TOKENS, width))
        for name, width in inner.items()
    }
    left_out = 0 if is_whole else 1
    assert found == {"student": 2 * (3 - left_out), "teacher": 6 - left_out}


def test_equal_sizes_and_options_give_one_model():
    """So that its structure is traced, and its start compiled, once."""
    first = make_classifier(SIZES, 3, unroll=True)
    equal = ModelConfig(**SIZES.model_dump())
    assert make_classifier(equal, 3, unroll=True) is first
    wider = SIZES.model_copy(update={"intermediate_size": 8})
    for other in (
        make_classifier(SIZES, 2, unroll=True),
        make_classifier(SIZES, 3),
        make_classifier(wider, 3, unroll=True),
        make_token_classifier(SIZES, 3, unroll=True),
    ):
        assert other is not first
    structures = [
        jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(model.init, jax.random.key(0)))
        for model in (first, make_classifier(wider, 3, unroll=True))
    ]
    assert structures[0] != structures[1]


def test_dropout_is_that_of_a_whole_last_layer():
    """In rows of one token, where both have masks of one shape; and rate 0 is no key."""
    encoder = Encoder(SIZES, rngs=nnx.Rngs(0))
    ids = jnp.arange(5, 55)[:, None]
    inputs = Text(ids, 0 * ids), ids > 0
    for key in (jax.random.key(3), jax.random.key(4)):
        whole = encoder(*inputs, key).hidden[-1]
        np.testing.assert_allclose(encoder.last_hidden(_first, *inputs, key), whole, atol=1e-5)
        assert jnp.abs(whole - encoder.last_hidden(_first, *inputs)).max() > 0.1
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    dry = Encoder(SIZES.model_copy(update=rates), rngs=nnx.Rngs(0))
    inputs = Text(IDS, 0 * IDS), MASKS["packed"]
    np.testing.assert_allclose(
        dry.last_hidden(_first, *inputs, jax.random.key(3)),
        dry.last_hidden(_first, *inputs),
        atol=1e-5,
    )


def _first(x):
    return x[:, :1]


def test_a_single_forward_pass_copies_no_weights():
    """Rolled, as a model is by default: a part of the stack of layers would be a copy of it."""
    wide = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
    sizes = SIZES.model_copy(update=wide)
    apply, init = make_classifier(sizes, 3)
    params = init(jax.random.key(0))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params["encoder"]["layers"]))
    forward = jax.jit(lambda params: apply(params, Text(IDS, 0 * IDS), MASKS["padded"]).logits)
    memory = forward.lower(params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < num_bytes / 2  # a layer at a time


def test_an_unrolled_model_that_is_not_trained_reads_its_layers_where_they_are():
    wide = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
    apply, init = make_classifier(SIZES.model_copy(update=wide), 3, unroll=True)
    params = init(jax.random.key(0))
    apart = frozen_params(params, dtype=jnp.float32, unroll=True)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params["encoder"]["layers"]))
    outputs, sizes = [], []
    for read in (params, apart):
        forward = jax.jit(lambda read: apply(read, Text(IDS, 0 * IDS), MASKS["padded"], taps=True))
        program = forward.lower(read).compile()
        sizes.append(program.memory_analysis().temp_size_in_bytes)
        outputs.append(forward(read))
    jax.tree.map(np.testing.assert_array_equal, *outputs)
    assert sizes[1] < sizes[0] - num_bytes / 2  # their copies are not all there at one time


def test_an_unrolled_model_that_is_trained_with_its_layers_apart_copies_none():
    wide = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
    apply, init = make_classifier(SIZES.model_copy(update=wide), 3, unroll=True)
    params = init(jax.random.key(0))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params["encoder"]["layers"]))
    jax.tree.map(np.testing.assert_array_equal, restack_layers(unstack_layers(params)), params)

    def step(params):  # as a train step: the gradients go straight into new parameters
        def loss(params):
            return jnp.square(apply(params, Text(IDS, 0 * IDS), MASKS["padded"]).logits).sum()

        return jax.tree.map(lambda old, slope: old - 0.1 * slope, params, jax.grad(loss)(params))

    sizes = [
        jax.jit(step, donate_argnums=0).lower(own).compile().memory_analysis().temp_size_in_bytes
        for own in (params, unstack_layers(params))
    ]
    assert sizes[1] < sizes[0] - num_bytes / 2  # neither copies of layers nor a stacked gradient


def test_layers_apart_are_split_over_devices_as_their_stack():
    _, init = make_classifier(SIZES, 3)
    params = init(jax.random.key(0))
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    apart = frozen_params(params, dtype=jnp.float32, unroll=True)
    stacked, layers = (param_specs(own, mesh)["encoder"]["layers"] for own in (params, apart))
    assert len(layers) == 3 and all(layer == stacked for layer in layers)


def test_unrolled_equals_scanned_in_the_gradient_of_every_tap():
    scanned, init = make_encoder(SIZES)
    params = init(jax.random.key(0))

    def slope(apply):
        def total(params):
            output = apply(params, Text(IDS, IDS % 2), MASKS["padded"], jax.random.key(3))
            taps = output.hidden, output.queries, output.keys, output.values
            return sum(jnp.sin(jnp.stack(list(tap))).sum() for tap in taps)

        return jax.jit(jax.grad(total))(params)

    ours, theirs = slope(make_encoder(SIZES, unroll=True)[0]), slope(scanned)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest), ours, theirs
    )


def test_int8_layers_give_the_same_on_eight_devices():
    apply, init = make_classifier(SIZES, 3, unroll=True, product_dtype=jnp.int8)
    params = frozen_params(
        init(jax.random.key(0)), dtype=jnp.float32, product_dtype=jnp.int8, unroll=True
    )
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    specs = param_specs(params, mesh)["encoder"]["layers"][0]["attention"]["query"]
    assert specs["scale"] == specs["bias"]
    forward = jax.jit(lambda params: apply(params, Text(IDS, 0 * IDS), MASKS["padded"]).logits)
    one, eight = forward(params), forward(place_params(params, mesh))
    np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-6)


def test_heads_that_read_much_have_a_whole_last_layer():
    assert is_few(1, 2) and is_few(8, 16)
    assert not is_few(1, 1) and not is_few(9, 16)
