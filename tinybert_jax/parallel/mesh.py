"""The mesh of devices.

Axes: `data` (batch), `fsdp` (batch and parameters), `tensor` (heads and feed-forward width). One
device is a mesh of one.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tinybert_jax.config.compute import MeshSection

AXES = ("data", "fsdp", "tensor")


BATCH_AXES = ("data", "fsdp")


def make_mesh(section: MeshSection, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices; raises ValueError where the axis sizes do not multiply to them."""
    devices = jax.devices() if devices is None else devices
    sizes = [section.data, section.fsdp, section.tensor]
    if sizes[0] == -1:
        sizes[0] = len(devices) // (section.fsdp * section.tensor)
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh: expected data × fsdp × tensor = {len(devices)} devices, got "
            f"{section.data} × {section.fsdp} × {section.tensor}; data: -1 takes all that are left"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def takes_turns(mesh: Mesh) -> bool:
    """Whether what is mapped over seeds runs one seed after another: on CPUs.

    Products with an axis for the seeds are slower there than one product each: a step of 8 seeds of
    benchmarks/many_students.py took 0.86 of `vmap`'s time (2 cores, jax 0.10.2), and the
    activations of one.
    """
    return mesh.devices.flat[0].platform == "cpu"


def num_batch_shards(mesh: Mesh) -> int:
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
