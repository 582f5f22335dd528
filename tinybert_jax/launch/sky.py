"""A managed job of SkyPilot, which finds the machines in any of your clouds and replaces them."""

import shlex
from typing import Any

import yaml

from tinybert_jax.launch import job as jobs
from tinybert_jax.launch.job import IMAGE_FOLDER, Job
from tinybert_jax.performance.accelerators import Gpu
from tinybert_jax.training.preemption import STOPPED

_RESTARTS = 3


def render(job: Job, *, infra: str | None = None) -> str:
    """The YAML of the task. `infra`: a cloud, region or Kubernetes context, such as gcp."""
    _check(job)
    machines = job.machines
    accelerator = machines.accelerator
    if isinstance(accelerator, Gpu):
        chosen = f"{accelerator.sky_name}:{machines.chips_per_host}"
    else:
        chosen = f"tpu-{machines.accelerator_type}"
    resources = {
        **({"infra": infra} if infra else {}),
        "accelerators": chosen,
        "use_spot": job.is_spot,
        "image_id": f"docker:{job.container}",
        "job_recovery": {
            "max_restarts_on_errors": job.restarts(_RESTARTS),
            "recover_on_exit_codes": [STOPPED],
        },
    }
    buckets = {
        mount.path: {"source": mount.source, "mode": "MOUNT"}
        for mount in job.mounts
        if _is_bucket(mount.source)
    }
    volumes = {mount.path: mount.source for mount in job.mounts if not _is_bucket(mount.source)}
    task: dict[str, Any] = {
        "name": job.name,
        "resources": resources,
        "envs": dict(job.environment),
        **({"file_mounts": buckets} if buckets else {}),
        **({"volumes": volumes} if volumes else {}),
        "run": f"cd {IMAGE_FOLDER} && exec {shlex.join(job.words)}",
    }
    return "".join(f"# {line}\n" for line in job.header) + yaml.safe_dump(
        task, sort_keys=False, allow_unicode=True, width=1000
    )


def _is_bucket(source: str) -> bool:
    return source.startswith("gs://")


def _check(job: Job) -> None:
    jobs.check_run_dir(job, "the machines and their disks are not kept")
    if job.machines.num_hosts > 1 and not job.machines.is_tpu or job.machines.num_slices > 1:
        raise ValueError(
            f"launch sky: expected one host of GPUs or one slice of TPUs, got {job.machines}; JAX "
            "does not find SkyPilot's other nodes: use `tinybert launch slurm` or jobset"
        )
    for mount in job.mounts:
        if "://" in mount.source and not _is_bucket(mount.source):
            raise ValueError(
                "--mount: expected gs://BUCKET or the name of a volume, because a run renames "
                f"folders, got '{mount.source}'; use one of them"
            )
        if _is_bucket(mount.source) and job.machines.num_hosts > 1:
            raise ValueError(
                f"--mount: expected the name of a volume, because {job.machines.num_hosts} hosts "
                f"write to the run folder at once, got {mount.source}; use a volume"
            )
