"""What a stage trains, and the checkpoints that it is resumed from."""

import contextlib
import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tinybert_jax.config.run import StagePlan
from tinybert_jax.config.stages import StageSection
from tinybert_jax.inference.scorer import Evaluator
from tinybert_jax.objectives.objective import Objective
from tinybert_jax.parallel import processes
from tinybert_jax.runs.run import Run
from tinybert_jax.runs.stage_batches import StageBatches
from tinybert_jax.training import checkpoint
from tinybert_jax.training.members import join_objectives, split_members

EVALUATION_DUE = "evaluation_due"  # in the progress of a state that a stop saved: evaluate it first


class Member(NamedTuple):
    """One trained model of a stage (or one model per seed): objective, start and evaluator."""

    objective: Objective
    random_params: Callable[[jax.Array], Any]  # (key) -> random parameters; nothing is read
    init_params: Callable[[jax.Array, int], Any]  # (key, index of the seed) -> parameters
    evaluator: Evaluator | None = None  # None: the stage is not evaluated


class Frozen(NamedTuple):
    """A frozen teacher: a tree of arrays that the objective reads and training does not change."""

    load: Callable[[], Any] = lambda: ()  # () -> its parameters
    random: Callable[[jax.Array], Any] = lambda key: ()  # (key) -> random ones; nothing is read
    read: Callable[[Any], Any] = lambda params: params  # (parameters) -> what the step reads


class Training(NamedTuple):
    """The models, batches and frozen teacher of one stage; no weights are read yet."""

    plan: StagePlan
    members: Mapping[str, Member]  # by name; all have an evaluator of the same rows, or none has
    batches: StageBatches
    # (padded width) -> FLOPs of a step per token; a packed row counts as one example at the heads.
    flops_per_token: Callable[[int], float]
    frozen: Frozen = Frozen()
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
    def objective(self) -> Objective:
        """The objective of all members together."""
        return join_objectives({name: m.objective for name, m in self.members.items()})

    @property
    def evaluators(self) -> dict[str, Evaluator]:
        members = self.members.items()
        return {name: m.evaluator for name, m in members if m.evaluator is not None}


def models_of(params: Any, names: Iterable[str], key: jax.Array) -> dict[str, list[Any]]:
    """The parameters of each seed, by member name.

    A vector of keys [seeds] means that the leaves of `params` are [seeds, …].
    """

    def by_seed(stacked: Any) -> list[Any]:
        if not key.ndim:
            return [stacked]
        return [jax.tree.map(lambda leaf: leaf[i], stacked) for i in range(len(key))]  # noqa: B023

    return {name: by_seed(stacked) for name, stacked in split_members(params, names).items()}


def _is_intact(folder: Path, step: int) -> bool:
    """Whether the folder has an intact checkpoint of the step; process 0 looks."""
    return processes.from_main(
        "intact", lambda: step in checkpoint.intact_steps(folder, among=[step])
    )


def best_steps(states: Path, steps: Iterable[int]) -> set[int]:
    """The steps of the best parameters that these states go on with.

    A state that cannot be read needs none: a resumed run sets it aside, and says so.
    """
    needed = set()
    for step in steps:
        with contextlib.suppress(FileNotFoundError, ValueError):
            needed.add(checkpoint.read_meta(states / str(step)).get("best_step"))
    return needed - {None}


def prune_best(folder: Path, also: Collection[int] = (), *, last: int = 1) -> list[int]:
    """Removes best parameters that no state in `folder/last` goes on with; returns their steps.

    Kept are the newest `last` and the steps `also`.
    """
    states = folder / "last"
    needed = best_steps(states, checkpoint.steps(states))
    return checkpoint.prune(folder / "best", last=last, also={*needed, *also})


