"""Learning-rate schedules and the optimizer.

This module owns the shapes of the schedules, weight decay by parameter, and the order of the optax
chain. It does not own the train state, gradient accumulation or which steps are skipped.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import PyTree

from tinybert_jax.config.stages import StageSection

SCHEDULES = (
    "constant",
    "cosine",
    "inverse_sqrt",
    "linear",
    "polynomial",
    "warmup_stable_decay",
)

# Name of a leaf -> whether weight decay applies: to weights, not to biases and LayerNorm scales.
DECAYS = {"kernel": True, "embedding": True, "bias": False, "scale": False}


def schedule_of(section: StageSection, num_steps: int) -> optax.Schedule:
    """`make_schedule` by the settings of a stage."""
    return make_schedule(
        section.schedule,
        learning_rate=section.learning_rate,
        num_steps=num_steps,
        warmup_steps=round(section.warmup * num_steps),
        end_factor=section.end_factor,
        decay_steps=round(section.decay * num_steps),
        power=section.power,
    )


def make_schedule(
    name: str,
    *,
    learning_rate: float,
    num_steps: int,
    warmup_steps: int,
    end_factor: float = 0.0,
    decay_steps: int = 0,
    power: float = 1.0,
) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then the named shape; step -> learning rate.

    Step s (from 0) has `learning_rate`·s/`warmup_steps` during warm-up, the Hugging Face and torch
    convention: with warm-up the first update has rate 0, and step `warmup_steps` is the peak.
    linear, cosine and polynomial (of `power`) fall to `end_factor`·`learning_rate` at `num_steps`;
    warmup_stable_decay stays at the peak and falls linearly over the last `decay_steps`;
    inverse_sqrt is learning_rate·√(w/s) with w = `warmup_steps`, or without warm-up
    learning_rate·√(w/(s + w)) with w = 10000; constant stays at `learning_rate`. Shapes that fall
    keep the last rate past `num_steps`. Raises ValueError for an unknown name, a step count out of
    range, and an `end_factor` or `power` that the named shape would ignore. Only
    warmup_stable_decay reads `decay_steps`.
    """
    _check_schedule(name, num_steps, warmup_steps, end_factor, decay_steps, power)
    end = end_factor * learning_rate
    num_after = max(num_steps - warmup_steps, 1)
    schedules = [optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))]
    boundaries = [warmup_steps]
    if name == "linear":
        schedules += [optax.linear_schedule(learning_rate, end, num_after)]
    elif name == "cosine":
        schedules += [optax.cosine_decay_schedule(learning_rate, num_after, alpha=end_factor)]
    elif name == "polynomial":
        schedules += [optax.polynomial_schedule(learning_rate, end, power, num_after)]
    elif name == "constant":
        schedules += [optax.constant_schedule(learning_rate)]
    elif name == "inverse_sqrt":
        schedules += [_inverse_sqrt(learning_rate, timescale=warmup_steps or 10_000)]
    else:
        schedules += [
            optax.constant_schedule(learning_rate),
            optax.linear_schedule(learning_rate, end, decay_steps),
        ]
        boundaries += [num_steps - decay_steps]
    return optax.join_schedules(schedules, boundaries)


