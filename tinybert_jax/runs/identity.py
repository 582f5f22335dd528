"""What a run began with, and what its finished stages wrote: a later stage checks both.

`inputs.json` in the run folder has a hash of every input, `stages/<stage>.json` those of the files
of a finished stage. The second file is written last: without it a stage is not finished.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinybert_jax import __version__
from tinybert_jax.config.run import StagePlan
from tinybert_jax.config.tasks import TaskSection
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import TaskData
from tinybert_jax.huggingface.encoder_decoder import DECODER_TOKENIZER
from tinybert_jax.huggingface.hub import find_folder
from tinybert_jax.parallel import processes
from tinybert_jax.performance import disk
from tinybert_jax.runs.run import IDENTITIES, INPUTS, Run
from tinybert_jax.tokens.store import Store, open_store

_MODEL_FILES = (".json", ".safetensors", ".txt", ".model")  # those that a model folder is read from


def check_run(run: Run) -> None:
    """Checks the inputs of a run that goes on; the first process of a run records them.

    Raises ValueError that names what has changed.
    """
    file, now = run.folder / INPUTS, _hash_inputs(run)
    if not file.is_file():  # a new run, or one that version 0.1 began
        done = [plan for plan in run.plans.values() if run.is_done(plan.name)]
        for plan in done:
            finish(run, plan)
        _verify_stores(run, {})
        disk.replace_text(file, json.dumps(now, indent=1) + "\n")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    _check_same(run, before, now)
    _verify_stores(run, before.get("stores", {}))
    if before != now:  # stores that were copied: the same bytes with other times
        disk.replace_text(file, json.dumps(now, indent=1) + "\n")


def check_same_inputs(run: Run) -> None:
    """Raises ValueError where the processes of a run read other data or models."""
    if processes.count() > 1:
        inputs = _hash_inputs(run)
        for kind in ("data", "models"):
            processes.check_same(f"{kind} (of the config)", _hash_json(inputs[kind]))


def check_data(run: Run) -> None:
    """Raises ValueError where the data are not those that the run began with."""
    file = run.folder / INPUTS
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        _check_same(run, {"data": before["data"]}, _hash_inputs(run))


def check_finished(run: Run) -> None:
    """Raises ValueError where a finished stage's files, or given models, are not as they were.

    Nothing is known yet of a run that begins, or that version 0.1 began.
    """
    file = run.folder / INPUTS
    if not file.is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    _check_same(run, {"models": before["models"]}, {"models": _hash_models(run)})
    for name in run.plans:
        identity = run.folder / IDENTITIES / f"{name}.json"
        if not (identity.is_file() and run.is_done(name)):
            continue
        outputs = json.loads(identity.read_text(encoding="utf-8"))["outputs"]
        now = _hash_files(run, {Path(path).parts[0] for path in outputs})
        changed = sorted(path for path in outputs if outputs[path] != now.get(path))
        if changed:
            folder = run.folder / "models" / Path(changed[0]).parts[0]
            raise ValueError(
                f"{run.folder / 'models' / changed[0]}: expected the file that {name} wrote, got "
                f"{'other bytes' if changed[0] in now else 'none'}; put it back, or delete "
                f"{folder}, and {name} trains again"
            )


def has_finished(run: Run, plan: StagePlan) -> bool:
    """Whether the stage has finished before, also where its models are gone since."""
    return (run.folder / IDENTITIES / f"{plan.name}.json").is_file()


def finish(run: Run, plan: StagePlan) -> None:
    """Records that a stage has finished, and the hashes of the files that it wrote."""
    folders = {path.name for path in run.output_folders(plan)}
    for name in folders:
        disk.sync_tree(run.folder / "models" / name)
    disk.sync(run.folder / "models")
    disk.sync(run.folder)
    identity = {
        "stage": plan.name,
        "outputs": _hash_files(run, folders),
    }
    disk.make_folder(run.folder / IDENTITIES)
    file = run.folder / IDENTITIES / f"{plan.name}.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != identity:
        run.log.say(
            f"{plan.name}: wrote other files than before; stages that finished since learned from "
            "the earlier ones: delete their folders in models/ to train them again"
        )
    disk.replace_text(file, json.dumps(identity, indent=1) + "\n")


def lineage(run: Run) -> dict[str, Any]:
    """What the models of a run were made of: the version, and hashes of data and given models."""
    recorded = json.loads((run.folder / INPUTS).read_text(encoding="utf-8"))
    config = hashlib.sha256((run.folder / "config.yaml").read_bytes()).hexdigest()
    inputs = {name: recorded[name] for name in ("data", "models")}
    return {"run": run.name, "tinybert-jax": __version__, "config.yaml": config, **inputs}


def _check_same(run: Run, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for kind in ("data", "models"):
        for name, expected in before.get(kind, {}).items():
            found = now[kind].get(name)
            if found == expected:
                continue
            changed = [name]
            if isinstance(expected, dict) and isinstance(found, dict):
                changed = [f for f in {**expected, **found} if expected.get(f) != found.get(f)]
            raise ValueError(
                f"{name}: expected the content that this run began with, got other content of "
                f"{', '.join(sorted(changed)[:3])}; put it back, or choose another run_dir"
            )


def _hash_inputs(run: Run) -> dict[str, Any]:
    data: dict[str, str] = {}
    if run.task:
        parts = zip(TaskData._fields, run.task.data, strict=True)
        data |= {f"task.{name}": _hash_examples(part) for name, part in parts if part is not None}
    if run.corpus:
        data["corpus"] = _hash_values(run.corpus)
        data["corpus.heldout_share"] = _hash_values(run.heldout)
    for store in _stores(run):
        data[f"store {store.folder.name}"] = _hash_json(store.manifest["files"])
    stores = {store.folder.name: _times(store) for store in _stores(run)}
    return {"data": data, "models": _hash_models(run), "stores": stores}


def _hash_models(run: Run) -> dict[str, dict[str, str]]:
    """The files of the given models, by the place of the model in the config."""
    teacher = run.teacher_section
    given = {"teacher": teacher.path, "teacher.finetuned": teacher.finetuned}
    given |= {f"student {s.name}".strip(): s.section.path for s in run.students}
    given |= {
        f"distillation.further_teachers.{t.number}": t.section.path for t in run.further_teachers
    }
    return {
        f"{name} ({path})": {
            file.relative_to(find_folder(path)).as_posix(): _sha256(file)
            for folder in (find_folder(path), find_folder(path) / DECODER_TOKENIZER)
            for file in (sorted(folder.iterdir()) if folder.is_dir() else ())
            if file.suffix in _MODEL_FILES and file.is_file()
        }
        for name, path in given.items()
        if path is not None
    }


def _stores(run: Run) -> list[Store]:
    return [store for store, _ in run.stores] + ([run.heldout_store] if run.heldout_store else [])


def _times(store: Store) -> dict[str, list[int]]:
    """[size, time of change] of each file: other times mean that the bytes are checked again."""
    found = {name: (store.folder / name).stat() for name in store.manifest["files"]}
    return {name: [own.st_size, own.st_mtime_ns] for name, own in found.items()}


def _verify_stores(run: Run, known: Mapping[str, Any]) -> None:
    """Checks the SHA-256 of all files of the stores, once in a run."""
    for store in _stores(run):
        if known.get(store.folder.name) != _times(store):
            run.log.say(f"verifies the store {store.folder}")
            open_store(store.folder, verify=True)


def _hash_files(run: Run, folders: Iterable[str]) -> dict[str, str]:
    """SHA-256 of all files in folders of models, by their path below `models`."""
    models = run.folder / "models"
    files = [f for name in folders for f in (models / name).rglob("*") if f.is_file()]
    return {str(file.relative_to(models)): _sha256(file) for file in sorted(files)}


def _hash_examples(examples: Examples) -> str:
    labels = [] if examples.labels is None else examples.labels
    plain = [own.tolist() if hasattr(own, "tolist") else own for own in labels]
    parts = [examples.text, examples.text_pair or [], plain, examples.label_names or []]
    parts += [examples.negatives] if examples.negatives else []
    return _hash_json([_hash_values(part) for part in parts])


def _hash_values(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sources(section: TaskSection) -> dict[str, Any]:
    """Where the rows to train on and the dev rows come from: files by their names, hub data by id.

    `dev_share`: the dev rows are this share of the rows of `train` and `old`.
    """
    named = {name: getattr(section, name) for name in ("train", "old", "dev")}
    found = {
        name: Path(path).name if Path(path).expanduser().exists() else path
        for name, path in named.items()
        if path
    }
    rest = {name: getattr(section, name) for name in ("builtin", "dev_split", "dev_share")}
    return found | {name: value for name, value in rest.items() if value}
