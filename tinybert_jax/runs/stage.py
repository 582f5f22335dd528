"""Runs one training stage: resumes it, trains, evaluates and keeps the best parameters."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tinybert_jax.batches import loader
from tinybert_jax.config.models import SOLE
from tinybert_jax.config.run import StagePlan
from tinybert_jax.config.stages import StageSection
from tinybert_jax.inference.scorer import Evaluator
from tinybert_jax.models.params import restack_layers, sha256, unstack_layers
from tinybert_jax.objectives.objective import Objective
from tinybert_jax.parallel import sharding
from tinybert_jax.performance import trace
from tinybert_jax.runs.run import Run
from tinybert_jax.runs.stage_batches import StageBatches
from tinybert_jax.training import checkpoint, loop
from tinybert_jax.training.early_stopping import compare_with_best
from tinybert_jax.training.members import (
    join_objectives,
    join_optimizer,
    merge_members,
    split_members,
)
from tinybert_jax.training.optimizer import make_optimizer, make_schedule
from tinybert_jax.training.step import (
    TrainState,
    TrainStep,
    abstract_state,
    init_state,
    make_train_step,
)
from tinybert_jax.training.throughput import Meter


class Member(NamedTuple):
    """One trained model of a stage (or one model per seed): objective, start and evaluator."""

    objective: Objective
    init_params: Callable[[jax.Array, int], Any]  # (key, index of the seed) -> parameters
    evaluator: Evaluator | None = None  # None: the stage is not evaluated


class Training(NamedTuple):
    """The models, batches and frozen teacher of one stage."""

    plan: StagePlan
    members: Mapping[str, Member]  # by name; all have an evaluator of the same rows, or none has
    batches: StageBatches
    frozen: Any  # a tree of arrays that the objective reads and training does not change
    # (padded width) -> FLOPs of a step per token; a packed row counts as one example at the heads.
    flops_per_token: Callable[[int], float]
    read_frozen: Callable[[Any], Any] = lambda frozen: frozen  # (frozen) -> the step's arrays
    metric: str = ""  # chooses the best parameters; "": the last parameters are kept

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def section(self) -> StageSection:
        return self.plan.section

    @property
    def num_steps(self) -> int:
        return self.batches.num_steps(self.section)

    @property
    def evaluators(self) -> dict[str, Evaluator]:
        members = self.members.items()
        return {name: m.evaluator for name, m in members if m.evaluator is not None}


def run_stage(run: Run, training: Training) -> dict[str, list[Any]]:
    """Trains a stage to its end, from its last checkpoint if there is one.

    Returns the best (or last) parameters by member name, in a list with one entry per seed.
    """
    section, folder = training.section, run.folder / "checkpoints" / training.name
    num_steps = training.num_steps
    schedule, optimizer = _make_optimizer(section, num_steps)
    optimizer = join_optimizer(optimizer, training.members)
    state, target, progress = _open_state(run, training, optimizer, folder)
    start_step = int(state.step)
    if start_step:
        run.log.say(f"{training.name}: resumes at step {start_step} of {num_steps}")

    placement = sharding.batch_sharding(run.mesh)
    pending = progress.get("pending", [])
    meter = _make_meter(run, training, start_step, pending)
    evaluate = _EvaluationHook(run, training, folder, progress, meter)

    def is_due(step: int) -> bool:
        return step % section.save_every == 0 or step == num_steps or evaluate.is_due(step)

    def save(step: int, state: TrainState) -> bool:
        # A save follows every evaluation: after a kill, `best` is at most one save ahead of `last`.
        if is_due(step):
            with meter.paused(state):
                progress["pending"] = meter.snapshot()
                checkpoint.save(folder / "last", step, state, progress)
        return False

    if not progress.get("stopped"):
        step_fn = make_train_step(
            join_objectives({name: m.objective for name, m in training.members.items()}),
            optimizer,
            schedule,
            run.mesh,
            jax.tree.map(lambda leaf: leaf.sharding, target),
            num_steps=num_steps,
            gradient_accumulation_steps=section.gradient_accumulation_steps,
            average_decay=section.average_decay or 0.0,
        )
        with _step(run, training, step_fn, meter) as step:
            state = loop.fit(
                state,
                step,
                loader.prefetched(
                    training.batches.batch_at, start_step=start_step, placement=placement
                ),
                start_step=start_step,
                num_steps=num_steps,
                record=meter.record,
                is_due=is_due,
                hooks=(evaluate, save),
            )
    chosen = state.evaluated
    if training.metric:
        chosen = _restore_best(run, training, folder / "best", target.params, progress)
    models = _models(jax.device_get(chosen), training.members, state.key)
    return {name: [restack_layers(params) for params in models[name]] for name in models}


def _step(
    run: Run, training: Training, step_fn: TrainStep, meter: Meter
) -> contextlib.AbstractContextManager[trace.Step]:
    """Yields step(state, batch); with `run.is_profiled` it traces some of its calls."""
    frozen = sharding.place_params(training.read_frozen(training.frozen), run.mesh)

    def step(state, batch):
        return step_fn(state, batch, frozen)

    if not run.is_profiled:
        return contextlib.nullcontext(step)
    return trace.traced_step(
        step,
        lambda state, batch: step_fn.program(state, batch, frozen),
        run.folder / "profile" / training.name,
        run.log.say,
        meter.paused,
    )


def _models(params: Any, names: Iterable[str], key: jax.Array) -> dict[str, list[Any]]:
    """The parameters of each seed, by member name.

    A vector of keys [seeds] means that the leaves of `params` are [seeds, …].
    """

    def by_seed(stacked: Any) -> list[Any]:
        if not key.ndim:
            return [stacked]
        return [jax.tree.map(lambda leaf: leaf[i], stacked) for i in range(len(key))]  # noqa: B023

    return {name: by_seed(stacked) for name, stacked in split_members(params, names).items()}


def _open_state(
    run: Run, training: Training, optimizer: optax.GradientTransformation, folder: Path
) -> tuple[TrainState, TrainState, dict[str, Any]]:
    """The state to start or resume from, its abstract form, and the progress saved with it."""
    params, step_key = _start(run, training)
    averaged = training.section.average_decay is not None
    target = abstract_state(params, optimizer, step_key, run.mesh, averaged=averaged)
    fingerprint = _fingerprint(training)
    restored = checkpoint.restore_newest(folder / "last", target)
    if restored is None:
        state = init_state(params, optimizer, step_key, run.mesh, averaged=averaged)
        progress: dict[str, Any] = {"data": fingerprint}
    else:
        state, progress = restored.tree, restored.meta
        _check_same_data(training.name, progress["data"], fingerprint)
    run.log.rewind(training.name, int(state.step))
    checkpoint.discard_after(folder / "best", int(state.step))
    return state, target, progress


def _fingerprint(training: Training) -> str:
    """SHA-256 of the training rows, of the rows that evaluate it, and of the frozen teacher."""
    digest = hashlib.sha256(training.batches.fingerprint.encode())
    for evaluator in list(training.evaluators.values())[:1]:
        digest.update(evaluator.fingerprint.encode())
    digest.update(sha256(training.frozen).encode())
    return digest.hexdigest()


def _start(run: Run, training: Training) -> tuple[Any, jax.Array]:
    """Initial parameters and step key; with several seeds both have a leading dim [seeds]."""
    seeds = training.plan.seeds
    keys = [_keys(seed, training.plan.stage.salt) for seed in seeds]

    def start(member: Member, key: jax.Array, i: int) -> Any:
        params = member.init_params(key, i)
        return unstack_layers(params) if run.compute.unroll_layers else params

    starts = [
        merge_members({name: start(m, key, i) for name, m in training.members.items()})
        for i, (key, _) in enumerate(keys)
    ]
    if len(seeds) == 1:
        return starts[0], keys[0][1]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    return stacked, jnp.stack([step_key for _, step_key in keys])


def _restore_best(run: Run, training: Training, folder: Path, target: Any, progress: dict) -> Any:
    best = _best(training.name, folder, target, progress)
    by_name = split_members(progress["best_scores"], training.members)
    shown = "; ".join(
        f"{name} {', '.join(f'{score:.4f}' for score in scores)}".lstrip()
        for name, scores in by_name.items()
    )
    run.log.say(f"{training.name}: best {training.metric} {shown} by step {progress['best_step']}")
    return best


def _best(stage: str, folder: Path, target: Any, progress: dict) -> Any:
    best = checkpoint.restore_newest(folder, target)
    if best is None or best.step != progress["best_step"]:
        raise ValueError(
            f"{stage}: expected an intact checkpoint of step {progress['best_step']} in {folder}, "
            f"got {'none' if best is None else f'step {best.step}'}; delete {folder.parent} to "
            "train this stage again"
        )
    return best.tree


def _check_same_data(stage: str, before: str, now: str) -> None:
    if before != now:
        raise ValueError(
            f"{stage}: expected the data that this run began with ({before[:12]}), got other data "
            f"({now[:12]}): rows or teacher changed; restore the files or the package versions, "
            "or choose another run_dir"
        )


class _EvaluationHook:
    """A hook of the training loop: evaluates, saves the best parameters, and stops early.

    `folder`: checkpoints of the stage. `progress`: a JSON object that the hook updates and the
    caller saves with each checkpoint.
    """

    def __init__(self, run, training, folder, progress, meter):
        self.run, self.training, self.folder = run, training, folder
        self.every = training.section.eval_every or training.batches.num_batches
        self.num_steps, self.progress, self.meter = training.num_steps, progress, meter

    def is_due(self, step: int) -> bool:
        is_time = step % self.every == 0 or step == self.num_steps
        return bool(self.training.evaluators) and is_time

    def __call__(self, step: int, state: TrainState) -> bool:
        if not self.is_due(step):
            return False
        with self.meter.paused(state):
            models = _models(state.evaluated, self.training.members, state.key)
            metrics = {
                name: [evaluator.measure(params) for params in models[name]]
                for name, evaluator in self.training.evaluators.items()
            }
            self._log(step, metrics)
            metric = self.training.metric
            scores = {name: [m[metric] for m in seeds] for name, seeds in metrics.items() if metric}
            is_over = self._keep(step, state, scores) if metric else False
        if is_over:  # log before the save: a resumed run then finds no steps to log
            self.meter.finish(step)
        return is_over

    def _log(self, step: int, by_member: Mapping[str, list[dict[str, float]]]) -> None:
        """Logs each metric's mean over all models, and the score of each named member."""
        name, score = self.training.name, self.training.metric
        models = [metrics for seeds in by_member.values() for metrics in seeds]
        values = {metric: float(np.mean([m[metric] for m in models])) for metric in models[0]}
        for member, seeds in by_member.items():
            if member != SOLE:
                values[f"{score}/{member}"] = float(np.mean([m[score] for m in seeds]))
        self.run.log.write("eval", name, step, values)
        shown = "  ".join(f"{metric} {value:.4f}" for metric, value in values.items())
        text = self.run.required_task.data.selection_name if score else "held out"
        text += f", mean of {len(models)}" if len(models) > 1 else ""
        self.run.log.say(f"{name:<12} {step:>6}/{self.num_steps}  {text}: {shown}")

    def _keep(self, step: int, state: TrainState, scores: dict[str, list[float]]) -> bool:
        """Saves the parameters of each model with a better score; True where the stage stops early.

        The stage stops when the patience of every member is used up. Until then a member without
        patience trains on with the others, but its saved parameters do not change.
        """
        names = ("best_scores", "evals_since_best")
        known = [
            split_members(self.progress[name], scores) if name in self.progress else None
            for name in names
        ]
        standing = compare_with_best(scores, *known, self.training.section.patience)
        flags = standing.is_better
        if any(is_better.any() for is_better in flags.values()):
            is_all = all(is_better.all() for is_better in flags.values())
            kept = state.evaluated if is_all else self._merged(state, flags)
            checkpoint.save(self.folder / "best", step, kept, {}, keep=3)
            self.progress["best_step"] = step
        self.progress |= {name: merge_members(getattr(standing, name)) for name in names}
        if standing.is_over:
            self.progress["stopped"] = True
        return bool(self.progress.get("stopped"))

    def _merged(self, state: TrainState, is_better: Mapping[str, np.ndarray]) -> Any:
        """The new parameters of the models with a better score, the saved ones of the others."""
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            state.evaluated,
        )
        kept = _best(self.training.name, self.folder / "best", target, self.progress)
        new, old = (split_members(params, is_better) for params in (state.evaluated, kept))

        def choose(flags: np.ndarray, new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(jnp.expand_dims(flags, range(1, new.ndim)), new, old)

        return merge_members(
            {
                name: jax.tree.map(functools.partial(choose, flags), new[name], old[name])
                for name, flags in is_better.items()
            }
        )


def _make_meter(run: Run, training: Training, start_step: int, pending: list[Any]) -> Meter:
    return Meter(
        run.log,
        training.name,
        training.flops_per_token,
        training.num_steps,
        start_step,
        pending,
        log_every=training.section.log_every,
        peak_flops=run.peak_flops,
    )


def _make_optimizer(
    section: StageSection, num_steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    schedule = make_schedule(
        section.schedule,
        learning_rate=section.learning_rate,
        num_steps=num_steps,
        warmup_steps=round(section.warmup * num_steps),
        end_factor=section.end_factor,
        decay_steps=round(section.decay * num_steps),
        power=section.power,
    )
    optimizer = make_optimizer(
        schedule,
        weight_decay=section.weight_decay,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        clip_norm=section.clip_norm,
        decays_to_start=section.decay_towards == "start",
        layer_decay=section.layer_decay,
    )
    return schedule, optimizer


def _keys(seed: int, salt: int) -> tuple[jax.Array, jax.Array]:
    """(parameter key, step key) of a stage; the salt makes the keys of stages differ."""
    param_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), salt))
    return param_key, step_key
