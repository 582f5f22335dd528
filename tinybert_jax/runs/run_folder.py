"""The run folder: whether a run may use it, and the removal of an earlier run in it.

Only where it is asked for, and nothing but what a run writes. `config.yaml` goes last: a removal
that was cut short leaves the folder of a run, which can be removed again.
"""

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tinybert_jax.config import load as config_files
from tinybert_jax.config.stages import STAGE_NAMES
from tinybert_jax.performance import host
from tinybert_jax.report.tables import format_si
from tinybert_jax.runs.from_step import FromStep

_FILES = frozenset(
    "config.yaml env.json inputs.json metrics.jsonl results.json resamples.json report.html "
    "changes.jsonl hub.json".split()
)
_FOLDERS = frozenset(
    "checkpoints models stages hf tokenizer teacher_logits diverged profile tensorboard "
    "teacher_text wandb".split()
)
_HIDDEN = re.compile(r"\.lock|\.run_store\.json|\.hf-before|\.fetched|\.moving|\..*-partial")
CONFIG, LAYOUT = "config.yaml", "compute.unroll_layers"
# Last parts of the names of settings that name files, folders or hub ids.
_FILE_SETTINGS = frozenset(
    "path finetuned target_path train dev old unlabelled train_target dev_target files "
    "heldout_store".split()
)
# Settings that may differ when a run resumes, because no array depends on them, or, with another
# mesh, on nothing but the rounding of sums.
_MAY_CHANGE = (
    "run_dir",  # the folder may be moved, or named by another path
    "run_store",
    "keep_checkpoints",
    "distillation.teacher_margin",
    "export",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.dcn_data",
    "log.trackers",
    "log.project",
    "update.max_regressions",
    *(
        f"{stage}.{name}"
        for stage in STAGE_NAMES
        for name in ("save_every", "save_minutes", "keep_every")
    ),
)


def check_usable(folder: Path, config: BaseModel, from_step: FromStep | None = None) -> list[str]:
    """Raises ValueError where the run folder is a file, or holds another run or other files.

    Returns the settings of the stage of `from_step` that differ, which is allowed.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"run_dir: expected a folder, got {folder}, but {path} is a file; choose "
                "another run_dir"
            )
    file = folder / CONFIG
    if not file.is_file():
        others = sorted(p.name for p in folder.glob("*") if not p.name.startswith("."))
        if others:
            raise ValueError(
                f"run_dir: expected an empty or new folder or one of an earlier run, got {folder} "
                f"with {', '.join(others[:3])}{', …' if len(others) > 3 else ''}; choose another "
                "run_dir"
            )
        return []
    if _is_alone(folder) and not _has_begun(file, config):
        raise ValueError(f"run_dir: {_foreign(folder)}; choose another run_dir, or rename the file")
    return check_config(file, config, "run_dir", folder, from_step)


def _is_alone(folder: Path) -> bool:
    """Whether the folder holds a config and nothing else that a run writes."""
    return not {path.name for path in folder.iterdir()} & ((_FILES | _FOLDERS) - {CONFIG})


def _has_begun(file: Path, config: BaseModel) -> bool:
    """Whether this run wrote its config, and was killed before it wrote anything else."""
    if file.read_text(encoding="utf-8") == config_files.dump(config):
        return True
    return file.with_name(".lock").is_file() and not _changes(file, config)


def _foreign(folder: Path) -> str:
    return f"expected a new folder or one of a run, got {folder} with a {CONFIG} that no run wrote"


def check_config(
    file: Path, config: BaseModel, setting: str, place: str | Path, from_step: FromStep | None
) -> list[str]:
    """Raises ValueError where the `file` of a run has another config; see `check_usable`.

    `setting` and `place`: what names the run in the message.
    """
    changes = _changes(file, config)
    if not all(from_step and change.startswith(f"{from_step.stage}.") for change in changes):
        removes = ""
        if setting == "run_dir" and not needed(Path(place), config):
            removes = f"remove that run with --overwrite ({describe(Path(place))}), "
        raise ValueError(
            f"{setting}: {place} holds a run of another config; choose another {setting}, "
            f"{removes}or undo these changes:\n  " + "\n  ".join(changes)
        )
    return changes


def _changes(file: Path, config: BaseModel) -> list[str]:
    is_open = config.model_dump(mode="json")["compute"]["unroll_layers"] == "auto"
    ignored = (*_MAY_CHANGE, *[LAYOUT] * is_open)
    return config_files.differences(file, config, ignored=ignored)


def needed(folder: Path, config: BaseModel) -> list[str]:
    """The settings that name a file or folder within the run folder, such as a model to update."""
    found = _paths(config.model_dump(mode="json"))
    return list(dict.fromkeys(name for name, path in found if _is_within(folder, path)))


def _is_within(folder: Path, path: str) -> bool:
    """Whether the folder holds what the path, or a glob, names, also by a link in the folder."""
    if "\0" in path:
        return False
    expanded = os.path.expanduser(path)
    for match in glob.iglob(expanded, recursive=True) if glob.has_magic(expanded) else [expanded]:
        places = Path(os.path.abspath(match)), Path(match).resolve()
        if os.path.exists(match) and any(folder in place.parents for place in places):
            return True
    return False


def _paths(tree: Any, name: str = "", *, is_path: bool = False) -> Iterator[tuple[str, str]]:
    """(dotted name, value) of the settings that may name files."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            dotted = f"{name}.{key}".lstrip(".")
            if name.endswith("stores"):  # path -> weight
                yield name, key
            yield from _paths(value, dotted, is_path=key in _FILE_SETTINGS)
    elif isinstance(tree, list):
        for value in tree:
            yield from _paths(value, name, is_path=is_path)
    elif isinstance(tree, str) and is_path:
        yield name, tree


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
    if strange or (names and CONFIG not in names):
        shown = ", ".join((strange or names)[:3])
        raise ValueError(
            f"--overwrite: expected the folder of a run alone, got {folder} with {shown}; move "
            "that away, or choose another run_dir"
        )
    if names and _is_alone(folder):
        raise ValueError(f"--overwrite: {_foreign(folder)}; choose another run_dir")
    return bool(names)


def remove(folder: Path) -> None:
    """Removes the run; ValueError where another process uses the folder."""
    with host.locked_folder(folder, "run_dir"):
        check(folder)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):
            if path.name == ".lock":
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
