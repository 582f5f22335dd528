"""Stops a stage that diverges, and writes what computes the failing step again.

The folder `diverged/<stage>-<step>` of the run holds `state/<step>`, the last finite state, as a
checkpoint; `batch.npz`, the batch of the first of the steps that were skipped in a row; and
`step.json`, with the index of that step (its random numbers follow from it and the keys), the
models that skipped it, and their keys. With the stage's step function (`training.step`) this
computes it again:

    state = checkpoint.restore_newest(folder / "state", abstract).tree
    index = json.loads((folder / "step.json").read_text())["index"]
    step(state._replace(step=jnp.int32(index)), load_batch(folder / "batch.npz"), frozen)

The weights of a model that skips do not change, so those in the state are those of the failing
step. Where an update made weights that are not finite, there is no such state: then the checkpoint
before it starts what computes it again.
"""

import functools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.batches.batch import Batch
from tinybert_jax.huggingface.weights import LARGEST_WEIGHT
from tinybert_jax.models.inputs import Text
from tinybert_jax.parallel import processes, replicas, sharding
from tinybert_jax.performance import disk
from tinybert_jax.runs.from_step import mark_diverged
from tinybert_jax.runs.run import Run
from tinybert_jax.runs.stage_state import Training
from tinybert_jax.training import checkpoint
from tinybert_jax.training.members import split_members
from tinybert_jax.training.skipping import Found, Skips
from tinybert_jax.training.step import TrainState, make_split
from tinybert_jax.training.throughput import Meter


