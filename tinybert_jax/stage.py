"""One training stage, first to last parameters: resume, train, evaluate, keep the best."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from tinybert_jax import checkpoint, loop, optim, sharding, train
from tinybert_jax.data.pipeline import Batch, TokenRows, num_batches, train_batches
from tinybert_jax.objectives import Objective
from tinybert_jax.run import Run
from tinybert_jax.sections import StageSection

Evaluate = Callable[[Any], dict[str, float]]


class Training(NamedTuple):
    """What one stage trains, on what, and how it is judged."""

    name: str
    section: StageSection
    objective: Objective
    init_params: Callable[[jax.Array], Any]  # key -> parameters
    rows: TokenRows
    frozen: Any  # arrays the objective reads and never changes
    flops_per_token: Callable[[int], float]  # padded width -> FLOPs of a step per token
    evaluate: Evaluate | None = None  # parameters -> dev metrics; None: keep the last
    score: str = ""  # the metric that chooses the best


def run_stage(run: Run, training: Training) -> Any:
    """Trains a stage to its end, resuming where it was; returns the best (or last) parameters."""
    section, folder = training.section, run.folder / "checkpoints" / training.name
    per_epoch = num_batches(len(training.rows.lengths), section.global_batch_size)
    num_steps = section.num_steps or max(1, round((section.num_epochs or 0) * per_epoch))
    schedule, optimizer = _make_optimizer(section, num_steps)
    data_key, param_key, step_key = _keys(run.config.seed, training.name)
    params = training.init_params(param_key)
    target = train.abstract_state(params, optimizer, step_key, run.mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, target)
    restored = checkpoint.restore_newest(folder / "last", target)
    if restored is None:
        state, progress = train.init_state(params, optimizer, step_key, run.mesh), {}
    else:
        state, progress = restored.tree, restored.meta
        run.log.say(f"{training.name}: resumes at step {restored.step} of {num_steps}")
    start_step = int(state.step)
    run.log.rewind(training.name, start_step)

    step_fn = train.make_train_step(
        training.objective,
        optimizer,
        schedule,
        run.mesh,
        placed,
        gradient_accumulation_steps=section.gradient_accumulation_steps,
    )
    frozen = jax.device_put(
        training.frozen,
        sharding.shardings(sharding.param_specs(training.frozen, run.mesh), run.mesh),
    )
    meter = _Meter(run, training, num_steps, start_step)
    judge = _Judge(run, training, folder, per_epoch, num_steps, progress, meter)

    def save(step: int, state: train.TrainState) -> bool:
        if step % section.save_every == 0 or step == num_steps or progress.get("stopped"):
            with meter.paused():
                checkpoint.save(folder / "last", step, state, progress)
        return False

    if not progress.get("stopped"):
        state = loop.fit(
            state,
            lambda state, batch: step_fn(state, batch, frozen),
            _placed_batches(run, training, data_key, start_step),
            start_step=start_step,
            num_steps=num_steps,
            record=meter.record,
            hooks=(judge, save),
        )
    if training.evaluate is None:
        return jax.device_get(state.params)
    best = checkpoint.restore_newest(folder / "best", target.params)
    assert best is not None  # the first evaluation made one
    run.log.say(
        f"{training.name}: best {training.score} {progress['best_score']:.4f} "
        f"at step {progress['best_step']}"
    )
    return jax.device_get(best.tree)


class _Judge:
    """The hook that evaluates, keeps the best parameters and stops when patience is out."""

    def __init__(self, run, training, folder, per_epoch, num_steps, progress, meter):
        self.run, self.training, self.folder = run, training, folder
        self.every = training.section.eval_every or per_epoch
        self.num_steps, self.progress, self.meter = num_steps, progress, meter

    def __call__(self, step: int, state: train.TrainState) -> bool:
        if self.training.evaluate is None or (step % self.every and step != self.num_steps):
            return False
        with self.meter.paused():
            values = self.training.evaluate(state.params)
            self.run.log.write("eval", self.training.name, step, values)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            self.run.log.say(f"{self.training.name:<12} {step:>6}/{self.num_steps}  dev: {shown}")
            return self._keep(step, state, values[self.training.score])

    def _keep(self, step: int, state: train.TrainState, score: float) -> bool:
        if score > self.progress.get("best_score", -np.inf):
            self.progress |= {"best_score": score, "best_step": step, "evals_since_best": 0}
            checkpoint.save(self.folder / "best", step, state.params, {}, keep=1)
            return False
        self.progress["evals_since_best"] += 1
        patience = self.training.section.patience
        if patience is not None and self.progress["evals_since_best"] >= patience:
            self.progress["stopped"] = True
        return bool(self.progress.get("stopped"))


class _Meter:
    """Averages step metrics and turns them into rates, leaving pauses out of the clock."""

    def __init__(self, run: Run, training: Training, num_steps: int, start_step: int):
        self.run, self.training, self.num_steps = run, training, num_steps
        self.pending: list[tuple[dict[str, jax.Array], int, int]] = []
        self.last_step, self.since, self.pause = start_step, time.perf_counter(), 0.0

    def record(self, step: int, batch: Batch, metrics: dict[str, jax.Array]) -> None:
        num_rows, width = batch.input_ids.shape
        self.pending.append((metrics, num_rows, width))
        if step % self.training.section.log_every and step != self.num_steps:
            return
        values = self._average(step)
        self.run.log.write("train", self.training.name, step, values)
        self.run.log.progress(self.training.name, step, self.num_steps, values)
        if not np.isfinite(values["loss"]):
            raise FloatingPointError(
                f"{self.training.name}: expected a finite loss, got {values['loss']} within steps "
                f"{self.last_step + 1}–{step}; lower {self.training.name}.learning_rate. The last "
                "checkpoint before it is kept"
            )
        self.last_step, self.pause = step, 0.0
        self.since = time.perf_counter()

    def _average(self, step: int) -> dict[str, float]:
        fetched = jax.device_get([metrics for metrics, _, _ in self.pending])
        seconds = max(time.perf_counter() - self.since - self.pause, 1e-9)
        tokens = [float(metrics["num_tokens"]) for metrics in fetched]
        flops = sum(
            count * self.training.flops_per_token(width)
            for count, (_, _, width) in zip(tokens, self.pending, strict=True)
        )
        values = {
            name: float(np.mean([metrics[name] for metrics in fetched]))
            for name in fetched[0]
            if name not in ("num_tokens", "learning_rate")
        }
        num_slots = sum(rows * width for _, rows, width in self.pending)
        steps = len(self.pending)
        self.pending.clear()
        return values | {
            "learning_rate": float(fetched[-1]["learning_rate"]),
            "tokens_per_second": sum(tokens) / seconds,
            "padding_share": 1 - sum(tokens) / num_slots,
            "mfu": flops / seconds / self.run.peak_flops,
            "seconds": seconds,
            "seconds_left": seconds / steps * (self.num_steps - step),
        }

    def paused(self):
        return _Pause(self)


class _Pause:
    def __init__(self, meter: _Meter):
        self.meter = meter

    def __enter__(self) -> None:
        # Work still in flight belongs to training, not to the pause.
        jax.block_until_ready([metrics for metrics, _, _ in self.meter.pending])
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.meter.pause += time.perf_counter() - self.start


def _make_optimizer(
    section: StageSection, num_steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    schedule = optim.make_schedule(
        section.schedule,
        learning_rate=section.learning_rate,
        num_steps=num_steps,
        warmup_steps=round(section.warmup * num_steps),
        end_factor=section.end_factor,
        decay_steps=round(section.decay * num_steps),
        power=section.power,
    )
    optimizer = optim.make_optimizer(
        schedule,
        weight_decay=section.weight_decay,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        clip_norm=section.clip_norm,
    )
    return schedule, optimizer


def _keys(seed: int, stage: str) -> tuple[int, jax.Array, jax.Array]:
    """Data seed, parameter key and step key; each stage draws its own from the run's seed."""
    stage_id = int.from_bytes(stage.encode(), "little") % 2**31
    key = jax.random.fold_in(jax.random.key(seed), stage_id)
    param_key, step_key = jax.random.split(key)
    return (seed + stage_id) % 2**31, param_key, step_key


def _placed_batches(
    run: Run, training: Training, data_seed: int, start_step: int
) -> Iterator[Batch]:
    placement = sharding.batch_sharding(run.mesh)
    batches = train_batches(
        training.rows,
        buckets=training.section.buckets(),
        global_batch_size=training.section.global_batch_size,
        seed=data_seed,
        start_step=start_step,
        pad_token_id=run.tokenizer.pad_token_id,
    )
    return (jax.device_put(batch, placement) for batch in batches)
