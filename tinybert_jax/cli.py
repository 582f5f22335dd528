"""The `tinybert` command line.

Parses the arguments. A command imports JAX and transformers only when it runs, so that `--help` is
fast.
"""

import argparse
import contextlib
import functools
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from tinybert_jax import __version__
from tinybert_jax.config import command as config_command
from tinybert_jax.config import load as config_files
from tinybert_jax.config.run import RunConfig
from tinybert_jax.config.stages import STAGE_NAMES
from tinybert_jax.data.errors import GateError, LostWorkerError
from tinybert_jax.huggingface import command as huggingface
from tinybert_jax.inference import command as inference
from tinybert_jax.launch import command as launch
from tinybert_jax.parallel import processes
from tinybert_jax.parallel.group import LOST, LostProcessError
from tinybert_jax.performance import host
from tinybert_jax.recipes import data
from tinybert_jax.report import command as report
from tinybert_jax.report.console import printable
from tinybert_jax.runs import command as runs
from tinybert_jax.training import preemption

_STAGES = {
    "run": (STAGE_NAMES, "run all stages of a config, or of --data TABLE, then export and report"),
    "pretrain": (("pretrain",), "run only the masked-LM stage of a config"),
    "finetune": (("finetune", "baseline"), "run only the supervised stages of a config"),
    "distill": (
        ("general", "intermediate", "prediction"),
        "run only the distillation stages of a config",
    ),
}

_OVERWRITE = "remove the earlier run in run_dir first; refused where other files are there"
_DRY_RUN = "print FLOPs, memory and time of each stage and stop"
# The options of a run on a table, in place of a config.
_TABLE = {
    "data": "in place of a config, labelled text: a .csv, .tsv, .jsonl file, or as task.train",
    "teacher": "a BERT folder or hub id",
    "text": "column of the text",
    "text_pair": "column of a second text",
    "label": "column of the labels",
    "task": "classification, regression, multi_label, tagging or question_answering",
}
_TOLD = (
    ValueError,
    FloatingPointError,
    OSError,
    LostWorkerError,
    LostProcessError,
    preemption.Stopped,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status, one of `preemption.STATUSES`.

    128 + SIGPIPE: the reader of standard output has closed the pipe, as `head` does.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parse(argv)
    try:
        return processes.leave(*_act(arguments, shlex.join(["tinybert", *argv])))
    except Exception as error:
        if processes.count() > 1:  # Python itself would wait for the other processes
            traceback.print_exc()
            processes.leave(1, f"{type(error).__name__}: {error}")
        raise


def _act(arguments: argparse.Namespace, typed: str) -> tuple[int, str]:
    """Runs a command; returns the exit status, and the message of an error."""
    # Without this, transformers warns that PyTorch is missing. No command needs PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        status = arguments.act(arguments, typed) or 0
        sys.stdout.flush()
        return status, ""
    except KeyboardInterrupt:
        print("tinybert: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT, "interrupted"
    except Exception as raised:
        if isinstance(raised, BrokenPipeError) and host.is_output_closed():
            return 128 + signal.SIGPIPE, str(raised)
        error = host.explain_missing_device(processes.explained(raised))
        if not isinstance(error, _TOLD):
            raise
        return _report(error), str(error)


def _report(error: Exception) -> int:
    """Prints the message of an error and returns the exit status.

    Of several processes that have stopped as they agreed, one says so.
    """
    if processes.is_main() or not isinstance(error, preemption.Stopped):
        preemption.say(error)
    statuses = {
        preemption.Stopped: preemption.STOPPED,
        GateError: 3,
        LostWorkerError: 4,
        LostProcessError: LOST,
        FloatingPointError: 5,
    }
    return statuses.get(type(error), 2)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses `argv`; every `key.path=value` is an override, also after an option.

    argparse itself accepts positional arguments only in one unbroken sequence.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or rest and "overrides" not in arguments:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinybert",
        description="Compact Transformers on JAX: tinybert run --data TABLE --teacher FOLDER",
        epilog=preemption.STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tinybert_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, text) in _STAGES.items():
        command = commands.add_parser(name, help=text, description=text)
        _add_config(command, "configs/quickstart.yaml", is_optional=name == "run")
        if name == "run":
            _add_table(command)
        either = command.add_mutually_exclusive_group()
        either.add_argument("--dry-run", action="store_true", help=_DRY_RUN)
        either.add_argument(
            "--profile",
            action="store_true",
            help="trace a few steps of each stage; write a table of operations to run_dir/profile",
        )
        either.add_argument(
            "--from-step",
            metavar="STAGE:STEP",
            help="train a stage again from an older step, as after it has diverged; its settings "
            "may differ, such as finetune.learning_rate=1e-5",
        )
        either.add_argument("--overwrite", action="store_true", help=_OVERWRITE)
        _add_plain(command)
        _add_processes(command)
        command.set_defaults(act=_run)
    inference.add_to(commands)
    report.add_to(commands)
    _add_compile(commands)
    _add_update(commands)
    huggingface.add_to(commands)
    runs.add_to(commands)
    config_command.add_to(commands)
    data.add_to(commands, _add_config)
    launch.add_to(commands)
    _add_completion(commands)
    return parser


def _add_config(command, example: str, *, is_optional: bool = False) -> None:
    command.add_argument(
        "config", help=f"a YAML file, such as {example}", nargs="?" if is_optional else None
    )
    command.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="change one setting"
    )
    command.add_argument(
        "--print-config", action="store_true", help="print the resolved config and stop"
    )


