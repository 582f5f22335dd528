"""Runs the stages of a config in order, compares the models, exports one and writes the report."""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tinybert_jax.config.run import RunConfig, StagePlan
from tinybert_jax.config.stages import (
    BASELINE,
    FINETUNE,
    GENERAL,
    INTERMEDIATE,
    PREDICTION,
    PRETRAIN,
    STAGE_NAMES,
    UPDATE,
    Stage,
)
from tinybert_jax.config.tasks import TaskSection
from tinybert_jax.data.errors import GateError
from tinybert_jax.data.splits import describe_labels
from tinybert_jax.huggingface.encoder_decoder import DECODER_TOKENIZER
from tinybert_jax.huggingface.hub import find_folder
from tinybert_jax.parallel import processes
from tinybert_jax.performance import disk
from tinybert_jax.recipes import distill, finetune, pretrain, update
from tinybert_jax.report.card import Origin, card_metadata, model_card
from tinybert_jax.report.console import console_summary, printable
from tinybert_jax.report.page import write_report
from tinybert_jax.report.run_files import RESAMPLES
from tinybert_jax.runs import estimate, identity, run_folder, shared_folder
from tinybert_jax.runs.compile import Compiled, compile_stage, largest_batch
from tinybert_jax.runs.from_step import parse
from tinybert_jax.runs.judges import check_teacher
from tinybert_jax.runs.preflight import (
    check_teachers,
    folder_of,
    open_run,
    read_run,
    reads_task_teacher,
)
from tinybert_jax.runs.results import best_seed, collect_results
from tinybert_jax.runs.run import CARD, Run, RunTask, export_models, remove_export
from tinybert_jax.runs.saved_states import remove_finished
from tinybert_jax.runs.topologies import devices_of
from tinybert_jax.runs.used_words import with_used_words
from tinybert_jax.runs.workload import rough_flops
from tinybert_jax.training import live_view
from tinybert_jax.training.metric_log import read_rows
from tinybert_jax.training.preemption import NEVER, Stop
from tinybert_jax.training.saver import reason, try_again
from tinybert_jax.training.trackers import check_installed

_RECIPES = {
    PRETRAIN: pretrain,
    FINETUNE: finetune,
    GENERAL: distill,
    INTERMEDIATE: distill,
    PREDICTION: distill,
    BASELINE: finetune,
    UPDATE: update,
}
# The first of these stages that is done is exported to `hf`: students before teachers.
_EXPORT_ORDER = (UPDATE, PREDICTION, INTERMEDIATE, GENERAL, FINETUNE, PRETRAIN, BASELINE)


def main(
    config: RunConfig,
    stages: Sequence[str] = STAGE_NAMES,
    command: str = "",
    *,
    is_profiled: bool = False,
    from_step: str | None = None,
    is_live: bool = False,
    is_overwritten: bool = False,
    stop: Stop = NEVER,
) -> Path:
    """Runs the given stages that the config has and that are not done; returns the run folder.

    `command`: the command line, for `results.json`. `from_step`: STAGE:STEP to go on from, as after
    a stage has diverged. `is_live`: draw a view of the run where the terminal can.
    `is_overwritten`: first remove the run that the folder holds. `stop`: a request to stop; Stopped
    is raised then. Raises ValueError where the config has none of the stages or an input is wrong,
    and FloatingPointError where a stage diverges.
    """
    chosen = _choose_stages(config, stages)
    step = None if from_step is None else parse(from_step)
    if is_overwritten:
        _overwrite(config, chosen)
    opened = open_run(config, chosen, step, command)
    with opened as run, stop.saving_with(run.saver.drain):
        run = run._replace(is_profiled=is_profiled, stop=stop)
        if run.task:
            run.log.say(_describe_task(run.task))
        plans = [run.plans[stage.name] for stage in chosen]
        with _shown(run, plans, is_live=is_live):
            num_new = 0
            for plan in plans:
                is_new = _run_once(run, plan)
                num_new += is_new
                if is_new and plan.stage is FINETUNE and reads_task_teacher(plans):
                    for teacher in run.own_teachers or [run.task_teacher]:
                        check_teacher(run, teacher, run.teacher)
            stop.place = "after its last stage"
            if not num_new:
                run.log.say("every stage was done before: scores and latency are measured anew")
            run.log.enter("results")
            with run.log.doing("scores the models and measures their latency"):
                refusal = processes.from_main(
                    "results", lambda: _write_results(run, command, config)
                )
        run.saver.copy_soon()
        run.saver.drain()
        if not config.keep_checkpoints:
            processes.on_main("removal of checkpoints", lambda: _remove_checkpoints(run))
            run.saver.copy_soon()
            run.saver.drain()
        if config.run_store:
            run.log.say(f"copy:   {config.run_store}")
        if refusal:
            raise GateError(refusal)
        return run.folder


