"""One job: the `tinybert` command, its environment and the checks that need no cluster.

Renders nothing; the files of the launchers do.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from tinybert_jax.config.compute import MeshSection
from tinybert_jax.performance.accelerators import Machines

WRONG_INPUT = 2  # the exit code for which running again is of no use
# The working folder in the images of launch/Dockerfile, which have configs/ there.
IMAGE_FOLDER = "/workspace"


class Mount(NamedTuple):
    """Shared storage, and the folder of the job where it appears."""

    source: str
    path: str


class Job(NamedTuple):
    """What every launcher renders."""

    name: str
    words: tuple[str, ...]  # the command: tinybert run CONFIG key.path=value …
    machines: Machines
    environment: Mapping[str, str]
    chosen: Mapping[str, str]  # the variables of `environment` that the config names, or --env
    run_dir: str
    run_store: str | None  # the URL that the run folder is copied to
    origin: str  # the `tinybert launch` command
    image: str | None = None
    mounts: tuple[Mount, ...] = ()
    stages: tuple[str, ...] = ()  # of the config, in their order
    max_restarts: int | None = None  # after failures; None: the launcher's own number
    is_spot: bool = False

    @property
    def header(self) -> tuple[str, ...]:
        """Lines of comment, without their mark, that say what a rendered file is."""
        return (
            f"Rendered by: {' '.join(self.origin.splitlines())}",
            f"Machines: {self.machines}.",
        )

    @property
    def container(self) -> str:
        """The image; ValueError where none was given."""
        if not self.image:
            raise ValueError(
                "--image: expected the container image to run, got none; build one with "
                "launch/Dockerfile and give its name"
            )
        return self.image

    def restarts(self, default: int) -> int:
        return default if self.max_restarts is None else self.max_restarts


def check_name(name: str) -> str:
    """The name; ValueError where Kubernetes or gcluster would refuse it, or a name made of it."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,26}[a-z0-9])?", name):
        raise ValueError(
            "--name: expected at most 28 small letters, digits and -, beginning with a letter, got "
            f"'{name}'; give another name"
        )
    return name


def read_mounts(texts: Sequence[str]) -> tuple[Mount, ...]:
    """The mounts for SOURCE:/PATH; ValueError where one of them is something else."""
    mounts = []
    for text in texts:
        source, _, path = text.rpartition(":")
        if not source or not path.startswith("/"):
            raise ValueError(
                f"--mount: expected SOURCE:/PATH, got '{text}'; write it as data-claim:/data"
            )
        if PurePosixPath(IMAGE_FOLDER).is_relative_to(path):
            raise ValueError(
                f"--mount: expected a folder that does not hide {IMAGE_FOLDER} of the image, got "
                f"{path}; write it as {source}:{IMAGE_FOLDER}/runs"
            )
        mounts.append(Mount(source, path))
    return tuple(mounts)


def check_no_buckets(mounts: Sequence[Mount], kinds: str) -> None:
    """ValueError where a mount is a bucket, on a cluster that mounts only `kinds`."""
    for mount in mounts:
        if "://" in mount.source:
            raise ValueError(
                f"--mount: expected {kinds}, got {mount.source}; mount such, and keep the run in "
                "the bucket with run_store=gs://BUCKET/RUN"
            )


def check_seen(name: str, value: str, mounts: Sequence[Mount]) -> None:
    """ValueError where a variable of this machine is a path that a container does not see."""
    path, seen = PurePosixPath(value), [IMAGE_FOLDER, *(mount.path for mount in mounts)]
    if path.is_absolute() and not any(path.is_relative_to(folder) for folder in seen):
        raise ValueError(
            f"--env: expected {name} as the container sees it, got {value}, which is of this "
            f"machine and in no --mount; give --env {name}=/DATA/…, and --mount for that folder"
        )