def _add_plain(command) -> None:
    command.add_argument(
        "--plain", action="store_true", help="print lines on a terminal too, as in a pipe"
    )


def _add_processes(command) -> None:
    group = command.add_argument_group(
        "several processes",
        "found in the environment under SLURM, Kubernetes, Cloud TPU and Open MPI",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num-processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")


def _add_compile(commands) -> None:
    text = (
        "compile the step of a stage for TPUs or GPUs that need not be here: memory, collectives, "
        "FLOPs and an estimate of the time; status 3 where it does not fit"
    )
    command = commands.add_parser("compile", help=text, description=text)
    _add_config(command, "configs/quickstart.yaml")
    command.add_argument(
        "--topology", required=True, help="such as v5e:4x4 or h200:8; local: the devices here"
    )
    command.add_argument(
        "--slices", type=int, default=1, help="slices of that topology; default: 1"
    )
    command.add_argument(
        "--stage", choices=STAGE_NAMES, help="default: the stage with the most FLOPs"
    )
    command.add_argument("--json", action="store_true", help="print a JSON object")
    command.add_argument(
        "--largest-batch", action="store_true", help="also find the largest batch that fits"
    )
    command.set_defaults(act=_compile)


def _add_table(command) -> None:
    table = command.add_argument_group(
        "without a config", "the recipe of configs/own-text.yaml; what is not given is guessed"
    )
    for name, text in _TABLE.items():
        table.add_argument(f"--{name.replace('_', '-')}", help=text)


def _add_update(commands) -> None:
    text = "train a classifier on new rows, with old ones; status 3 where it breaks too much"
    command = commands.add_parser("update", help=text, description=text)
    command.add_argument("model", help="a model folder or hub id; it is not changed")
    command.add_argument("data", help="new labelled rows, maybe with new labels")
    command.add_argument("--old", required=True, help="rows that the model was trained on")
    for name in ("text", "text_pair", "label"):
        command.add_argument(f"--{name.replace('_', '-')}", help=_TABLE[name])
    inference.add_max_regressions(command)
    command.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="change one setting"
    )
    command.add_argument("--print-config", action="store_true", help="print the config and stop")
    command.add_argument("--dry-run", action="store_true", help=_DRY_RUN)
    _add_plain(command)
    command.add_argument("--overwrite", action="store_true", help=_OVERWRITE)
    command.set_defaults(act=_run, profile=False, from_step=None)


def _add_completion(commands) -> None:
    text = "print a script that completes the commands in a shell (extra completion)"
    command = commands.add_parser("completion", help=text, description=text)
    command.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")
    command.set_defaults(act=_completion)


