"""`tinybert launch`: its arguments, and what it does with them.

Reads the config, so that a job that cannot run is refused before anything is written or submitted.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tinybert_jax.config import load as config_files
from tinybert_jax.launch import gcluster, jobset, sky, slurm, tpu_vm
from tinybert_jax.launch import job as jobs
from tinybert_jax.launch.job import Job
from tinybert_jax.performance import accelerators


class Launcher(NamedTuple):
    """One kind of cluster. `add` adds the options that only `render` knows."""

    text: str
    add: Callable[[argparse.ArgumentParser], None]
    render: Callable[[Job, argparse.Namespace], str]
    suffix: str  # of the rendered file
    submit: tuple[str, ...]  # the program that takes the file as its last argument
    needs: str  # the program that the file itself calls


def add_to(commands: Any) -> None:
    """Adds `launch` to the commands of the parser; its action is `launch`."""
    text = "render the job file of a config for a cluster; --submit hands it over"
    kinds = commands.add_parser("launch", help=text, description=text).add_subparsers(
        dest="launcher", required=True, metavar="cluster"
    )
    for name, launcher in LAUNCHERS.items():
        command = kinds.add_parser(name, help=launcher.text, description=launcher.text)
        _add_common(command)
        launcher.add(command)
        command.set_defaults(act=launch)


def launch(arguments: argparse.Namespace, typed: str) -> int:
    """Renders the file of a job; prints it, writes it (-o) and submits it (--submit)."""
    launcher = LAUNCHERS[arguments.launcher]
    job = _job(arguments, typed)
    text = launcher.render(job, arguments)
    output = Path(arguments.output).expanduser() if arguments.output else None
    if output and (output.is_dir() or not output.parent.is_dir()):
        raise ValueError(
            f"-o: expected the name of a file in a folder that exists, got {output}; create the "
            "folder, or choose another name"
        )
    programs = {launcher.submit[0], launcher.needs} if arguments.submit else set()
    for program in sorted(programs):
        if not shutil.which(program):
            raise ValueError(
                f"--submit: expected the program {program} on PATH, got none; install it, or "
                "render with -o and submit the file elsewhere"
            )
    if arguments.submit if arguments.compile is None else arguments.compile:
        status = _compile_first(job, is_asked=bool(arguments.compile))
        if status:
            return status
    if output:
        output.write_text(text, encoding="utf-8")
    elif not arguments.submit:
        print(text, end="")
    if not arguments.submit:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = output or Path(folder) / f"job{launcher.suffix}"
        path.write_text(text, encoding="utf-8")
        return subprocess.run([*launcher.submit, str(path)], check=False).returncode


def _compile_first(job: Job, *, is_asked: bool) -> int:
    """Compiles the step of each stage for TPUs; returns 3 where one does not fit, otherwise 0.

    What hinders it is told; where it was asked for, the status is then 2.
    """
    if not job.machines.is_tpu:
        hindrance = "the programs of GPUs are compiled where a GPU is"
    elif not importlib.util.find_spec("libtpu"):
        hindrance = "it needs the package libtpu: `pip install 'tinybert-jax[tpu]'`"
    else:
        for stage in job.stages:
            status = _compile_stage(job, stage)
            if status == 3:
                return 3
            if status:
                break
        else:
            return 0
        hindrance = "of the message above"
    if is_asked:
        raise ValueError(
            f"--compile: expected a step that can be compiled here, got none: {hindrance}; leave "
            "out --compile"
        )
    print(f"the step is not compiled before it is submitted: {hindrance}", file=sys.stderr)
    return 0


def _compile_stage(job: Job, stage: str) -> int:
    """The status of `tinybert compile` for a stage of the job."""
    config, *overrides = job.words[2:]
    topology = f"{job.machines.name}:{job.machines.topology}"
    words = ["compile", config, *overrides, "--topology", topology, "--stage", stage]
    if job.machines.num_slices > 1:
        words += ["--slices", str(job.machines.num_slices)]
    print(f"compiles the step of {stage} first: tinybert {' '.join(words)}", file=sys.stderr)
    return subprocess.run(
        [sys.executable, "-m", "tinybert_jax", *words],
        stdout=sys.stderr,
        env={**os.environ, **job.chosen},
        check=False,
    ).returncode


def _job(arguments: argparse.Namespace, typed: str) -> Job:
    """The job that the arguments describe; ValueError where it could not run."""
    machines = accelerators.read(arguments.accelerator, arguments.slices, arguments.gpus_per_host)
    overrides = list(arguments.overrides)
    if arguments.run_dir:
        overrides.append(f"run_dir={arguments.run_dir}")
    chosen = jobs.read_environment(arguments.env)
    mounts = jobs.read_mounts(arguments.mount)
    for name in config_files.variables(arguments.config, overrides):
        if name in os.environ and name not in chosen:
            chosen[name] = os.environ[name]
            # Apptainer shows a container the home, the working folder and /tmp of the node.
            if arguments.image and getattr(arguments, "form", None) != "apptainer":
                jobs.check_seen(name, chosen[name], mounts)
    with _environment(chosen):
        settings = config_files.load(arguments.config, overrides)
    num_parts = jobs.check_mesh(settings.mesh, machines)
    for plan in settings.plans.values():
        for part in plan.section.parts():
            path = f"{plan.name}.{part.key}global_batch_size"
            steps = plan.section.gradient_accumulation_steps
            jobs.check_batch(path, part.section.global_batch_size, num_parts * steps, machines)
    cache = arguments.cache or str(PurePosixPath(settings.run_dir).parent / "compile-cache")
    return Job(
        name=jobs.check_name(arguments.name or _name(arguments.config)),
        words=("tinybert", arguments.command_name, arguments.config, *overrides),
        machines=machines,
        environment=jobs.environment(machines, cache, chosen),
        chosen=chosen,
        run_dir=settings.run_dir,
        run_store=settings.run_store,
        origin=typed,
        image=arguments.image,
        mounts=mounts,
        stages=tuple(settings.plans),
        max_restarts=arguments.max_restarts,
        is_spot=arguments.spot,
    )


def _name(config: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", Path(config).stem.lower()).strip("-")


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that a config refers to, for as long as it is read."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", help="a YAML file, at the same path where the job runs")
    command.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="change one setting"
    )
    option = command.add_argument
    option("--accelerator", required=True, metavar="NAME:SHAPE", help="v5e:4x4, h100:16, …")
    option("--slices", type=int, default=1, help="slices of TPUs of this shape; default: 1")
    option("--gpus-per-host", type=int, help="default: 8")
    option(
        "--command",
        dest="command_name",
        default="run",
        choices=("run", "pretrain", "finetune", "distill"),
        help="the command of the job; default: run",
    )
    option("--name", help="name of the job; default: the name of the config file")
    option("--image", help="container image, such as one of launch/Dockerfile")
    option("--run-dir", help="run_dir of the job, on storage that all hosts share")
    option("--cache", help="folder of compiled programs; default: compile-cache beside run_dir")
    option(
        "--mount",
        action="append",
        default=[],
        metavar="SOURCE:/PATH",
        help="shared storage; SOURCE is a claim, volume, bucket, NFS export or folder",
    )
    option(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the job; those that the config names are taken from here",
    )
    option("--max-restarts", type=int, help="restarts after failures")
    option("--spot", action="store_true", help="machines that may be taken away")
    option("-o", "--output", metavar="FILE", help="write to this file; default: standard output")
    option("--submit", action="store_true", help="submit the job too")
    option(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the step for the TPUs first and refuse what does not fit, in minutes; "
        "default: with --submit, where libtpu is installed and the config's inputs are here",
    )


def _add_slurm(command: argparse.ArgumentParser) -> None:
    option = command.add_argument
    option("--form", choices=("bare", "apptainer", "pyxis"), default="bare", help="default: bare")
    option("--tasks-per", choices=("node", "gpu"), default="node", help="default: node")
    option("--time", default="24:00:00", help="time limit; default: 24:00:00")
    option("--venv", metavar="FOLDER", help="the environment that has tinybert; default: PATH")
    option(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further option of sbatch, as in --sbatch=--partition=gpu",
    )


def _add_jobset(command: argparse.ArgumentParser) -> None:
    command.add_argument("--queue", help="a LocalQueue of Kueue")
    command.add_argument("--namespace", default="default", help="default: default")
    _add_grace(command)


def _add_grace(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--grace",
        type=int,
        default=120,
        help="seconds that a stopped pod has to save; GKE gives 15 on Spot machines",
    )


def _add_gcluster(command: argparse.ArgumentParser) -> None:
    command.add_argument("--cluster", required=True, help="name of the GKE cluster")
    command.add_argument("--location", required=True, help="its region or zone")
    command.add_argument("--project", required=True, help="the Google Cloud project")
    command.add_argument("--queue", help="a LocalQueue of Kueue; default: the cluster's own")
    command.add_argument("--service-account", help="of the pods; several hosts of GPUs need one")
    _add_grace(command)


def _add_tpu_vm(command: argparse.ArgumentParser) -> None:
    command.add_argument("--project", required=True, help="the Google Cloud project")
    command.add_argument("--zone", required=True, help="a zone, such as us-east5-a")


def _add_sky(command: argparse.ArgumentParser) -> None:
    command.add_argument("--infra", help="a cloud, region or Kubernetes context; default: any")


LAUNCHERS = {
    "slurm": Launcher(
        "a batch script for SLURM: GPUs",
        _add_slurm,
        lambda job, given: slurm.render(
            job,
            form=given.form,
            tasks_per=given.tasks_per,
            time=given.time,
            venv=given.venv,
            options=given.sbatch,
        ),
        suffix=".sbatch",
        submit=("sbatch",),
        needs="sbatch",
    ),
    "jobset": Launcher(
        "a JobSet for Kubernetes: TPUs and GPUs",
        _add_jobset,
        lambda job, given: jobset.render(
            job, queue=given.queue, namespace=given.namespace, grace=given.grace
        ),
        suffix=".yaml",
        submit=("kubectl", "create", "-f"),
        needs="kubectl",
    ),
    "gcluster": Launcher(
        "`gcluster job submit` of Google's Cluster Toolkit: TPUs and GPUs",
        _add_gcluster,
        lambda job, given: gcluster.render(
            job,
            cluster=given.cluster,
            location=given.location,
            project=given.project,
            queue=given.queue,
            service_account=given.service_account,
            grace=given.grace,
        ),
        suffix=".sh",
        submit=("bash",),
        needs="gcluster",
    ),
    "tpu-vm": Launcher(
        "TPU VMs of Google Cloud, by gcloud",
        _add_tpu_vm,
        lambda job, given: tpu_vm.render(job, project=given.project, zone=given.zone),
        suffix=".sh",
        submit=("bash",),
        needs="gcloud",
    ),
    "sky": Launcher(
        "a managed job of SkyPilot: one host of GPUs, or a slice of TPUs",
        _add_sky,
        lambda job, given: sky.render(job, infra=given.infra),
        suffix=".yaml",
        submit=("sky", "jobs", "launch", "--yes"),
        needs="sky",
    ),
}