def read_environment(texts: Sequence[str]) -> dict[str, str]:
    """The variables for NAME=VALUE; ValueError where one of them is something else."""
    pairs = [text.partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(
                f"--env: expected NAME=VALUE, got '{name}{equals}'; write it as TEACHER=/data/bert"
            )
    return {name: value for name, _, value in pairs}


def environment(machines: Machines, cache: str, chosen: Mapping[str, str]) -> dict[str, str]:
    """The variables of the job: those worth setting on these machines, then the `chosen` ones.

    The platform is named so that a job without its driver fails instead of training on the CPU.
    The GPU settings are those of JAX's guides on GPU performance and GPU memory. TPUs get no
    flags: libtpu's defaults already overlap collectives with computation.
    """
    platform = "tpu" if machines.is_tpu else "cuda"
    values = {
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": f"{platform},cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,
    }
    if not machines.is_tpu:
        values["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.9"
        if machines.num_chips > 1:
            values["XLA_FLAGS"] = "--xla_gpu_enable_latency_hiding_scheduler=true"
    return {**values, **chosen}


def exports(values: Mapping[str, str]) -> list[str]:
    """Lines of a shell script that set the variables."""
    return [f"export {name}={shlex.quote(value)}" for name, value in values.items()]


def check_mesh(mesh: MeshSection, machines: Machines) -> int:
    """The number of devices that split a batch; ValueError for a mesh of another size."""
    inner, num_chips = mesh.fsdp * mesh.tensor, machines.num_chips
    data = num_chips // inner if mesh.data == -1 else mesh.data
    if data * inner != num_chips:
        raise ValueError(
            f"mesh: expected data × fsdp × tensor = {num_chips} ({machines}), got {mesh.data} × "
            f"{mesh.fsdp} × {mesh.tensor}; set mesh.data=-1, and the others to divisors of "
            f"{num_chips}"
        )
    return data * mesh.fsdp


def check_batch(path: str, size: int, num_parts: int, machines: Machines) -> None:
    """ValueError where a global batch is not a multiple of the parts that it is split into."""
    if size % num_parts:
        nearest = num_parts * max(1, round(size / num_parts))
        raise ValueError(
            f"{path}: expected a multiple of {num_parts} (parts of a batch on {machines}), got "
            f"{size}; set {path}={nearest}, or take fewer chips"
        )


_OF_THE_HOST = ("file", "local", "memory")  # stores of fsspec that end with the container


def check_run_dir(job: Job, why: str) -> None:
    """ValueError where the run folder of a container is not in one of the mounts.

    A single host may keep it on its own disk where `run_store` has a copy elsewhere.
    """
    protocol, has_protocol, _ = (job.run_store or "").partition("://")
    if has_protocol and protocol not in _OF_THE_HOST and job.machines.num_hosts == 1:
        return
    folder = PurePosixPath(IMAGE_FOLDER, job.run_dir)
    is_below = any(folder.is_relative_to(mount.path) for mount in job.mounts)
    if job.run_dir.startswith("~") or ".." in folder.parts or not is_below:
        given = ", ".join(mount.path for mount in job.mounts) or "no --mount"
        alone = " (one host needs none with run_store=gs://BUCKET/RUN)"
        raise ValueError(
            f"run_dir: expected a folder in a --mount, because {why}, got {folder} and {given}; "
            f"give --mount SOURCE:{IMAGE_FOLDER}/runs, or --run-dir with a folder in a mount"
            f"{alone if job.machines.num_hosts == 1 else ''}"
        )


_OF_ONE_NODE = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/local", "/scratch/local")


def check_shared_run_dir(run_dir: str) -> None:
    """ValueError where the run folder is of one node, by its name."""
    folder = PurePosixPath(run_dir)
    if any(folder.is_relative_to(root) for root in _OF_ONE_NODE):
        raise ValueError(
            "run_dir: expected a folder that every node sees, because all processes write their "
            f"part there and a requeued job may start on other nodes, got {run_dir}; give "
            "--run-dir with a folder of the shared file system"
        )


def check_launcher(machines: Machines, launcher: str, kind: str, instead: str) -> None:
    """ValueError where the launcher is not for this kind of accelerator ("TPUs" or "GPUs")."""
    if machines.is_tpu != (kind == "TPUs"):
        raise ValueError(
            f"launch {launcher}: expected {kind}, got {machines.name}; use "
            f"`tinybert launch {instead}`"
        )
