"""Schedules against those of Hugging Face and torch, the optimizer against torch's AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinybert_jax.training.optimizer import SCHEDULES, decay_mask, make_optimizer, make_schedule

torch = pytest.importorskip("torch")

LEARNING_RATE, NUM_STEPS = 3e-4, 40


def test_clipping_changes_only_gradients_above_the_norm():
    """Adam hides a common factor of all gradients, but not one that differs between steps."""
    params = {"kernel": jnp.array([[1.0, -2.0]])}
    gradients = [jnp.array([[0.3, 0.1]]), jnp.array([[0.02, 0.6]]), jnp.array([[3.0, 4.0]])]
    clipped = [*gradients[:2], gradients[2] / 5]

    def updates(gradients, clip_norm):
        optimizer = make_optimizer(lambda step: 0.1, clip_norm=clip_norm)
        state, found = optimizer.init(params), []
        for gradient in gradients:
            update, state = optimizer.update({"kernel": gradient}, state, params)
            found.append(update["kernel"])
        return found

    np.testing.assert_allclose(updates(gradients, 1.0), updates(clipped, None), rtol=1e-6)
    assert not np.allclose(updates(gradients, 1.0)[2], updates(gradients, None)[2], rtol=1e-3)


@pytest.mark.parametrize("warmup_steps", [0, 7])
@pytest.mark.parametrize(
    "name, options, hf_name, hf_options",
    [
        ("linear", {}, "linear", {}),
        ("cosine", {}, "cosine", {}),
        ("cosine", {"end_factor": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("constant", {}, "constant_with_warmup", {}),
        ("inverse_sqrt", {}, "inverse_sqrt", {}),
        (
            "polynomial",
            {"end_factor": 0.1, "power": 2.0},
            "polynomial",
            {"lr_end": 0.1 * LEARNING_RATE, "power": 2.0},
        ),
        (
            "warmup_stable_decay",
            {"decay_steps": 9},
            "warmup_stable_decay",
            {"num_decay_steps": 9, "decay_type": "linear"},
        ),
        (
            "warmup_stable_decay",
            {"decay_steps": 33},
            "warmup_stable_decay",
            {"num_decay_steps": 33, "decay_type": "linear"},
        ),
    ],
)
def test_schedule_matches_hugging_face(name, options, hf_name, hf_options, warmup_steps):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LEARNING_RATE)
    scheduler = transformers.get_scheduler(
        hf_name, optimizer, warmup_steps, NUM_STEPS, scheduler_specific_kwargs=hf_options or None
    )
    num_rates = NUM_STEPS + 1  # past the end, the cosine of Hugging Face rises again
    expected = []
    for _ in range(num_rates):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()

    got = rates(make(name, warmup_steps=warmup_steps, **options), num_rates)

    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=LEARNING_RATE * 1e-6)


def test_linear_to_a_floor_matches_torch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, NUM_STEPS)
    expected = []
    for _ in range(NUM_STEPS + 3):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()

    got = rates(make("linear", warmup_steps=0, end_factor=0.25), NUM_STEPS + 3)

    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_warmup_stable_decay_to_a_floor():
    schedule = make("warmup_stable_decay", warmup_steps=4, decay_steps=10, end_factor=0.2)

    factors = rates(schedule, NUM_STEPS + 3) / LEARNING_RATE

    np.testing.assert_allclose(factors[:5], [0, 0.25, 0.5, 0.75, 1], rtol=1e-6)
    np.testing.assert_allclose(factors[4:31], 1, rtol=1e-6)
    np.testing.assert_allclose(factors[30:41], 1 - 0.08 * np.arange(11), rtol=1e-6)
    np.testing.assert_allclose(factors[40:], 0.2, rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "warmup_stable_decay"])
def test_the_last_rate_stays_past_num_steps(name):
    schedule = make(name, warmup_steps=5, decay_steps=10, end_factor=0.1)

    for step in (NUM_STEPS, NUM_STEPS + 1, 2 * NUM_STEPS):
        np.testing.assert_allclose(schedule(step), 0.1 * LEARNING_RATE, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_traced_step_gives_the_same_rate(name):
    schedule = make(name, warmup_steps=5, decay_steps=10)

    traced = jax.jit(jax.vmap(schedule))(jnp.arange(NUM_STEPS))

    np.testing.assert_allclose(traced, rates(schedule, NUM_STEPS), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "constant", "inverse_sqrt"])
def test_warmup_may_take_the_whole_run(name):
    got = rates(make(name, warmup_steps=NUM_STEPS), NUM_STEPS)

    np.testing.assert_allclose(got, LEARNING_RATE * np.arange(NUM_STEPS) / NUM_STEPS, rtol=1e-6)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("linaer", {}, "expected one of constant, cosine, .* got 'linaer'"),
        ("linear", {"warmup_steps": 41}, "warmup_steps: expected .* = 0..40, got 41"),
        ("linear", {"warmup_steps": -1}, "warmup_steps: expected"),
        ("linear", {"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ("linear", {"end_factor": 3e1}, "end_factor: expected a share"),
        ("constant", {"end_factor": 0.1}, "end_factor: expected 0 for constant"),
        ("cosine", {"power": 2.0}, "power: expected 1 for cosine, got 2.0"),
        (
            "warmup_stable_decay",
            {},
            "decay_steps: expected .* = 1..40 for warmup_stable_decay, got 0",
        ),
        (
            "warmup_stable_decay",
            {"decay_steps": 35, "warmup_steps": 10},
            "decay_steps: expected .* = 1..30",
        ),
    ],
)
def test_wrong_arguments_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **({"warmup_steps": 0} | options))


def test_decay_mask_goes_by_leaf_name():
    params = {
        "embeddings": {"word": {"embedding": 0}, "norm": {"scale": 0, "bias": 0}},
        "layers": {"query": {"kernel": 0, "bias": 0}},
    }

    assert decay_mask(params) == {
        "embeddings": {"word": {"embedding": True}, "norm": {"scale": False, "bias": False}},
        "layers": {"query": {"kernel": True, "bias": False}},
    }
    with pytest.raises(ValueError, match="got 'layers/query/gamma'"):
        decay_mask({"layers": {"query": {"gamma": 0}}})


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_optimizer_matches_torch_adamw(num_steps, clip_norm):
    """Gradients of norm 4 to 7, so that clipping changes them; the rate rises and falls.

    The tolerance of 1e-6 is 1e-4 of an update: optax rounds 1 - b2 = 1e-3 in fp32, torch uses
    fp64, which alone makes a difference of 3e-5.
    """
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,), "scale": (4,), "embedding": (5, 3)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    grads = [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(num_steps)
    ]
    peak, warmup_steps = 0.01, 3
    schedule = make_schedule("linear", learning_rate=peak, num_steps=8, warmup_steps=warmup_steps)
    optimizer = make_optimizer(
        lambda step: schedule(step + 1), weight_decay=0.1, clip_norm=clip_norm
    )

    got = run_optax(optimizer, params, grads)
    expected = run_torch(params, grads, peak, warmup_steps, clip_norm)

    for name in shapes:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-6, atol=1e-6)
        assert np.abs(got[name] - params[name]).max() > 3e-3


def run_optax(optimizer, params, grads):
    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {"layer": jax.tree.map(jnp.array, params)}
    state = optimizer.init(params)
    for grad in grads:
        params, state = step(params, state, {"layer": grad})
    return params["layer"]


def run_torch(params, grads, peak, warmup_steps, clip_norm):
    tensors = {name: torch.tensor(x, requires_grad=True) for name, x in params.items()}
    groups = [
        {"params": [tensors["kernel"], tensors["embedding"]], "weight_decay": 0.1},
        {"params": [tensors["bias"], tensors["scale"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999), eps=1e-6)
    for step, grad in enumerate(grads, start=1):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(step / warmup_steps, (8 - step) / (8 - warmup_steps))
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(grad[name])
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip_norm)
        optimizer.step()
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def rates(schedule, num_steps):
    return np.array([float(schedule(step)) for step in range(num_steps)])


def make(name, *, num_steps=NUM_STEPS, **options):
    return make_schedule(name, learning_rate=LEARNING_RATE, num_steps=num_steps, **options)
