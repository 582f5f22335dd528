"""Lists, verifies, removes and exports the checkpoints of a run folder; see `tinybert ckpt`."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinybert_jax.performance import host
from tinybert_jax.report.console import printable
from tinybert_jax.runs import run_store
from tinybert_jax.runs.run import INPUTS, Run
from tinybert_jax.runs.stage_state import best_steps, prune_best
from tinybert_jax.training import checkpoint
from tinybert_jax.training.manifest import find_damage

_NONE = "no checkpoints: a run that has finished keeps them with keep_checkpoints: true"


def act(action: str, run_dir: str, **options: Any) -> int:
    """Prints what an action says and returns the exit status; options as in the functions below."""
    is_intact, is_url = True, "://" in run_dir
    if is_url and action in ("prune", "export"):
        raise ValueError(f"ckpt {action}: expected the folder of a run, got {run_dir}")
    if action == "verify":
        text, is_intact = (run_store.verify if is_url else verify)(run_dir)
    elif action == "fetch":
        text = run_store.fetch(run_dir, **options)
    elif is_url:
        text = run_store.describe(run_dir)
    else:
        text = {"ls": describe, "prune": prune, "export": export}[action](run_dir, **options)
    print(printable(text))
    return 0 if is_intact else 3


def describe(run_dir: str | Path) -> str:
    """A line for each checkpoint: its place, size and time."""
    lines = []
    for path in _checkpoints(Path(run_dir)):
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        lines.append(f"{_name(path):<32} {_num_bytes(path) / 1e6:>10,.1f} MB  {saved}")
    return "\n".join(lines) or _NONE


def verify(run_dir: str | Path) -> tuple[str, bool]:
    """(a line for each checkpoint and the rate, whether all are intact); changes nothing.

    Raises OSError where the storage cannot be read, which is no damage.
    """
    lines, num_bytes, start, is_intact = [], 0, time.monotonic(), True
    for path in _checkpoints(Path(run_dir)):
        try:
            with checkpoint.pinned(path):
                damage = find_damage(path)
                num_bytes += _num_bytes(path)
        except FileNotFoundError:
            if not path.exists():  # the run has removed it meanwhile
                continue
            damage = find_damage(path)
        is_intact &= damage is None
        lines.append(f"{_name(path):<32} {damage or 'intact'}")
    if not lines:
        return _NONE, True
    rate = num_bytes / max(time.monotonic() - start, 1e-9)
    return "\n".join([*lines, f"{num_bytes / 1e6:,.1f} MB at {rate / 1e6:,.0f} MB/s"]), is_intact


def prune(run_dir: str | Path, keep: int) -> str:
    """Removes all but the newest `keep` states of each stage and the best ones that they know."""
    if keep < 1:
        raise ValueError(f"--keep: expected at least 1, got {keep}")
    removed, found = [], list(_checkpoints(Path(run_dir)))  # before the lock makes a folder
    with host.locked_folder(Path(run_dir), "run_dir"):
        for stage in {path.parent.parent for path in found}:
            states = stage / "last"
            best = best_steps(states, checkpoint.steps(states)[-keep:])
            gone = checkpoint.prune(states, last=keep, also=best)
            removed += [_name(states / str(step)) for step in gone]
            removed += [_name(stage / "best" / str(step)) for step in prune_best(stage)]
    return "\n".join(["removed:", *sorted(removed)]) if removed else "nothing to remove"


def remove_finished(run: Run) -> str:
    """Removes the states of a run whose stages are all finished; tells how many bytes, or nothing.

    Kept are those of multiples of `keep_every` with the best parameters that they go on with, and
    what somebody reads.
    """
    if not all(run.is_done(name) for name in run.plans):
        return ""
    folder = run.folder / "checkpoints"
    before = _num_bytes(folder)
    for plan in run.plans.values():
        checkpoint.prune(folder / plan.name / "last", last=0, every=plan.section.keep_every)
        prune_best(folder / plan.name, last=0)
        for damaged in folder.glob(f"{plan.name}/*/damaged-*"):
            shutil.rmtree(damaged)
    freed = (before - _num_bytes(folder)) / 1e6
    told = f"removed the checkpoints of a finished run, {freed:,.1f} MB; keep_checkpoints: true"
    return f"{told} keeps them" if freed else ""


def export(run_dir: str | Path, stage: str, step: int | None, output: str) -> str:
    """Writes the trained arrays of a state to a safetensors file; `step`: None for the newest.

    The state is not removed meanwhile, also where the run goes on. The arrays are the moving
    average where the stage has one.
    """
    from safetensors.numpy import save_file

    if Path(output).exists():
        raise ValueError(f"--output: expected a new file, got {output}, which exists; remove it")
    if not Path(output).absolute().parent.is_dir():
        raise ValueError(
            f"--output: expected a file in a folder that exists, got {output}; create the folder"
        )
    folder = Path(run_dir).absolute() / "checkpoints" / stage / "last"
    found = checkpoint.steps(folder)
    if not found:
        raise ValueError(
            f"ckpt export: expected a stage with saved states, got {stage}, which has none in "
            f"{folder}; `tinybert ckpt ls {run_dir}` lists those that are there"
        )
    chosen = step if step is not None else (found or [None])[-1]
    if chosen not in found:
        raise ValueError(f"--step: expected one of the steps {found} in {folder}, got {chosen}")
    path = folder / str(chosen)
    with checkpoint.pinned(path):
        damage = find_damage(path)
        if damage:
            raise ValueError(f"{path}: expected an intact checkpoint, got one whose {damage}")
        arrays = checkpoint.read_arrays(path)
    for field in ("average.", "params."):
        trained = {n.removeprefix(field): own for n, own in arrays.items() if n.startswith(field)}
        if trained:
            break
    save_file(trained, output, metadata={"stage": stage, "step": str(chosen)})
    return f"{output}: {len(trained)} arrays of step {chosen} of {stage}"


def _checkpoints(run_dir: Path) -> Iterator[Path]:
    folders = sorted(run_dir.glob("checkpoints/*/*/"))
    found = [folder / str(step) for folder in folders for step in checkpoint.steps(folder)]
    if not found and not (run_dir / INPUTS).is_file():
        raise ValueError(f"run_dir: expected a run folder with checkpoints, got {run_dir}")
    yield from found


def _name(path: Path) -> str:
    return "/".join(path.parts[-3:])


def _num_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
