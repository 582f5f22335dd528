"""Runs one training stage: resumes it, trains, evaluates and keeps the best parameters."""

import contextlib
import functools
import hashlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tinybert_jax.batches import loader
from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.models import SOLE
from tinybert_jax.models.params import restack_layers, sha256, unstack_layers
from tinybert_jax.parallel import processes, sharding
from tinybert_jax.parallel.mesh import num_batch_shards
from tinybert_jax.performance import trace
from tinybert_jax.performance.program_cache import watched_compilation
from tinybert_jax.runs.divergence import Watch
from tinybert_jax.runs.run import Run
from tinybert_jax.runs.stage_state import (
    EVALUATION_DUE,
    Member,
    StageCheckpoints,
    Training,
    models_of,
)
from tinybert_jax.runs.stage_step import make_optimizer, make_step
from tinybert_jax.training import loop
from tinybert_jax.training.early_stopping import compare_with_best
from tinybert_jax.training.members import merge_members, split_members
from tinybert_jax.training.step import TrainState, TrainStep, abstract_state, init_state
from tinybert_jax.training.throughput import Meter

_PLAN = "packs for any number of devices"  # in the progress of a stage that this version began


def run_stage(run: Run, training: Training) -> dict[str, list[Any]]:
    """Trains a stage to its end, from its last checkpoint if there is one.

    Returns the best (or last) parameters by member name, in a list with one entry per seed.
    """
    num_steps = training.num_steps
    schedule, optimizer = make_optimizer(training)
    checkpoints = StageCheckpoints(run, training)
    state, target = _open_state(run, training, optimizer, checkpoints)
    start_step = int(state.step)
    if start_step:
        run.log.say(f"{training.name}: resumes at step {start_step} of {num_steps}")

    placement = sharding.batch_sharding(run.mesh)
    meter = _make_meter(run, training, start_step, checkpoints.progress.get("pending", []))
    saves = _SaveHook(run, training, checkpoints, meter)
    saves.set_place(start_step)
    evaluate = _EvaluationHook(saves)
    if checkpoints.progress.pop(EVALUATION_DUE, False):  # a stop came before it
        evaluate(start_step, state)

    if not checkpoints.progress.get("stopped"):
        step_fn = make_step(training, schedule, optimizer, run.mesh, target)
        frozen = sharding.place_params(training.frozen.read(training.frozen.load()), run.mesh)
        watch = Watch(run, training, frozen, checkpoints.progress, meter)
        compile_step = _CompileStep(step_fn, frozen, saves, watch)
        with run.stop.between_steps(), _step(run, training, step_fn, frozen, watch) as step:
            state = loop.fit(
                state,
                step,
                loader.prefetched(
                    training.batches.part_at, start_step=start_step, placement=placement
                ),
                start_step=start_step,
                num_steps=num_steps,
                record=watch.record,
                is_new=compile_step.is_new,
                compile_step=compile_step,
                is_due=lambda step: saves.is_due(step) or watch.is_alert,
                hooks=(watch, evaluate, saves),
            )
            run.saver.wait()
    chosen = state.evaluated
    if training.metric:
        chosen = checkpoints.best(target.params)
        run.log.say(checkpoints.describe_best())
    models = models_of(sharding.fetch(chosen), training.members, state.key)
    return {name: [restack_layers(params) for params in models[name]] for name in models}


def _step(
    run: Run, training: Training, step_fn: TrainStep, frozen: Any, watch: Watch
) -> contextlib.AbstractContextManager[trace.Step]:
    """Yields step(state, batch); with `run.is_profiled` it traces some of its calls."""

    def step(state, batch):
        return step_fn(state, batch, frozen, watch.limit)

    if not run.is_profiled or not processes.is_main():
        return contextlib.nullcontext(step)
    return trace.traced_step(
        step,
        lambda state, batch: step_fn.program(state, batch, frozen, watch.limit),
        run.folder / "profile" / training.name,
        run.log.say,
        watch.meter.paused,
    )


def _open_state(
    run: Run,
    training: Training,
    optimizer: optax.GradientTransformation,
    checkpoints: StageCheckpoints,
) -> tuple[TrainState, TrainState]:
    """The state to start or resume from, and its abstract form."""
    params, step_key = _start(run, training)
    averaged = training.section.average_decay is not None
    target = abstract_state(params, optimizer, step_key, run.mesh, averaged=averaged)
    fingerprint = _fingerprint(training)
    processes.check_same(f"data of {training.name}", fingerprint)
    if processes.count() > 1:
        processes.check_same(f"first weights of {training.name}", sha256(params))
    state = checkpoints.restore(target)
    progress = checkpoints.progress
    if state is None:
        state = init_state(params, optimizer, step_key, run.mesh, averaged=averaged)
        progress |= {"data": fingerprint, "plan": _PLAN}
    elif progress["data"] != fingerprint:
        raise ValueError(
            f"{training.name}: expected the data that this run began with "
            f"({progress['data'][:12]}), got other data ({fingerprint[:12]}): rows or teacher "
            "changed; restore the files or the package versions, or choose another run_dir"
        )
    elif progress.get("plan") != _PLAN and _packs_for_devices(run, training):
        raise ValueError(
            f"{training.name}: expected a stage that this version began, got one whose packed "
            f"batches depend on the number of devices; delete {checkpoints.folder} to train the "
            "stage again, or go on with the version that began it"
        )
    step, unwritten = int(state.step), []
    if progress.get(EVALUATION_DUE):
        unwritten = ["eval", "train"] if progress["pending"] else ["eval"]
    run.log.rewind(training.name, step, unwritten)
    checkpoints.discard_after(step)
    return state, target


def _packs_for_devices(run: Run, training: Training) -> bool:
    """Whether version 0.1 made other batches than this one."""
    return training.section.batching == "pack" and num_batch_shards(run.mesh) > 1


