"""Layer-wise learning rates and decay towards the start, against torch's AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinybert_jax.training.optimizer import decay_mask, make_optimizer

torch = pytest.importorskip("torch")

RATE, DECAY, NUM_STEPS = 0.01, 0.1, 6


def _params(is_apart):
    """A classifier of three layers, as in a stage: with a projection beside it."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 4, 4)).astype(np.float32)
    layers = {"output": {"kernel": kernel, "bias": kernel[:, 0]}}
    if is_apart:
        layers = tuple(jax.tree.map(lambda leaf: leaf[i : i + 1], layers) for i in range(3))  # noqa: B023
    tables = {"word": {"embedding": rng.normal(size=(7, 4)).astype(np.float32)}}
    return {
        "student": {
            "encoder": {"embeddings": tables, "layers": layers},
            "classifier": {"kernel": rng.normal(size=(4, 2)).astype(np.float32)},
        },
        "projection": {"kernel": rng.normal(size=(4, 4)).astype(np.float32)},
    }


def _named(params):
    """(name, leaf [...], index of its layer or None) of every leaf, stacks split into layers."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys = [getattr(part, "key", getattr(part, "idx", None)) for part in path]
        if "layers" not in keys:
            yield "/".join(map(str, keys)), np.asarray(leaf), None
            continue
        place = keys[keys.index("layers") + 1]
        name = "/".join(str(key) for key in keys if not isinstance(key, int))
        for i, own in enumerate(np.asarray(leaf)):
            layer = place if isinstance(place, int) else i
            yield f"{name}/{layer}", own, layer


def _gradients(params):
    rng = np.random.default_rng(1)
    values = {}

    def draw(name, leaf):
        return values.setdefault(name, rng.normal(size=leaf.shape).astype(np.float32))

    for _ in range(NUM_STEPS):
        values.clear()
        names = sorted((name, leaf) for name, leaf, _ in _named(params))
        yield {name: draw(name, leaf) for name, leaf in names}


def _fill(params, by_name):
    """A tree like `params` with the leaves of `by_name`."""
    names = iter(list(_named(params)))
    leaves, structure = jax.tree.flatten(params)
    filled = []
    for leaf in leaves:
        parts = [next(names)]
        if parts[0][2] is not None:
            parts += [next(names) for _ in range(len(leaf) - 1)]
            filled.append(np.stack([by_name[name] for name, _, _ in parts]))
        else:
            filled.append(by_name[parts[0][0]])
    return jax.tree.unflatten(structure, filled)


def _train(params, **options):
    optimizer = make_optimizer(
        lambda step: RATE, weight_decay=DECAY, clip_norm=None, eps=1e-6, **options
    )
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    now = jax.tree.map(jnp.asarray, params)
    for gradients in _gradients(params):
        changes, state = update(_fill(params, gradients), state, now)
        now = jax.tree.map(jnp.add, now, changes)
    return {name: leaf for name, leaf, _ in _named(now)}


def _torch_train(params, rate_of, decay_of, after=lambda name, weight, start: None):
    start = {name: torch.tensor(leaf) for name, leaf, _ in _named(params)}
    weights = {name: torch.nn.Parameter(leaf.clone()) for name, leaf in start.items()}
    groups = [
        {"params": [weight], "lr": rate_of(name), "weight_decay": decay_of(name)}
        for name, weight in weights.items()
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-6)
    for gradients in _gradients(params):
        for name, weight in weights.items():
            weight.grad = torch.tensor(gradients[name])
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                after(name, weight, before[name] - start[name])
    return {name: weight.detach().numpy() for name, weight in weights.items()}


def _is_decayed(name):
    return "bias" not in name


@pytest.mark.parametrize("is_apart", [False, True])
def test_lower_layers_learn_at_lower_rates(is_apart):
    """The layers of three have 0.8, 0.8² and 0.8³ of the rate, the embeddings 0.8⁴."""
    params = _params(is_apart)

    def rate(name):
        if "embeddings" in name:
            return RATE * 0.8**4
        return RATE * 0.8 ** (3 - int(name[-1])) if "layers" in name else RATE

    expected = _torch_train(params, rate, lambda name: DECAY * _is_decayed(name))
    got = _train(params, layer_decay=0.8)
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(got[name], leaf, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("is_apart", [False, True])
def test_weights_decay_towards_their_start_and_a_new_head_to_zero(is_apart):
    params = _params(is_apart)

    def after(name, weight, moved):
        if _is_decayed(name) and name.startswith("student/encoder"):
            weight -= RATE * DECAY * moved

    expected = _torch_train(
        params,
        lambda name: RATE,
        lambda name: DECAY * (not name.startswith("student/encoder")),
        after,
    )
    got = _train(params, decays_to_start=True)
    plain = _train(params)
    for name, leaf in expected.items():
        np.testing.assert_allclose(got[name], leaf, rtol=1e-5, atol=2e-6, err_msg=name)
        if _is_decayed(name) and name.startswith("student/encoder"):
            assert np.abs(got[name] - plain[name]).max() > 1e-3
        else:
            np.testing.assert_array_equal(got[name], plain[name])


def test_off_they_change_neither_updates_nor_the_state():
    params, rng = _params(False), np.random.default_rng(2)
    plain = make_optimizer(lambda step: RATE, weight_decay=DECAY, clip_norm=None)
    before = optax.chain(
        optax.identity(),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-6),
        optax.add_decayed_weights(DECAY, mask=decay_mask),
        optax.scale_by_learning_rate(lambda step: RATE),
    )
    states = [plain.init(params), before.init(params)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    gradients = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
    one, other = (
        optimizer.update(gradients, state, params)[0]
        for optimizer, state in zip((plain, before), states, strict=True)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