class StageCheckpoints:
    """The checkpoints of a stage: `last`, to resume from, and `best`, by score.

    `progress` is a JSON object that is saved with each checkpoint of `last`.
    """

    def __init__(self, run: Run, training: Training):
        self.run, self.training = run, training
        self.folder = run.folder / "checkpoints" / training.name
        self.progress: dict[str, Any] = {}
        self.saved_step = 0

    def restore(self, target: Any) -> Any:
        """The newest state whose best parameters are intact too, and its `progress`; or None.

        Damage is told, and also that a stage begins again because of it.
        """
        folder, name = self.folder / "last", self.training.name
        found = checkpoint.steps(folder)
        for own in (folder, self.folder / "best"):
            processes.on_main("leftovers", functools.partial(checkpoint.remove_partial, own))
        steps = checkpoint.intact_steps(folder)
        while (step := processes.from_main("newest", lambda: next(steps, None))) is not None:
            progress = checkpoint.read_meta(folder / str(step))
            if not self._has_best(progress, target):
                best_step = progress["best_step"]
                self.run.log.say(f"{name}: step {step} needs the best parameters, of {best_step}")
                continue
            restored = checkpoint.restore(folder, step, target)
            if restored is not None:
                self.progress, self.saved_step = restored.meta, restored.step
                return restored.tree
        if found:
            self.run.log.say(f"{name}: no checkpoint can be used; the stage begins again")
        return None

    def _has_best(self, progress: dict[str, Any], target: Any) -> bool:
        """Whether the best parameters of a state are intact, or can be taken from another state."""
        step, folder = progress.get("best_step"), self.folder / "best"
        if step is None or _is_intact(folder, step):
            return True
        states = self.folder / "last"
        if progress.get("best_is_whole") and _is_intact(states, step):
            restored = checkpoint.restore(states, step, target)
            if restored is not None:
                checkpoint.write(folder, step, checkpoint.fetch(restored.tree.evaluated), "{}")
                name = self.training.name
                self.run.log.say(f"{name}: took the best parameters from the state of step {step}")
                return True
        return False

    def discard_after(self, step: int) -> None:
        """Removes best parameters after `step`, which a resumed run may not find again."""
        discard = functools.partial(checkpoint.discard_after, self.folder / "best", step)
        processes.on_main("discard", discard)

    def save(self, step: int, state: Any, pending: list[Any], **changes: Any) -> None:
        """Saves the state, and `progress` with `changes`; `pending`: steps that no line logs.

        Returns when the arrays are copied; a thread writes them.
        """
        self.progress["pending"] = pending
        meta, tree = json.dumps(self.progress | changes), checkpoint.fetch(state)
        folder, every = self.folder / "last", self.training.section.keep_every
        best = [self.progress["best_step"]] if "best_step" in self.progress else []
        last = 2 + max(self.progress["skips"]["in_row"])  # two from before any step was skipped

        def write() -> None:
            # A state is never newer than the rows of its steps.
            processes.on_main("log", self.run.log.sync)
            checkpoint.write(folder, step, tree, meta)
            prune = functools.partial(checkpoint.prune, folder, last=last, every=every, also=best)
            processes.on_main("prune", prune)

        self.run.saver.submit(f"{self.training.name}: saving step {step}", write)
        self.saved_step = step

    def save_best(self, step: int, params: Any, *, is_whole: bool) -> None:
        """Saves the best parameters; `is_whole`: they are those of the state of this step."""
        tree, folder = checkpoint.fetch(params), self.folder / "best"

        def write() -> None:
            checkpoint.write(folder, step, tree, "{}")
            processes.on_main("prune", lambda: prune_best(self.folder, also=[step]))

        self.run.saver.submit(f"{self.training.name}: saving the best step, {step},", write)
        self.progress |= {"best_step": step, "best_is_whole": is_whole}

    def best(self, target: Any) -> Any:
        """The best parameters so far."""
        self.run.saver.wait()
        folder, step = self.folder / "best", self.best_step
        is_intact = _is_intact(folder, step)
        restored = checkpoint.restore(folder, step, target) if is_intact else None
        if restored is None:
            raise ValueError(
                f"{self.training.name}: expected an intact checkpoint of step {step} in {folder}, "
                "got none; repeat the command, which goes on from an older state"
            )
        return restored.tree

    @property
    def best_step(self) -> int:
        return self.progress["best_step"]

    def describe_best(self) -> str:
        """The best scores by member; those of a single evaluation are not the best of any."""
        by_name = split_members(self.progress["best_scores"], self.training.members)
        shown = "; ".join(
            f"{name} {', '.join(f'{score:.4f}' for score in scores)}".lstrip()
            for name, scores in by_name.items()
        )
        name, metric = self.training.name, self.training.metric
        if self.progress.get("num_evals") != 1:
            return f"{name}: best {metric} {shown} by step {self.best_step}"
        is_end = self.best_step == self.training.num_steps
        when = f"the end (step {self.best_step})" if is_end else f"step {self.best_step}"
        return f"{name}: {metric} {shown} at {when}"
