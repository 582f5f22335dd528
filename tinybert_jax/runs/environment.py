"""What a run folder says of the run and its machine, and the peak of the machine."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinybert_jax.parallel import processes
from tinybert_jax.parallel.mesh import platform_of
from tinybert_jax.performance import disk
from tinybert_jax.performance.device_peaks import measure_gemm_peak, peak_flops
from tinybert_jax.performance.program_cache import programs_folder

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


def write(folder: Path, config: str, mesh: Mesh) -> None:
    """Writes `config.yaml` and `env.json`: versions, devices, commit and start time."""
    earlier = _earlier_environments(folder / "env.json")
    disk.replace_text(folder / "config.yaml", config)
    environment: dict[str, Any] = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tinybert-jax": _package_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_kind(mesh),
        "num_devices": jax.device_count(),
        "num_processes": processes.count(),
        "mesh": " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "program_cache": programs_folder(),
        "git_commit": _git_commit(),
        "earlier": earlier,
    }
    disk.replace_text(folder / "env.json", json.dumps(environment, indent=2) + "\n")


def _earlier_environments(file: Path) -> list[dict[str, Any]]:
    """The environment of every earlier process of this run, oldest first."""
    if not file.is_file():
        return []
    try:
        last = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        last = error
    if not isinstance(last, dict):
        raise ValueError(
            f"{file}: expected the JSON object that an earlier process wrote, got {last}; delete "
            "the file: it holds only a record of earlier machines"
        )
    return [*last.pop("earlier", []), last]


def _package_version() -> str:
    try:
        return importlib.metadata.version("tinybert-jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # the package runs from a checkout


def _git_commit() -> str:
    """The commit of the checkout that holds this file; 'none' for an installed package."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Fails where this file lies inside the checkout of another project.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def device_kind(mesh: Mesh) -> str:
    """The model of the devices that the run's programs are for."""
    return mesh.devices.flat[0].device_kind


def all_peak_flops(dtype: str, mesh: Mesh) -> float:
    """Peak FLOP/s of all devices together; NaN for an unknown accelerator.

    CPU devices share one processor, whose peak is measured.
    """
    dtype = dtype.removesuffix("_products")
    if platform_of(mesh) == "cpu":
        return measure_gemm_peak(dtype)
    return (peak_flops(device_kind(mesh), dtype) or np.nan) * mesh.size


def float8_note(dtype: str, backend: str) -> str:
    """Why float8 products of a teacher buy nothing on a backend; "" where they may.

    XLA makes no float8 calls while Triton makes its products (docs/scale.md).
    """
    if dtype != "float8_products":
        return ""
    name = "compute.teacher_dtype float8_products"
    if backend != "gpu":
        return f"{name} is slower than bfloat16 on a {backend}: it is for NVIDIA GPUs from H100 on"
    if "--xla_gpu_enable_triton_gemm=false" not in os.environ.get("XLA_FLAGS", ""):
        return f"{name} may gain nothing without XLA_FLAGS=--xla_gpu_enable_triton_gemm=false"
    return ""
