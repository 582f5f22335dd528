"""`gcluster job submit` of Google's Cluster Toolkit, which makes a JobSet with a Kueue queue."""

import shlex

from tinybert_jax.launch import job as jobs
from tinybert_jax.launch.job import Job
from tinybert_jax.parallel.group import LOST
from tinybert_jax.training.preemption import STOPPED

_RESTARTS = 100
_KILLED = (137, 143)  # 128 + SIGKILL and 128 + SIGTERM


def render(
    job: Job,
    *,
    cluster: str,
    location: str,
    project: str,
    queue: str | None = None,
    service_account: str | None = None,
    grace: int = 120,
) -> str:
    """A script with the one command. `grace`: seconds from SIGTERM to SIGKILL."""
    jobs.check_run_dir(job, "the pods and their disks are not kept")
    machines = job.machines
    if machines.num_hosts > 1 and not (machines.is_tpu or service_account):
        raise ValueError(
            "--service-account: expected one that may read pods, services and jobs, by which JAX "
            "finds the other pods, got none; `tinybert launch jobset` renders such an account"
        )
    options = {
        "cluster": cluster,
        "location": location,
        "project": project,
        "name": job.name,
        "queue": queue,
        "service-account": service_account,
        "image": job.container,
        "compute-type": machines.machine_type,
        "topology": machines.topology,
        "num-slices": str(machines.num_slices) if machines.num_slices > 1 else None,
        "num-nodes": None if machines.is_tpu else str(machines.num_hosts),
        "grace-period": f"{grace}s",
        "restarts": str(job.restarts(_RESTARTS)),
        "restart-on-exit-codes": ",".join(map(str, (LOST, STOPPED, *_KILLED))),
        "gke-nap-provisioning": "spot" if job.is_spot else None,
        "command": shlex.join(
            ["env", *(f"{name}={value}" for name, value in job.environment.items()), *job.words]
        ),
    }
    words = [f"--{name}={shlex.quote(value)}" for name, value in options.items() if value]
    words += [f"--mount={shlex.quote(f'{m.source}:{m.path}:rw')}" for m in job.mounts]
    comments = (
        *job.header,
        "gcluster counts a preemption as a restart, so that --restarts is high; after other exit",
        "codes than these the job ends.",
    )
    lines = ["#!/bin/bash", *(f"# {line}" for line in comments), "set -euo pipefail", ""]
    return "\n".join([*lines, " \\\n  ".join(["gcluster job submit", *words]), ""])
