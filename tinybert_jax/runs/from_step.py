"""Goes on with a stage from an older step, with other settings: after it has diverged, or sooner.

A stage that stopped because it diverged has a mark beside its checkpoints, and is not trained on
until `--from-step STAGE:STEP` names a step. The file `changes.jsonl` of the run folder has a line
for each time that a run went back, with the settings that changed.
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tinybert_jax.config.run import StagePlan
from tinybert_jax.performance import disk
from tinybert_jax.runs.run import Run
from tinybert_jax.training import checkpoint
from tinybert_jax.training.manifest import find_damage

_MARK, _CHANGES = "diverged.json", "changes.jsonl"


class FromStep(NamedTuple):
    """A stage that trains again from a step at which its state was saved; 0 is its start."""

    stage: str
    step: int


def parse(text: str) -> FromStep:
    """STAGE:STEP as a `FromStep`; raises ValueError for other text."""
    stage, colon, step = text.partition(":")
    if not colon or not step.isdecimal():
        raise ValueError(
            f"--from-step: expected STAGE:STEP, as in finetune:500, got '{text}'; STEP is a number "
            "of completed steps"
        )
    return FromStep(stage, int(step))


def mark_diverged(run: Run, plan: StagePlan, why: str) -> FloatingPointError:
    """Marks a stage as diverged; returns the error to raise."""
    mark = _mark(run, plan.name)
    disk.make_folder(mark.parent)
    disk.replace_text(mark, json.dumps({"why": why}) + "\n")
    return _diverged(run, plan)


def check_from_step(run: Run, plans: Sequence[StagePlan], chosen: FromStep | None) -> None:
    """Raises ValueError where a run cannot go back to `chosen`.

    Raises FloatingPointError for a stage to train that has diverged and is not `chosen`.
    """
    by_name = {plan.name: plan for plan in plans}
    if chosen is not None and chosen.stage not in by_name:
        raise ValueError(
            f"--from-step: expected one of the stages {list(by_name)}, got '{chosen.stage}'; name "
            "a stage of this command"
        )
    for plan in plans:
        if _mark(run, plan.name).is_file() and (chosen is None or chosen.stage != plan.name):
            raise _diverged(run, plan)
    if chosen is None:
        return
    if run.is_done(chosen.stage):
        raise ValueError(
            f"--from-step: expected a stage that is not finished, got {chosen.stage}; choose "
            "another run_dir to train it with other settings"
        )
    if chosen.step not in _steps(run, chosen.stage):
        raise ValueError(
            f"--from-step: expected a step of {chosen.stage} whose state was saved, one of "
            f"{_listed(run, chosen.stage)}, got {chosen.step}; choose one of them (0: the start)"
        )
    damage = chosen.step and find_damage(_states(run, chosen.stage) / str(chosen.step))
    if damage:
        raise ValueError(
            f"--from-step: expected an intact state of step {chosen.step} of {chosen.stage}, got "
            f"one whose {damage}; choose another of {_listed(run, chosen.stage)}"
        )
    if chosen.step and not _has_best(run, chosen):
        raise ValueError(
            f"--from-step: expected a step of {chosen.stage} whose best parameters are still there"
            f", got {chosen.step}, which needs older ones; choose another of "
            f"{_listed(run, chosen.stage)}"
        )


def go_back(run: Run, chosen: FromStep, changes: Sequence[str], command: str) -> None:
    """Removes the checkpoints of a stage after the chosen step, and records the changed settings.

    A run that was killed after it had gone back goes on where it was when its command is repeated:
    it does not go back again to the same step with the same settings.
    """
    records, mark = run.folder / _CHANGES, _mark(run, chosen.stage)
    lines = records.read_text(encoding="utf-8").splitlines() if records.is_file() else []
    last = json.loads(lines[-1]) if lines else {}
    is_same = (last.get("stage"), last.get("step")) == chosen and not changes
    if is_same and not mark.is_file():
        return
    states = _states(run, chosen.stage)
    folders = (states, states.with_name("best"))
    for folder in folders:
        checkpoint.discard_after(folder, chosen.step)
    kept = sorted({step for own in folders for step in checkpoint.steps(own) if step > chosen.step})
    if kept:
        raise ValueError(
            f"--from-step: expected to remove the states after step {chosen.step}, but a command "
            f"reads those of {kept}; repeat this command when that one has ended"
        )
    row = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **chosen._asdict(),
        "changes": list(changes),
        "command": command,
    }
    disk.replace_text(records, "".join(line + "\n" for line in [*lines, json.dumps(row)]))
    mark.unlink(missing_ok=True)
    told = "; ".join(changes) or "no setting changed"
    run.log.say(f"{chosen.stage}: goes on from step {chosen.step}: {told}")


def _has_best(run: Run, chosen: FromStep) -> bool:
    """Whether the best parameters until a state are intact, or those of an intact state."""
    states = _states(run, chosen.stage)
    meta = checkpoint.read_meta(states / str(chosen.step))
    if "best_step" not in meta:
        return True
    folders = [states.with_name("best"), *([states] if meta.get("best_is_whole") else [])]
    return any(find_damage(folder / str(meta["best_step"])) is None for folder in folders)


def _diverged(run: Run, plan: StagePlan) -> FloatingPointError:
    why = json.loads(_mark(run, plan.name).read_text(encoding="utf-8"))["why"]
    return FloatingPointError(
        f"{plan.name}: diverged: {why}. Go on from an older step with another learning rate: "
        f"--from-step {plan.name}:STEP {plan.name}.learning_rate=RATE (it was "
        f"{plan.section.learning_rate:g}), where STEP is one of {_listed(run, plan.name)}"
    )


def _steps(run: Run, stage: str) -> list[int]:
    """The steps that a stage can go on from; 0 is its start."""
    return sorted({0, *checkpoint.steps(_states(run, stage))})


def _listed(run: Run, stage: str) -> str:
    return ", ".join(map(str, _steps(run, stage)))


def _states(run: Run, stage: str) -> Path:
    return run.folder / "checkpoints" / stage / "last"


def _mark(run: Run, stage: str) -> Path:
    return run.folder / "checkpoints" / stage / _MARK
