"""The device mesh and its axes.

`data` splits the batch, `fsdp` the batch and the parameters, `tensor` the heads and the
feed-forward width. A single device is a mesh of size 1.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tinybert_jax.config.compute import MeshSection

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the axes that split the examples of a batch


def make_mesh(section: MeshSection, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices; ValueError where the axis sizes do not multiply to their number.

    The devices of a process are neighbours, and so are those of a slice of a TPU: `data`, the first
    axis, runs over slices and processes, and the last axes run within them as far as they reach.
    """
    devices = sorted(jax.devices(), key=_place) if devices is None else devices
    sizes = [section.data, section.fsdp, section.tensor]
    if sizes[0] == -1:
        sizes[0] = len(devices) // (section.fsdp * section.tensor)
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh: expected data × fsdp × tensor = {len(devices)} devices, got "
            f"{section.data} × {section.fsdp} × {section.tensor}; set data: -1 to use all "
            "remaining devices"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _place(device: Any) -> tuple[int, int]:
    return getattr(device, "slice_index", None) or 0, device.process_index


def runs_seeds_sequentially(mesh: Mesh) -> bool:
    """Whether the seeds of a model run one after another instead of under `vmap`: on CPUs.

    On a CPU one product with a seed axis is slower than one product per seed: a sequential step of
    8 seeds of benchmarks/many_students.py took 0.86 of the time of `vmap` (2 cores, jax 0.10.2) and
    the activation memory of one seed.
    """
    return mesh.devices.flat[0].platform == "cpu"


def num_batch_shards(mesh: Mesh) -> int:
    """Number of parts that the mesh splits a batch into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