def _measure(draft):
    from tinybert_jax.recipes import by_rows

    return by_rows.measure(draft)


def _tell(line: str) -> None:
    if processes.is_main():
        print(printable(line), file=sys.stderr)


def _compile(arguments, command: str) -> int:
    is_local = arguments.topology == "local"
    if not is_local:
        os.environ["JAX_PLATFORMS"] = "cpu"  # the devices to compile for are not here
    from tinybert_jax.recipes import by_rows, pipeline
    from tinybert_jax.runs import compile

    platform = None if is_local else "tpu"  # as a GPU's: only a CPU differs
    measure = functools.partial(by_rows.measure, platform=platform)
    settings = config_files.load(arguments.config, arguments.overrides, measure, _tell)
    if arguments.print_config:
        print(config_files.dump(settings), end="")
        return 0
    with contextlib.redirect_stdout(sys.stderr):  # JSON alone on standard output
        compiled = pipeline.compile_step(
            settings,
            arguments.topology,
            arguments.stage,
            num_slices=arguments.slices,
            is_searched=arguments.largest_batch,
        )
    if arguments.json:
        print(json.dumps(compile.to_json(compiled), indent=2))
    else:
        print(printable(compile.describe(compiled)))
    return 3 if compiled.problems else 0


def _run(arguments, command: str) -> int:
    host.keep_freed_memory()  # before `_measure`, which imports JAX
    if not arguments.print_config and arguments.command != "update":  # that has one process
        processes.start(arguments.coordinator, arguments.num_processes, arguments.process_id)
    settings = _settings(arguments)
    stages = _STAGES.get(arguments.command, (STAGE_NAMES,))[0]
    if arguments.print_config:
        print(config_files.dump(settings), end="")
        return 0
    with preemption.handled(command, _report) as stop:
        from tinybert_jax.recipes import pipeline

        if arguments.dry_run:
            costs = pipeline.describe_costs(settings, stages)
            if processes.is_main():
                print(printable(costs))
        else:
            options = {"is_profiled": arguments.profile, "from_step": arguments.from_step}
            options["is_live"] = not arguments.plain
            options["is_overwritten"] = arguments.overwrite
            pipeline.main(settings, stages, command, **options, stop=stop)
    return 0


def _settings(arguments):
    """The config of a run, from a YAML file or from a table."""
    if arguments.command == "update":
        from tinybert_jax.recipes import from_table

        names = ("model", "data", "old", "text", "text_pair", "label", "max_regressions")
        given = {name: getattr(arguments, name) for name in names}
        tree = from_table.make_update_tree(**given, overrides=arguments.overrides, say=_tell)
        return config_files.validate(RunConfig, tree, "command line")
    # argparse takes the first setting for the config, or a config after an option for a setting.
    words = [word for word in (arguments.config, *arguments.overrides) if word is not None]
    table: dict[str, Any] = {name: getattr(arguments, name, None) for name in _TABLE}
    if table["data"] is not None:
        from tinybert_jax.recipes import from_table

        configs = [w for w in words if "=" not in w and w.lower().endswith((".yaml", ".yml"))]
        if configs:
            raise ValueError(
                f"expected a config, or --data with a table, got {configs[0]} and --data "
                f"{table['data']}; give one of them"
            )
        tree = from_table.make_tree(**table, overrides=words, say=_tell)
        return config_files.complete(tree, "command line", _measure, _tell)
    given = [f"--{name.replace('_', '-')} alone" for name in table if table[name] is not None]
    if given or not words:
        got = (given or ["neither"])[0]
        raise ValueError(f"expected a config, or --data with a table, got {got}; give one of them")
    return config_files.load(words[0], words[1:], _measure, _tell)


def _completion(arguments, command: str) -> int:
    try:
        import shtab
    except ImportError:
        raise ValueError(
            "completion: expected the package shtab, found none; "
            "pip install 'tinybert-jax[completion]'"
        ) from None
    parser = _parser()
    for own in _parsers(parser):
        for action in own._actions:
            if action.choices is None and action.nargs != 0 and action.type not in (int, float):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=arguments.shell))
    return 0


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser, and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _parsers(child)
