"""Batch scripts for SLURM: whole nodes of GPUs, bare or in a container.

JAX finds the processes of a job by itself, from the variables that `srun` sets.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Literal

from tinybert_jax.launch import job as jobs
from tinybert_jax.launch.job import IMAGE_FOLDER, Job
from tinybert_jax.parallel.group import LOST
from tinybert_jax.training.preemption import STOPPED

Form = Literal["bare", "apptainer", "pyxis"]
_RESTARTS = 3  # of a job that has lost a process
_SECONDS_TO_STOP = 120  # between the signal and the time limit


def render(
    job: Job,
    *,
    form: Form = "bare",
    tasks_per: Literal["node", "gpu"] = "node",
    time: str = "24:00:00",
    venv: str | None = None,
    options: Sequence[str] = (),
) -> str:
    """The batch script. `options`: further lines of #SBATCH, such as --partition=gpu."""
    jobs.check_launcher(job.machines, "slurm", "GPUs", "jobset")
    _check(job, form, time, venv, options)
    values = _environment(job, tasks_per)
    command = [_SRUN, *_container(job, form, values), _command(job, venv)]
    lines = [
        "#!/bin/bash",
        *(f"# {line}" for line in job.header),
        *_directives(job, tasks_per, time, options),
        "",
        *jobs.exports(values),
        _BODY.format(
            srun=" \\\n  ".join(command),
            stopped=STOPPED,
            lost=LOST,
            restarts=job.restarts(_RESTARTS),
        ),
    ]
    return "\n".join(lines)


# A task that ends must not take the others with it, as they may still be writing: --wait bounds
# what is left. The tasks of a node share its cores.
_SRUN = f"srun --kill-on-bad-exit=0 --wait={_SECONDS_TO_STOP} --cpu-bind=none"
# `wait` returns as soon as a signal is trapped; only after a `wait` without one is its status
# that of srun. srun passes both signals on to every task.
_BODY = """
step=
trap 'signalled=yes; [ -z "$step" ] || kill -s USR1 "$step"' USR1
trap 'signalled=yes; [ -z "$step" ] || kill -s TERM "$step"' TERM

{srun} &
step=$!
signalled=yes
while [ -n "$signalled" ]; do
  signalled=
  wait "$step"
  status=$?
done
step=

# {stopped}: the run was stopped and has saved its state; the same job goes on with it.
# {lost}, 137: a process was lost or killed; it goes on from the last checkpoint, {restarts} times.
losses="$SLURM_JOB_ID.losses"
case "$status" in
  {stopped}) scontrol requeue "$SLURM_JOB_ID" ;;
  {lost} | 137)
    echo "$status" >>"$losses"
    if [ "$(wc -l <"$losses")" -le {restarts} ]; then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$status"
"""


def _directives(job: Job, tasks_per: str, time: str, options: Sequence[str]) -> list[str]:
    machines = job.machines
    share = ("--exclusive", "--mem=0") if machines.has_whole_hosts else ("--cpus-per-gpu=8",)
    values = [
        f"--job-name={job.name}",
        f"--nodes={machines.num_hosts}",
        f"--ntasks-per-node={machines.chips_per_host if tasks_per == 'gpu' else 1}",
        f"--gpus-per-node={machines.chips_per_host}",
        *share,
        f"--time={time}",
        f"--signal=B:USR1@{_SECONDS_TO_STOP}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.log",
        *options,
    ]
    return [f"#SBATCH {value}" for value in values]


def _environment(job: Job, tasks_per: str) -> dict[str, str]:
    """With one task a node JAX would take one GPU of the node: the variable names all of them."""
    values = dict(job.environment)
    if tasks_per == "node":
        values["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(job.machines.chips_per_host)))
    return values


def _container(job: Job, form: Form, values: Mapping[str, str]) -> list[str]:
    """Lines between `srun` and the command of the job."""
    mounts = ",".join(f"{mount.source}:{mount.path}" for mount in job.mounts)
    if form == "apptainer":
        bind = [f"--bind={mounts}"] if mounts else []
        return [shlex.join(["apptainer", "exec", "--nv", *bind, job.container])]
    if form == "pyxis":
        options = [
            f"--container-image={job.container}",
            f"--container-mounts={mounts}",
            f"--container-env={','.join(values)}",  # before the image's own values
            f"--container-workdir={IMAGE_FOLDER}",
            "--no-container-mount-home",
        ]
        return [shlex.quote(option) for option in options]
    return []


def _command(job: Job, venv: str | None) -> str:
    program, *rest = job.words
    return shlex.join([f"{venv.rstrip('/')}/bin/{program}" if venv else program, *rest])


def _check(job: Job, form: Form, time: str, venv: str | None, options: Sequence[str]) -> None:
    if form == "pyxis":
        jobs.check_run_dir(job, "pyxis shows a container nothing else")
    jobs.check_shared_run_dir(job.run_dir)
    jobs.check_no_buckets(job.mounts, "a folder of the nodes")
    if form == "bare" and (job.image or job.mounts):
        raise ValueError(
            f"--form: expected apptainer or pyxis for --image and --mount, got bare with "
            f"{job.image or job.mounts[0].path}; give --form, or remove them"
        )
    if form != "bare" and venv:
        raise ValueError(f"--venv: expected none with --form {form}, got {venv}; remove it")
    if job.is_spot:
        raise ValueError(
            "expected no --spot for SLURM, got it; the partition says which nodes may be taken "
            "away: give --sbatch=--partition=NAME"
        )
    if not re.fullmatch(r"(\d+-)?\d{1,3}:\d{2}:\d{2}", time):
        raise ValueError(f"--time: expected [DAYS-]HH:MM:SS, got '{time}'; write it as 24:00:00")
    for option in options:
        if not re.fullmatch(r"--?[a-zA-Z][^\n]*", option):
            raise ValueError(
                f"--sbatch: expected one option of sbatch, got '{option}'; write it as "
                "--sbatch=--partition=gpu"
            )
