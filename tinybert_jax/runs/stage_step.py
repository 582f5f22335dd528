"""The train step of a stage: its settings, put together."""

import jax
import optax
from jax.sharding import Mesh

from tinybert_jax.runs.stage_state import Training
from tinybert_jax.training import optimizer as optimizers
from tinybert_jax.training.members import join_optimizer
from tinybert_jax.training.step import TrainState, TrainStep, make_train_step


def make_optimizer(training: Training) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The schedule and the optimizer of all members of a stage."""
    section = training.section
    schedule = optimizers.schedule_of(section, training.num_steps)
    optimizer = optimizers.make_optimizer(
        schedule,
        weight_decay=section.weight_decay,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        clip_norm=section.clip_norm,
        decays_to_start=section.decay_towards == "start",
        layer_decay=section.layer_decay,
    )
    return schedule, join_optimizer(optimizer, training.members)


def make_step(
    training: Training,
    schedule: optax.Schedule,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    target: TrainState,
) -> TrainStep:
    """The jitted step of a stage; `target`: the abstract state, with its shardings."""
    section = training.section
    return make_train_step(
        training.objective,
        optimizer,
        schedule,
        mesh,
        jax.tree.map(lambda leaf: leaf.sharding, target),
        num_steps=training.num_steps,
        gradient_accumulation_steps=section.gradient_accumulation_steps,
        average_decay=section.average_decay or 0.0,
    )