class Watch:
    """A hook of the training loop that runs before the others, and records the steps.

    It raises FloatingPointError, which ends the run, where a model skips too many steps in a row,
    where weights that are to be evaluated or saved are not finite, and where devices hold different
    copies of them. So neither is ever saved. `frozen`: the frozen arrays on the devices.
    """

    def __init__(
        self,
        run: Run,
        training: Training,
        frozen: Any,
        progress: dict[str, Any],
        meter: Meter,
    ):
        self.run, self.training, self.frozen, self.meter = run, training, frozen, meter
        self.models = [
            f"{member} seed {seed}".strip()
            for seed in training.plan.seeds
            for member in training.members
        ]
        self.progress = progress  # saved with each checkpoint
        self.skips = Skips(training.section, len(self.models), progress.get("skips"))
        progress["skips"] = self.skips.snapshot()
        self.is_told = False

    @property
    def is_alert(self) -> bool:
        """Whether the loop has to record every step before it calls the hooks."""
        return self.skips.is_alert

    @property
    def limit(self) -> jax.Array | None:
        """The highest loss of each model in the next step, for `TrainStep`."""
        limit = self.skips.limit
        if limit is None:
            return None
        return sharding.place(limit, sharding.replicated_sharding(self.run.mesh))

    def record(self, step: int, batch: Batch, metrics: dict[str, jax.Array]) -> None:
        self.skips.record(step, metrics)
        self.meter.record(step, batch, metrics)

    def __call__(self, step: int, state: TrainState) -> bool:
        is_current = self.skips.is_current(step)
        for found in self.skips.look(step):
            self._tell(found, state)
        self.progress["skips"] = self.skips.snapshot()
        every = self.training.section.check_replicas_every
        if every and (is_current or step % every == 0):
            self._check_replicas(step, state)
        if is_current:
            self._check_weights(step, state)
        if is_current and self.skips.is_over:
            num = max(self.skips.in_row)
            models = [m for m, n in zip(self.models, self.skips.in_row, strict=True) if n == num]
            why = f"{num} steps in a row were skipped, {step - num + 1} to {step}"
            self._stop(step, step - num, models, why, state, is_finite=True)
        return False

    def _tell(self, found: Found, state: TrainState) -> None:
        """Prints spikes, the first step that is not finite, and a teacher that is the reason."""
        name, say = self.training.name, self.run.log.say
        if found.is_spike:
            limits = [limit if math.isfinite(limit) else None for limit in found.limits or ()]
            values = {"losses": found.losses, "limits": limits, "skipped": found.is_skipped}
            self.run.log.write("spike", name, found.step, values)
            shown = ", ".join(f"{loss:.4g}" for loss in found.losses)
            limit = ", ".join(f"{limit:.4g}" for limit in found.limits or ())
            done = ", skipped" if found.is_skipped else ""
            say(f"{name}: step {found.step}: loss {shown}, above the limit {limit}{done}")
            return
        if self.is_told:
            return
        self.is_told = True
        with self.meter.paused(state):
            bad = find_bad_outputs(self.run, self.training, self.frozen, found.step - 1, state.key)
        if bad and found.step == 1:
            raise ValueError(f"{name}: {bad}")
        say(
            f"{name}: step {found.step} is skipped: its loss or gradient is not finite; training "
            f"stops after {self.training.section.stop_after_skipped} such steps in a row"
        )
        if bad:
            say(f"{name}: {bad}")

    def _check_replicas(self, step: int, state: TrainState) -> None:
        with self.meter.paused(state):
            different = replicas.differences(checkpoint.named_leaves(state._asdict()))
        if different:
            more = f", and {len(different) - 1} more arrays" if len(different) > 1 else ""
            raise FloatingPointError(
                f"{self.training.name}: expected equal copies of the arrays on all devices after "
                f"step {step}, got another copy of {different[0]}{more}: the device computes or "
                "remembers wrong bits; repeat the command without it, and the run goes on from its "
                "last checkpoint"
            )

    def _check_weights(self, step: int, state: TrainState) -> None:
        with self.meter.paused(state):
            flags = _are_sound(state, tuple(self.training.members)).tolist()
        bad = [number for number, flag in enumerate(flags) if not flag]
        if bad:
            # A step from such weights is skipped: the step before those that were made them.
            index = step - max(self.skips.in_row[number] for number in bad) - 1
            why = f"step {index + 1} made weights that are not finite or above {LARGEST_WEIGHT:g}"
            models = [self.models[number] for number in bad]
            self._stop(step, index, models, why, state, is_finite=False)

    def _stop(
        self,
        step: int,
        index: int,
        models: Sequence[str],
        why: str,
        state: TrainState,
        *,
        is_finite: bool,
    ) -> NoReturn:
        """Writes the folder of the failing step and raises; `is_finite`: the state is."""
        name = self.training.name
        self.meter.finish(step)
        bad = find_bad_outputs(self.run, self.training, self.frozen, index, state.key)
        folder = self.run.folder / "diverged" / f"{name}-{step}"
        why += f", in {', '.join(models)}; {folder.relative_to(self.run.folder)} of the run folder "
        why += "has what computes the step again" + (f"; {bad}" if bad else "")
        told = {"stage": name, "index": index, "stopped_at": step, "models": list(models)}
        told |= {"keys": np.asarray(jax.random.key_data(state.key)).tolist(), "why": why}
        arrays = _arrays(self.training.batches.batch_at(index))
        tree = checkpoint.fetch(state) if is_finite else None

        partial = self.run.folder / ".diverged-partial"

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            disk.make_folder(partial)

        def finish() -> None:
            np.savez(partial / "batch.npz", **arrays)
            (partial / "step.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
            disk.sync_tree(partial)
            disk.make_folder(folder.parent)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            disk.sync(folder.parent)
            # The states since then have the weights that the failing step began with.
            checkpoint.discard_after(self.run.folder / "checkpoints" / name / "last", index)

        def write() -> None:
            processes.on_main("diverges", begin)
            if tree is not None:
                checkpoint.write(partial / "state", step, tree, json.dumps({"stage": name}))
            processes.on_main("diverged", finish)

        self.run.saver.submit(f"{name}: saving the step that diverged", write)
        self.run.saver.wait()
        plan = self.training.plan
        mark = lambda: str(mark_diverged(self.run, plan, why))  # noqa: E731
        raise FloatingPointError(processes.from_main("mark", mark))


def find_bad_outputs(
    run: Run, training: Training, frozen: Any, index: int, key: jax.Array
) -> str | None:
    """Names the outputs of the teacher that are not finite for the batch of a step; or None."""
    if not training.plan.reads_teacher or not jax.tree.leaves(frozen):
        return None
    objective, num_parts = training.objective, training.section.gradient_accumulation_steps
    placement = sharding.batch_sharding(run.mesh)
    batch = sharding.place(training.batches.batch_at(index), placement)

    @jax.jit
    def is_bad(batch: Batch, frozen: Any) -> Any:
        step_key = jax.random.fold_in(key.ravel()[0], index)
        share = jnp.minimum(index / max(training.num_steps - 1, 1), 1.0)
        batch, _ = objective.prepare(batch, jax.random.split(step_key)[0], share)

        def micro(part: Batch) -> Any:
            return jax.tree_util.tree_map_with_path(_bad_parts, objective.targets(part, frozen))

        flags = jax.lax.map(micro, jax.tree.map(make_split(num_parts), batch))
        return jax.tree.map(lambda leaf: leaf.any(axis=0), flags)

    with jax.set_mesh(run.mesh):
        flags, _ = jax.tree_util.tree_flatten_with_path(is_bad(batch, frozen))
    bad = [
        _output_name(path) + (f" {place}" if len(flag) > 1 else "")
        for path, flag in flags
        for place in np.flatnonzero(flag).tolist()
    ]
    if not bad:
        return None
    more = f" and {len(bad) - 1} more outputs" if len(bad) > 1 else ""
    return (
        f"expected finite outputs of the teacher {run.teacher_of(training.plan)}, got NaN or "
        f"infinity in {bad[0]}{more} for the batch of step {index + 1}; use another teacher, or "
        "set compute.teacher_dtype=float32"
    )


def _output_name(path: tuple) -> str:
    """The name of an output of a model, such as "encoder hidden 3"."""
    return jax.tree_util.keystr(path, simple=True, separator=" ").replace("_", " ")


def _bad_parts(path: tuple, leaf: jax.Array) -> jax.Array:
    """bool [layers] of the stacked outputs of layers, [layers, batch, seq, …]; else bool [1]."""
    is_of_one_layer = isinstance(path[-1], jax.tree_util.SequenceKey)
    dims = range(int(leaf.ndim > 3 and not is_of_one_layer), leaf.ndim)
    return jnp.atleast_1d((~jnp.isfinite(leaf)).any(axis=tuple(dims)))


@functools.partial(jax.jit, static_argnums=1)
def _are_sound(state: TrainState, members: tuple[str, ...]) -> jax.Array:
    """bool [seeds × members]: whether the weights of a model are finite and of a usual size."""
    trees = [tree for tree in (state.params, state.average) if tree]
    flags = [
        jnp.stack(
            [
                (jnp.abs(leaf) <= LARGEST_WEIGHT).all(axis=tuple(range(state.key.ndim, leaf.ndim)))
                for leaf in jax.tree.leaves([split_members(tree, members)[name] for tree in trees])
            ]
        ).all(axis=0)
        for name in members
    ]
    return jnp.stack(flags, axis=-1).ravel()


def _arrays(batch: Batch) -> dict[str, Any]:
    """The arrays of a batch by dotted name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in leaves
    }


def load_batch(file: Path) -> Batch:
    """The batch in a `batch.npz`."""
    with np.load(file, allow_pickle=False) as arrays:
        read = {name: jnp.asarray(arrays[name]) for name in arrays}
    targets = {n.removeprefix("targets."): a for n, a in read.items() if n.startswith("targets.")}
    inputs = Text(read["inputs.input_ids"], read["inputs.token_type_ids"])
    return Batch(
        inputs, read["attention_mask"], targets, read["weights"], read.get("teacher_logits")
    )