def _remove_checkpoints(run: Run) -> None:
    """Removes the checkpoints of a finished run; says how much that freed, or why they stay."""
    try:
        told = try_again("removing checkpoints", lambda: remove_finished(run), run.log.say)
    except OSError as error:
        told = f"checkpoints of a finished run are left: {reason(error)}"
    if told:
        run.log.say(told)


def _overwrite(config: RunConfig, stages: Sequence[Stage]) -> None:
    """Removes the run in the run folder, once the inputs of the new one are found right."""
    folder = folder_of(config)
    if processes.count() > 1 or config.run_store:
        got = "run_store" if config.run_store else f"{processes.count()} processes"
        raise ValueError(
            f"--overwrite: expected a run of one process without run_store, got {got}; choose "
            "another run_dir, or remove the run yourself"
        )
    if run_folder.check(folder):
        if names := run_folder.needed(folder, config):
            raise ValueError(
                f"--overwrite: expected a run that the new one does not read, got {folder} with "
                f"{', '.join(names)}; choose another run_dir"
            )
        check_installed(config.log.trackers)
        with tempfile.TemporaryDirectory() as empty:
            run = read_run(config.model_copy(update={"run_dir": empty}), stages)
            check_teachers(run, stages)
        told = run_folder.describe(folder)
        run_folder.remove(folder)
        print(printable(f"removed from {folder}: {told}"), flush=True)


@contextlib.contextmanager
def _shown(run: Run, plans: Sequence[StagePlan], *, is_live: bool) -> Iterator[None]:
    """Draws the live view inside the block, of the stages that are not done."""
    if not (is_live and processes.count() == 1 and live_view.is_possible()):
        yield
        return
    work = {plan.name: rough_flops(run, plan) for plan in plans if not run.is_done(plan.name)}
    run.log.view = live_view.LiveView([plan.name for plan in plans], work)
    try:
        yield
    finally:
        run.log.view.close()
        run.log.view = None


def _write_results(run: Run, command: str, config: RunConfig) -> str:
    """Compares the models, exports one and writes `results.json` and the report.

    Returns why the gate of the stage update refuses the model; "" where it is exported.
    """
    lines = read_rows(run.folder / "metrics.jsonl")
    gate = update.judge(run, run.plans[UPDATE.name]) if run.is_done(UPDATE.name) else None
    summary = collect_results(run, lines, command, config.export, gate)
    exported = _exported(run, summary, is_best=config.export == "best")
    reasons = gate["reasons"] if gate else []
    if reasons:
        remove_export(run)  # of the same model, where the gate was wider before
    else:
        summary["exported"] = {member: folder.name for member, folder in exported.items()}
        export_models(run, exported, identity.lineage(run), _cards(run, summary, exported))
    resamples = summary.pop("resamples", None)
    if resamples is not None:
        disk.replace_text(run.folder / RESAMPLES, json.dumps(resamples) + "\n")
    disk.replace_text(run.folder / "results.json", json.dumps(summary, indent=2) + "\n")
    report = write_report(run.folder)
    run.log.say(console_summary(summary))
    if reasons:
        return (
            f"gate: expected a model that keeps what {run.students[0].section.path} had "
            f"right, got one that is refused: {'; '.join(reasons)}; it is not exported, see "
            f"{report}; give more old rows (task.old), train for shorter, or allow more "
            "(--max-regressions)"
        )
    run.log.say(f"model:  {run.folder / 'hf'}\nreport: {report}")
    return ""


def _cards(run: Run, summary: dict[str, Any], exported: dict[str, Path]) -> dict[str, str]:
    """The model card of each exported model."""
    path = run.teacher_section.path or run.teacher_section.finetuned or ""
    is_local, told = Path(path).expanduser().is_dir(), ""
    try:
        file = find_folder(path) / CARD if path else None
        told = file.read_text("utf-8", "replace") if file is not None and file.is_file() else ""
    except (OSError, ValueError) as error:  # the folder is gone since: no reason to export nothing
        run.log.say(f"model card: without the teacher's license and language: {error}")
    stages = {own: plan.name for plan in run.plans.values() for own in run.output_folders(plan)}
    cards = {}
    for member, folder in exported.items():
        origin = Origin(
            stage=stages[folder],
            member=member,
            data=_data_name(run.task.section) if run.task else "",
            teacher=Path(path).name if is_local else path.partition("@")[0],
            teacher_card=card_metadata(told),
            is_hub_teacher=bool(path) and not is_local,
            is_embedder=run.task is not None and run.task.kind.form == "similarity",
            target_tokenizer=DECODER_TOKENIZER if (folder / DECODER_TOKENIZER).is_dir() else "",
        )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        cards[member] = model_card(summary, config, origin)
    return cards