def decay_mask(params: PyTree) -> PyTree:
    """True for the leaves of a nested dict to which weight decay applies, by leaf name.

    Kernels and embeddings decay, biases and LayerNorm scales do not (optimizer of Devlin et al.).
    Raises ValueError for any other leaf name.
    """

    def decays(path: tuple, _: object) -> bool:
        leaf_name = path[-1].key
        if leaf_name not in DECAYS:
            raise ValueError(
                f"decay_mask: expected a leaf named one of {', '.join(DECAYS)}, got "
                f"{jax.tree_util.keystr(path, simple=True, separator='/')!r}; rename the leaf or "
                "add the name to optimizer.DECAYS"
            )
        return DECAYS[leaf_name]

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    clip_norm: float | None = 1.0,
    decays_to_start: bool = False,
    layer_decay: float | None = None,
) -> optax.GradientTransformation:
    """AdamW with bias correction after global-norm clipping; weight decay by `decay_mask`.

    The decay is decoupled and follows the schedule (Loshchilov and Hutter 2019, as in
    `torch.optim.AdamW`). `clip_norm=None` does not clip; the state has the same structure.
    `decays_to_start`: weights decay towards those of the first step instead of 0, except those of
    the task's head and of a projection. `layer_decay`: see `_scale_by_depth`. Where its update gets
    `is_applied`, bool [], the moments stay as they are if it is false.
    """
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
    if decays_to_start:
        decay = _decay_to_start(weight_decay)
    return optax.chain(
        optax.identity() if clip_norm is None else _clip_by_global_norm(clip_norm),
        _scale_by_adam(b1, b2, eps),
        decay,
        optax.scale_by_learning_rate(schedule),
        *([] if layer_decay is None else [_scale_by_depth(layer_decay)]),
    )


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` whose moments stay as they are in a step that is skipped.

    The update is computed from the moments that are kept: computed from the new ones it would make
    XLA copy the old ones, which it then reads twice.
    """

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **given: Any):
        flag = given.get("is_applied", True)
        new = optax.ScaleByAdamState(
            jnp.where(flag, optax.safe_increment(state.count), state.count),
            _moments(flag, updates, state.mu, b1, 1),
            _moments(flag, updates, state.nu, b2, 2),
        )
        mu = optax.tree.bias_correction(new.mu, b1, new.count)
        nu = optax.tree.bias_correction(new.nu, b2, new.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v + 0.0) + eps), mu, nu), new

    init = optax.scale_by_adam(b1=b1, b2=b2, eps=eps).init
    return optax.GradientTransformationExtraArgs(init, update)


def _moments(
    is_applied: ArrayLike, updates: PyTree, moments: PyTree, decay: float, order: int
) -> PyTree:
    """(1 - decay) · update^order + decay · moment; in a step that is skipped the old moments.

    Of the two forms the one is used with which XLA's CPU compiler rounds as without a skip: it
    chooses which product it fuses with the sum, and chooses otherwise for unrolled layers.
    """

    def moment(path: tuple, update: ArrayLike, old: ArrayLike) -> jax.Array:
        if not any(isinstance(part, jax.tree_util.SequenceKey) for part in path):
            new = (1 - decay) * update**order + decay * old
            return jnp.where(is_applied, new, old)  # `new` first
        new, kept = (jnp.where(is_applied, *p) for p in ((1 - decay, 0.0), (decay, 1.0)))
        return new * jnp.where(is_applied, update, 0.0) ** order + kept * old

    return jax.tree_util.tree_map_with_path(moment, updates, moments)


def _decay_to_start(weight_decay: float) -> optax.GradientTransformation:
    """Adds `weight_decay` · (w - start) to the updates; the state holds the start.

    The penalty L2-SP (Li, Grandvalet and Davoine 2018, arXiv 1802.01483), decoupled like AdamW's.
    """

    def init(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.zeros_like(leaf) if _is_new(path) else jnp.copy(leaf), params
        )

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None):
        assert params is not None
        decayed = jax.tree.map(
            lambda decays, update, leaf, first: (
                update + weight_decay * (leaf - first) if decays else update
            ),
            decay_mask(params),
            updates,
            params,
            state,  # the start
        )
        return decayed, state

    return optax.GradientTransformation(init, update)


_NEW_PARTS = ("classifier", "spans", "projection", "decoder_projection")


def _is_new(path: tuple) -> bool:
    """Whether a leaf is of a task's head or of a projection, which start at random."""
    return any(getattr(part, "key", None) in _NEW_PARTS for part in path)


def _scale_by_depth(decay: float) -> optax.GradientTransformation:
    """Multiplies the updates of layer i of n (from 0) by decay^(n - i): lower layers move less.

    Embeddings have decay^(n + 1), and what is above the layers 1: pooler, heads and projections.
    Discriminative fine-tuning (Howard and Ruder 2018, arXiv 1801.06146); exponents as in BEiT.
    """

    def update(updates: PyTree, state: optax.OptState, params: PyTree | None = None):
        num_layers = _num_layers(updates)

        def scale(path: tuple, leaf: jax.Array) -> jax.Array:
            keys = [getattr(part, "key", getattr(part, "idx", None)) for part in path]
            if "embeddings" in keys:
                return leaf * decay ** (num_layers + 1)
            if "layers" not in keys:
                return leaf
            place = keys[keys.index("layers") + 1]
            if isinstance(place, int):  # layers apart, each [1, …]
                return leaf * decay ** (num_layers - place)
            exponents = num_layers - jnp.arange(num_layers)
            factors = jnp.asarray(decay, leaf.dtype) ** exponents
            return leaf * factors.reshape(-1, *[1] * (leaf.ndim - 1))

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _num_layers(tree: PyTree) -> int:
    """The number of layers of the encoder in a tree of parameters."""
    if isinstance(tree, dict):
        if "layers" in tree:
            layers = tree["layers"]
            return len(layers) if isinstance(layers, tuple) else len(jax.tree.leaves(layers)[0])
        return max((_num_layers(child) for child in tree.values()), default=0)
    return 0


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` as a multiplication of all gradients by one factor.

    XLA stores the gradients that optax divides as one more array; with a factor both moments read
    the original gradients, in passes that they make anyway. Rounds like
    `torch.nn.utils.clip_grad_norm_`, which adds 1e-6 to the norm; this function does not.
    """

    def update(updates: PyTree, state: optax.OptState, params: PyTree | None = None):
        factor = jnp.minimum(1.0, max_norm / optax.tree.norm(updates))
        return jax.tree.map(lambda update: update * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _inverse_sqrt(learning_rate: float, timescale: int) -> optax.Schedule:
    def schedule(step: ArrayLike) -> jax.Array:
        # join_schedules also evaluates this during warm-up, with negative steps.
        return learning_rate * jnp.sqrt(timescale / (jnp.maximum(step, 0) + timescale))

    return schedule


def _check_schedule(
    name: str,
    num_steps: int,
    warmup_steps: int,
    end_factor: float,
    decay_steps: int,
    power: float,
) -> None:
    if name not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}; train for some steps")
    if not 0 <= warmup_steps <= num_steps:
        raise ValueError(
            f"warmup_steps: expected 0..num_steps = 0..{num_steps}, got {warmup_steps}; shorten "
            "the warm-up or train longer"
        )
    if not 0 <= end_factor <= 1:
        raise ValueError(
            f"end_factor: expected a share of learning_rate in 0..1, got {end_factor}; it is a "
            "factor, not a learning rate"
        )
    if end_factor != 0 and name in ("constant", "inverse_sqrt"):
        raise ValueError(
            f"end_factor: expected 0 for {name}, which has no end value, got {end_factor}; remove "
            "it or use linear, cosine, polynomial or warmup_stable_decay"
        )
    if power != 1 and name != "polynomial":
        raise ValueError(f"power: expected 1 for {name}, got {power}; remove it or use polynomial")
    is_stable_decay = name == "warmup_stable_decay"
    num_after = num_steps - warmup_steps
    if is_stable_decay and not 1 <= decay_steps <= num_after:
        raise ValueError(
            f"decay_steps: expected 1..num_steps - warmup_steps = 1..{num_after} for {name}, got "
            f"{decay_steps}; a tenth to a fifth of num_steps is usual"
        )
