"""Devices that programs are compiled for and that need not be here, by name: v5e:4x4, h200:8."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from tinybert_jax.performance import accelerators, gpu_target

LOCAL = "local"  # the topology of the devices that are here


class Device(NamedTuple):
    """What one device of a topology can do, as its vendor states it."""

    memory_bytes: float
    memory_rate: float  # bytes a second between memory and chip
    link_rate: float  # bytes a second that a device sends to the others
    tile: int  # width of the products that waste nothing


def device_of(topology: str) -> Device | None:
    """None for `local`. Raises ValueError for an unknown topology."""
    if topology == LOCAL:
        return None
    machines = accelerators.read(topology, option="--topology")
    if isinstance(machines.accelerator, accelerators.Tpu):
        tpu = machines.accelerator
        return Device(tpu.memory_gb * 2.0**30, tpu.memory_rate, tpu.link_rate, tpu.tile)
    chip = gpu_target.CHIPS.get(machines.name)
    if chip is None:
        raise ValueError(_only_gpus(topology))
    # What JAX takes of a GPU; `tinybert launch` sets 0.9.
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    return Device(share * chip.memory_gb * 2.0**30, chip.memory_rate, chip.link_rate, _GPU_TILE)


def devices_of(topology: str, num_slices: int = 1) -> Sequence[Any]:
    """The devices of slices of a TPU topology or of GPUs of one host, or `local`: those here.

    Raises ValueError for an unknown topology, and where its compiler is missing.
    """
    if topology == LOCAL:
        return jax.devices()
    machines = accelerators.read(topology, num_slices, option="--topology")
    return (_tpus if machines.is_tpu else _gpus)(topology.lower(), machines)


def _tpus(topology: str, machines: accelerators.Machines) -> Sequence[Any]:
    # libtpu asks the cloud which machine this is, unless it is told.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", machines.accelerator_type)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if not importlib.util.find_spec("libtpu"):
        raise ValueError(
            f"--topology {topology}: expected the package libtpu, the compiler of TPU programs, "
            "got none; install it with `pip install 'tinybert-jax[tpu]'`"
        )
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if machines.num_slices > 1:
        options["num_slices"] = machines.num_slices
    if machines.num_chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    return topologies.get_topology_desc(topology, platform="tpu", **options).devices


def _gpus(topology: str, machines: accelerators.Machines) -> Sequence[Any]:
    chip = gpu_target.CHIPS.get(machines.name)
    if chip is None or machines.num_hosts > 1:
        raise ValueError(_only_gpus(topology))
    if not has_gpu_compiler():
        raise ValueError(
            f"--topology {topology}: expected JAX's plugin for CUDA, the compiler of GPU programs, "
            "got none; install it with `pip install 'jax[cuda13]'`"
        )
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda",
        target_config=gpu_target.target_text(chip),
        topology=f"1x1x{machines.num_chips}",
    ).devices


def _only_gpus(topology: str) -> str:
    return (
        f"--topology: expected GPUs of one host, of {', '.join(gpu_target.CHIPS)}, got "
        f"'{topology}'; name such, or {LOCAL} where the GPUs are"
    )


def has_gpu_compiler() -> bool:
    """Whether JAX's plugin for CUDA is installed; a GPU need not be here."""
    found = importlib.util.find_spec("jax_plugins")
    names = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    return found is not None and any(importlib.util.find_spec(name) for name in names)


_GPU_TILE = 16  # side of the smallest products of tensor cores