def _data_name(section: TaskSection) -> str:
    """The task's name; without one that of the file to train on, "" without such a file."""
    if section.name != TaskSection.model_fields["name"].default:
        return section.name
    return Path(section.train).stem if section.train else ""


def _exported(run: Run, summary: dict[str, Any], *, is_best: bool) -> dict[str, Path]:
    """The folder of the exported model of each member; `is_best`: see `RunConfig.export`."""
    plan = run.plans[next(stage.name for stage in _EXPORT_ORDER if run.is_done(stage.name))]
    found = {}
    for member in plan.members:
        chosen = [best_seed(summary, plan.name, member)]
        if is_best and plan.stage is PREDICTION and run.is_done(BASELINE.name):
            chosen.append(best_seed(summary, BASELINE.name, member))
        best = max(chosen, key=lambda seed: seed.score)
        if best.stage != plan.name:
            scores = " against ".join(f"{seed.score:.4f}" for seed in reversed(chosen))
            run.log.say(f"export: {member or 'the student'} without a teacher is better, {scores}")
        found[member] = run.seed_folders(run.plans[best.stage], member)[best.index]
    return found


def describe_costs(config: RunConfig, stages: Sequence[str] = STAGE_NAMES) -> str:
    """The estimated FLOPs, memory and time of the given stages; writes nothing.

    Where `run_dir` holds another run, they are those of a new run, and a line says so.
    """
    chosen = _choose_stages(config, stages)
    with _any_folder(config) as (config, notes):
        run = read_run(config, chosen)
        parts = [*notes, _describe_task(run.task)] if run.task else notes
        plans = [run.plans[stage.name] for stage in chosen]
        return "\n\n".join([*parts, estimate.describe(run, plans)])


@contextlib.contextmanager
def _any_folder(config: RunConfig) -> Iterator[tuple[RunConfig, list[str]]]:
    """(the config, notes); with an empty run folder, and a note, where its own holds another run.

    For what only reads.
    """
    try:
        run_folder.check_usable(folder_of(config), config)
    except ValueError as error:
        with tempfile.TemporaryDirectory() as empty:
            notes = [f"tinybert run would be refused: {error}", "In a new run_dir:"]
            yield config.model_copy(update={"run_dir": empty}), notes
        return
    yield config, []


def compile_step(
    config: RunConfig,
    topology: str,
    name: str | None = None,
    *,
    num_slices: int = 1,
    is_searched: bool = False,
) -> Compiled:
    """Compiles the step of a stage for a topology (see `runs.compile`); writes nothing.

    `name`: of the stage; None: the one with the most FLOPs. `is_searched`: also finds the largest
    global batch that fits. Raises ValueError for a wrong input.
    """
    chosen = _choose_stages(config, STAGE_NAMES)
    with _any_folder(config) as (config, _):
        run = read_run(config, chosen, devices=devices_of(topology, num_slices))
        _choose_stages(config, [name] if name else STAGE_NAMES)
        plans = [run.plans[stage.name] for stage in chosen if name in (None, stage.name)]
        plan = plans[0]
        if len(plans) > 1:
            plan = max(plans, key=lambda plan: estimate.estimate_costs(run, plan).total_flops)
        training, _ = with_used_words(run, _RECIPES[plan.stage].make_training(run, plan))
        compiled = compile_stage(run, training, topology)
        if is_searched:
            compiled = compiled._replace(largest_rows=largest_batch(run, training, compiled))
        return compiled


def _choose_stages(config: RunConfig, stages: Sequence[str]) -> list[Stage]:
    chosen = [stage for stage in config.stages if stage.name in stages]
    if not chosen:
        got = [stage.name for stage in config.stages]
        raise ValueError(
            f"expected a config with one of the stages {list(stages)}, got {got}; add the section "
            "of such a stage, or run another command"
        )
    return chosen


def _describe_task(task: RunTask) -> str:
    return describe_labels(task.data, task.kind.count_labels, task.kind.unit)


def _run_once(run: Run, plan: StagePlan) -> bool:
    """Runs a stage; returns False without running it where it is done already."""
    name = plan.name
    if run.is_done(name):
        profile = "; no profile of it" if run.is_profiled else ""
        run.log.say(f"{name}: done before, kept{profile}")
        return False
    run.stop.place = f"at the start of {name}"
    run.log.enter(name)
    identity.check_finished(run)
    if identity.has_finished(run, plan):
        run.log.say(f"{name}: has finished before, but lacks a model folder; runs again")
    start = time.perf_counter()
    _RECIPES[plan.stage].main(run, plan)
    processes.on_main(f"end of {name}", lambda: identity.finish(run, plan))
    shared_folder.wait_until(lambda: run.is_done(name), name)
    seconds = time.perf_counter() - start
    run.log.write("stage", name, 0, {"seconds": seconds})
    run.log.say(f"{name}: finished in {seconds:.0f} s")
    run.saver.copy_soon()
    return True
