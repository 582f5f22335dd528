"""Opens a run: reads and checks all inputs before it writes anything.

Of the files below the recipes, only this file reads a whole `RunConfig`.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinybert_jax.config import load as config_files
from tinybert_jax.config.compute import ComputeSection
from tinybert_jax.config.run import RunConfig, StagePlan
from tinybert_jax.config.stages import FINETUNE, PRETRAIN, UPDATE, Stage
from tinybert_jax.data.errors import listed
from tinybert_jax.huggingface.encoder_decoder import DECODER_TOKENIZER, Tokenizers
from tinybert_jax.huggingface.folder import read_model
from tinybert_jax.huggingface.head import is_unnamed
from tinybert_jax.huggingface.hub import pin_revision
from tinybert_jax.huggingface.untrusted import read_json
from tinybert_jax.parallel import processes
from tinybert_jax.parallel.mesh import make_mesh, platform_of, unrolls_layers
from tinybert_jax.performance import disk, host
from tinybert_jax.performance.program_cache import keep_programs
from tinybert_jax.runs import (
    checks,
    corpus_checks,
    environment,
    identity,
    run_folder,
    shared_folder,
)
from tinybert_jax.runs.from_step import FromStep, check_from_step, go_back
from tinybert_jax.runs.inputs import read_inputs
from tinybert_jax.runs.judges import check_gate, check_teacher
from tinybert_jax.runs.run import Run, RunTask
from tinybert_jax.runs.run_store import RunStore, open_store
from tinybert_jax.tasks.table import TASKS
from tinybert_jax.training import trackers
from tinybert_jax.training.metric_log import MetricLog
from tinybert_jax.training.saver import Saver

_MODEL_PATHS = ("path", "finetuned", "target_path")  # of a section: folders or hub ids
_LAST_SAVE_SECONDS = 60.0  # for which a run that fails waits for a save under way


@contextlib.contextmanager
def open_run(
    config: RunConfig, stages: Sequence[Stage], from_step: FromStep | None = None, command: str = ""
) -> Iterator[Run]:
    """Reads and checks all inputs of the given stages, then locks and fills the run folder.

    Raises ValueError, before anything is written, where an input is wrong, where the folder belongs
    to another config, or where another process uses the folder; FloatingPointError where a stage
    has diverged. `from_step`: the stage of which other settings are taken.
    """
    pins: dict[str, str] = {}
    trackers.check_installed(config.log.trackers)
    shared_folder.check(folder_of(config))
    store = None
    if config.run_store:
        store = processes.on_main("run store", lambda: _open_store(config, from_step))
    run = read_run(config, stages, pins, from_step)
    config = config.model_copy(update={"compute": run.compute})
    identity.check_data(run)
    check_from_step(run, [run.plans[stage.name] for stage in stages], from_step)
    processes.check_same("settings", config_files.dump(config))
    identity.check_same_inputs(run)
    if processes.count() == 1:  # of several, process 0 alone would write them, and find them again
        keep_programs(platform_of(run.mesh))  # before anything compiles
    if note := environment.float8_note(config.compute.frozen_dtype, platform_of(run.mesh)):
        run.log.say(note)
    check_teachers(run, stages)

    def begin() -> None:
        # Again, because another run may have begun meanwhile.
        changes = run_folder.check_usable(run.folder, config, from_step)
        _remove_leftovers(run.folder, ".*-partial", "models/.*")
        if from_step is not None:
            go_back(run, from_step, changes, command)
        environment.write(run.folder, config_files.dump(config), run.mesh)
        _write_pins(run.folder, pins)
        _save_tokenizers(run.folder, run.tokenizers)
        identity.check_run(run)
        _remove_leftovers(run.folder, "checkpoints/*/*/partial-*")

    with contextlib.ExitStack() as stack:
        lock = host.locked_folder(run.folder, "run_dir")
        processes.on_main("lock", lambda: stack.enter_context(lock))
        processes.on_main("run folder", begin)
        if store is not None:
            run.saver.copy_with(f"copying to {config.run_store}", store.copy)
        if processes.is_main():
            run.log.trackers = trackers.open_trackers(
                config.log, run.name, run.folder, config.model_dump(mode="json"), run.log.say
            )
            peak = environment.all_peak_flops(config.compute.dtype, run.mesh)
            run = run._replace(peak_flops=peak)
        try:
            yield run
        finally:
            run.saver.copy_soon()  # also what a stage that diverged, or a gate, has written last
            undone = run.saver.finish(_LAST_SAVE_SECONDS)
            if undone:  # an error of a save is raised as well, unless another one ends the run
                run.log.say(f"not everything is saved and copied: {undone}; repeat the command")
            run.log.trackers.close()


def check_teachers(run: Run, stages: Sequence[Stage]) -> None:
    """`check_teacher` of those that are there before the run and that a stage reads."""
    if _reads_existing_task_teacher(run, stages):
        for teacher in run.own_teachers or [run.task_teacher]:
            check_teacher(run, teacher, run.teacher)
    for plan in (run.plans[stage.name] for stage in stages):
        if plan.keeps_logits and not run.is_done(plan.name):
            for teacher in run.further_teachers:
                check_teacher(run, teacher.section.path, teacher.sizes)


def read_run(
    config: RunConfig,
    stages: Sequence[Stage],
    pins: dict[str, str] | None = None,
    from_step: FromStep | None = None,
    devices: Sequence[Any] | None = None,
) -> Run:
    """Reads and checks all inputs of the given stages; runs no model and writes nothing.

    Models of the hub are read in the revisions that the run folder names; `pins` gets the hash of
    each, also of new ones. `from_step`: see `open_run`. `devices`: of the mesh; None: all of JAX.
    """
    _check_processes()
    folder = folder_of(config)
    run_folder.check_usable(folder, config, from_step)
    pins = {} if pins is None else pins
    pins |= processes.from_main("pins", lambda: _find_pins(folder, config))
    config = _pinned(config, pins)
    inputs = read_inputs(
        teacher=config.teacher,
        further=config.distillation.further_teachers,
        students=config.students_by_name,
        tokenizer=config.tokenizer,
        corpus=config.corpus,
        task=config.task,
        kept_tokenizer=folder / "tokenizer",
    )
    task, own = None, config.task
    if own and inputs.task:
        kind = TASKS[own.kind]
        kind = kind.configure(own, inputs.tokenizers.target) if kind.configure else kind
        task = RunTask(kind, own.name, own.chosen_metric, inputs.task, own)
    mesh, log = make_mesh(config.mesh, devices), MetricLog(folder / "metrics.jsonl")
    run = Run(
        name=config.name,
        folder=folder,
        mesh=mesh,
        log=log,
        saver=Saver(log.say),
        seed=config.seed,
        plans=config.plans,
        compute=_with_layout(config.compute, folder / run_folder.CONFIG, mesh),
        distillation=config.distillation,
        tokenizers=inputs.tokenizers,
        teacher=inputs.teacher,
        teacher_section=config.teacher,
        further_teachers=inputs.further_teachers,
        students=inputs.students,
        has_named_students=config.students is not None,
        task=task,
        corpus=inputs.corpus.documents,
        heldout=inputs.corpus.heldout,
        stores=inputs.corpus.stores,
        heldout_store=inputs.corpus.heldout_store,
        peak_flops=np.nan,  # `open_run` measures it
    )
    identity.check_finished(run)  # before a check reads a model of them
    _check_order(config, stages, run)
    _check(run, [run.plans[stage.name] for stage in stages])
    return run


def _check_processes() -> None:
    if jax.process_count() != processes.count():
        raise ValueError(
            f"expected processes that parallel.processes.start has joined, got "
            f"{jax.process_count()} that JAX alone knows; call it instead of jax.distributed"
        )


def _with_layout(compute: ComputeSection, file: Path, mesh: Mesh) -> ComputeSection:
    """The section with a choice for `unroll_layers`: where it is open, that of the run's `file`.

    Checkpoints have the layout of the layers, so a run keeps it on whatever devices it goes on.
    """
    if compute.unroll_layers != "auto":
        return compute
    begun = config_files.read_setting(file, run_folder.LAYOUT) if file.is_file() else None
    chosen = begun if isinstance(begun, bool) else unrolls_layers(platform_of(mesh))
    return compute.model_copy(update={"unroll_layers": chosen})


def folder_of(config: RunConfig) -> Path:
    """The run folder, as a path from the root."""
    return Path(config.run_dir).expanduser().resolve()


def _open_store(config: RunConfig, from_step: FromStep | None) -> RunStore:
    """The store of the run, from which the run folder is fetched if it is gone or older."""
    folder, url = folder_of(config), str(config.run_store)
    run_folder.check_usable(folder, config, from_step)
    return open_store(
        url,
        folder,
        lambda file: run_folder.check_config(file, config, "run_store", url, from_step),
        MetricLog(folder / "metrics.jsonl").say,
    )


_PINS = "hub.json"  # hub id -> hash of the revision that the run began with


def _read_pins(folder: Path) -> dict[str, str]:
    file = folder / _PINS
    return read_json(file) if file.is_file() else {}


def _find_pins(folder: Path, config: RunConfig) -> dict[str, str]:
    """The revisions that the run folder names, and those of models that are new to it."""
    pins = _read_pins(folder)
    _pinned(config, pins)
    return pins


def _write_pins(folder: Path, pins: dict[str, str]) -> None:
    if pins:
        disk.replace_text(folder / _PINS, json.dumps(pins, indent=2) + "\n")


def _pinned(config: RunConfig, pins: dict[str, str]) -> RunConfig:
    """The config with a hash in every hub id of a model or tokenizer; see `pin_revision`."""

    def pinned(section: Any) -> Any:
        paths = {name: getattr(section, name, None) for name in _MODEL_PATHS}
        return section and section.model_copy(
            update={name: pin_revision(path, pins) for name, path in paths.items() if path}
        )

    further = tuple(pinned(section) for section in config.distillation.further_teachers)
    students = {name: pinned(section) for name, section in (config.students or {}).items()}
    sections = {
        "teacher": pinned(config.teacher),
        "student": pinned(config.student),
        "students": students or None,
        "tokenizer": pinned(config.tokenizer),
        "distillation": config.distillation.model_copy(update={"further_teachers": further}),
    }
    return config.model_copy(update=sections) if pins else config


def reads_task_teacher(plans: Sequence[StagePlan]) -> bool:
    """Whether any of the stages reads a fine-tuned teacher."""
    return any(plan.reads_teacher and plan.stage.teacher == "task" for plan in plans)


def _check_order(config: RunConfig, stages: Sequence[Stage], run: Run) -> None:
    """Raises ValueError where a stage needs the teacher of an earlier stage that is not done."""
    there = tuple(s for s in config.stages if s in stages or run.is_done(s.name))
    for stage in stages:
        if stage.distils and not config.reads_teacher(stage, there):
            continue
        before = {"pretrained": PRETRAIN, "task": FINETUNE}.get(stage.teacher or "")
        if stage.role == "teacher" and stage.starts_from:
            before = PRETRAIN
        is_wanted = before is not None and before in config.stages and before not in stages
        if before and is_wanted and not run.is_done(before.name):
            raise ValueError(
                f"{stage.name}: expected a finished {before.name} stage in {config.run_dir}, found "
                f"none; run `tinybert {before.name}` with this config first, or all stages with "
                "`tinybert run`"
            )


def _check(run: Run, plans: Sequence[StagePlan]) -> None:
    checks.check_sizes(run, plans)
    checks.check_vocabularies(run)
    checks.check_lengths(run, plans)
    checks.check_poolers(run, plans)
    if run.stores:
        corpus_checks.check_stores(run, plans)
    elif any(plan.stage.reads_corpus for plan in plans):
        corpus_checks.check_corpus(run.tokenizer, run.corpus)
        if run.heldout and any(not p.stage.distils and p.stage.reads_corpus for p in plans):
            corpus_checks.check_corpus(run.tokenizer, run.heldout, "corpus.heldout_share")
    has_teacher = _reads_existing_task_teacher(run, [plan.stage for plan in plans])
    if has_teacher and not run.required_task.kind.generates:  # which has no labels
        checks.check_teacher_labels(run.task_teacher, run.required_task)
        _tell_unnamed(run)
    if any(plan.keeps_logits for plan in plans):
        checks.check_further_teachers(run)
    for plan in (plan for plan in plans if plan.stage is UPDATE):
        (student,) = run.students
        checks.check_old_labels(student.section.path, run.required_task.data.label_names)
        check_gate(plan.section.max_regressions, run.required_task.data.dev)
    checks.check_weights(run, plans)


def _tell_unnamed(run: Run) -> None:
    """Tells which labels the outputs of a teacher that names none are taken for."""
    task, names = run.required_task, read_model(run.task_teacher).label_names
    labels = task.data.label_names if task.kind.unit != "span" else None
    if labels and names and is_unnamed(names):
        told = f"{run.task_teacher}: its outputs have no names, and are taken for {listed(labels)}"
        run.log.say(f"{told}; task.labels sets another order")


def _reads_existing_task_teacher(run: Run, stages: Sequence[Stage]) -> bool:
    """Whether a stage that is not done reads a fine-tuned teacher that exists already."""
    pending = [run.plans[stage.name] for stage in stages if not run.is_done(stage.name)]
    return reads_task_teacher(pending) and all(plan.stage is not FINETUNE for plan in pending)


def _remove_leftovers(folder: Path, *patterns: str) -> None:
    """Removes what a kill has left of files and folders that were being written or removed."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _save_tokenizers(folder: Path, tokenizers: Tokenizers) -> None:
    """Saves the tokenizers, complete or not at all, because a resumed run reads them."""
    if not (folder / "tokenizer").is_dir():
        partial = folder / ".tokenizer-partial"
        shutil.rmtree(partial, ignore_errors=True)
        tokenizers.source.save_pretrained(str(partial))
        if tokenizers.target is not tokenizers.source:
            tokenizers.target.save_pretrained(str(partial / DECODER_TOKENIZER))
        disk.sync_tree(partial)
        partial.rename(folder / "tokenizer")
        disk.sync(folder)