def _fingerprint(training: Training) -> str:
    """SHA-256 of the training rows, of the rows that evaluate it, and of the frozen teacher."""
    digest = hashlib.sha256(training.batches.fingerprint.encode())
    for evaluator in list(training.evaluators.values())[:1]:
        digest.update(evaluator.fingerprint.encode())
    digest.update(sha256(training.frozen.load()).encode())
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


class _SaveHook:
    """A hook of the training loop: saves the state, and ends the loop where a stop is asked."""

    def __init__(
        self, run: Run, training: Training, checkpoints: StageCheckpoints, meter: Meter
    ) -> None:
        self.run, self.training, self.meter = run, training, meter
        self.checkpoints, self.progress = checkpoints, checkpoints.progress
        self.num_steps = training.num_steps
        self.every = training.section.eval_every or training.batches.num_batches
        self.is_stopping = self.is_saving = False
        self.saved_at = time.monotonic()  # a clock that nobody sets

    def set_place(self, step: int) -> None:
        """Says where a stop would find the run."""
        if step:
            name = self.training.name
            self.run.stop.place = f"after step {step} of {self.num_steps} of {name}"

    def evaluates(self, step: int) -> bool:
        is_time = step % self.every == 0 or step == self.num_steps
        return bool(self.training.evaluators) and is_time

    def is_due(self, step: int) -> bool:
        """Whether to save; a stop that is asked later counts from the next step on.

        Raises SaveError where an earlier save has failed.
        """
        self.run.saver.check()
        self.set_place(step)
        # A save follows every evaluation: after a kill, `best` is at most one save ahead of `last`.
        section = self.training.section
        is_time = time.monotonic() - self.saved_at >= 60 * section.save_minutes
        self.is_stopping, is_time = self.run.stop.at_step(is_save_due=is_time)
        is_step = step % section.save_every == 0 or step == self.num_steps
        self.is_saving = is_time or is_step or self.evaluates(step) or self.is_stopping
        return self.is_saving

    def __call__(self, step: int, state: TrainState) -> bool:
        if self.is_saving:
            with self.meter.paused(state):
                self.save(step, state, is_evaluated=not self.is_stopping)
        return self.is_stopping

    def save(self, step: int, state: TrainState, *, is_evaluated: bool) -> None:
        """Saves the state of a step, unless it is the one that was saved last."""
        if step > self.checkpoints.saved_step:
            changes = {EVALUATION_DUE: True} if self.evaluates(step) and not is_evaluated else {}
            self.checkpoints.save(step, state, self.meter.snapshot(), **changes)
            self.saved_at = time.monotonic()
        if self.run.stop.is_asked:
            self.run.saver.drain()


class _CompileStep:
    """Compiles the step for each new shape of a batch; a stop need not wait until it is done."""

    def __init__(self, step_fn: TrainStep, frozen: Any, saves: _SaveHook, watch: Watch):
        self.step_fn, self.frozen, self.saves, self.watch = step_fn, frozen, saves, watch
        self.shapes: set[tuple[int, ...]] = set()

    def is_new(self, batch: Batch) -> bool:
        return batch.shape not in self.shapes

    def __call__(self, step: int, state: TrainState, batch: Batch) -> None:
        self.shapes.add(batch.shape)
        self.watch(step, state)  # the last step may be saved
        save = functools.partial(self.saves.save, step, state, is_evaluated=True)
        run, (num_rows, width) = self.saves.run, batch.shape
        what = f"the step for {num_rows} rows of {width} tokens"
        told, paused = run.log.doing(f"compiles {what}"), self.saves.meter.paused(state)
        stoppable = run.stop.saving_with(save, is_joint=True)
        with told, paused, stoppable, watched_compilation() as found:
            self.step_fn.compile(state, batch, self.frozen, self.watch.limit)
        if line := found.describe():
            run.log.say(f"{self.saves.training.name}: {what} {line}")


class _EvaluationHook:
    """A hook of the training loop: evaluates, saves the best parameters, and stops early."""

    def __init__(self, saves: _SaveHook):
        self.saves, self.run, self.training = saves, saves.run, saves.training
        self.checkpoints, self.progress = saves.checkpoints, saves.progress
        self.meter, self.num_steps = saves.meter, saves.num_steps

    def __call__(self, step: int, state: TrainState) -> bool:
        if not self.saves.evaluates(step) or self.saves.is_stopping:
            return False
        with self.meter.paused(state):
            models = models_of(state.evaluated, self.training.members, state.key)
            save = functools.partial(self.saves.save, step, state, is_evaluated=False)
            told = self.run.log.doing("evaluates")
            with told, self.run.stop.saving_with(save, is_joint=True):
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
        self.run.log.evaluated(name, step, self.num_steps, f"{text}: {shown}")

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
            self.checkpoints.save_best(step, kept, is_whole=is_all)
        num_before = self.progress.get("num_evals", int("best_scores" in self.progress))
        self.progress |= {name: merge_members(getattr(standing, name)) for name in names}
        self.progress["num_evals"] = num_before + 1
        self.run.log.tell_best(self.checkpoints.describe_best())
        if standing.is_over:
            self.progress["stopped"] = True
        return bool(self.progress.get("stopped"))

    def _merged(self, state: TrainState, is_better: Mapping[str, np.ndarray]) -> Any:
        """The new parameters of the models with a better score, the saved ones of the others."""
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            state.evaluated,
        )
        kept = self.checkpoints.best(target)
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


def _keys(seed: int, salt: int) -> tuple[jax.Array, jax.Array]:
    """(parameter key, step key) of a stage; the salt makes the keys of stages differ."""
    param_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), salt))
    return param_key, step_key
