"""Removes an earlier run from its folder, where that is asked for, and nothing else.

`config.yaml` goes last: a removal that was cut short leaves the folder of a run, which can be
removed again.
"""

import contextlib
import re
import shutil
from pathlib import Path

from tinybert_jax.performance import host
from tinybert_jax.report.tables import format_si

_FILES = frozenset(
    "config.yaml env.json inputs.json metrics.jsonl results.json resamples.json report.html "
    "changes.jsonl hub.json".split()
)
_FOLDERS = frozenset(
    "checkpoints models stages hf tokenizer teacher_logits diverged profile tensorboard "
    "teacher_text wandb".split()
)
_HIDDEN = re.compile(r"\.lock|\.run_store\.json|\.hf-before|\.fetched|\.moving|\..*-partial")
_RUN = "config.yaml"


def describe(folder: Path) -> str:
    """What `remove` would remove: stages, models and bytes."""
    stages = sorted(file.stem for file in (folder / "stages").glob("*.json"))
    num_models = len(list((folder / "models").glob("*/config.json")))
    sizes = [float(f.stat().st_size) for f in folder.rglob("*") if f.is_file()]
    parts = [f"the finished stages {', '.join(stages)}"] if stages else ["no finished stage"]
    parts += [f"{num_models} models"] if num_models else []
    return "; ".join([*parts, format_si(sum(sizes), "B")])


def check(folder: Path) -> bool:
    """Whether there is a run to remove; ValueError where the folder holds something else too."""
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in there if not _HIDDEN.fullmatch(name)]
    strange = [name for name in names if name not in _FILES | _FOLDERS]
    if strange or (names and _RUN not in names):
        shown = ", ".join((strange or names)[:3])
        raise ValueError(
            f"--overwrite: expected the folder of a run alone, got {folder} with {shown}; move "
            "that away, or choose another run_dir"
        )
    return bool(names)


def remove(folder: Path) -> None:
    """Removes the run; ValueError where another process uses the folder."""
    with host.locked_folder(folder, "run_dir"):
        check(folder)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == _RUN):
            if path.name == ".lock":
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
