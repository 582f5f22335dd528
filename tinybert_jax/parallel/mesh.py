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
    axis, runs over slices and processes, and the last axes run within them as far as they reach;
    ValueError where `fsdp` or `tensor` would leave a slice. (`create_hybrid_device_mesh` of JAX
    puts devices of several processes between each other, which then have no part of a batch.)
    """
    devices = sorted(jax.devices() if devices is None else devices, key=_place)
    sizes = [section.data, section.fsdp, section.tensor]
    if sizes[0] == -1:
        sizes[0] = len(devices) // (section.fsdp * section.tensor)
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh: expected data × fsdp × tensor = {len(devices)} devices, got "
            f"{section.data} × {section.fsdp} × {section.tensor}; set mesh.data=-1 for all that "
            f"remain, and the others to divisors of {len(devices)}, or start more processes"
        )
    _check_slices(section, sizes[0], len({_place(device)[0] for device in devices}))
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _check_slices(section: MeshSection, data: int, num_slices: int) -> None:
    wanted = section.dcn_data or num_slices
    # Groups that JAX knows nothing of, such as hosts of GPUs, only have to divide the axis.
    if num_slices > 1 and wanted != num_slices:
        raise ValueError(
            f"mesh.dcn_data: expected {num_slices}, the slices that the devices are in, got "
            f"{wanted}; leave it out, or start on {wanted} slices"
        )
    if data % wanted:
        raise ValueError(
            f"mesh: expected a data axis that is a multiple of the {wanted} slices (mesh.dcn_data),"
            f" got data {data}, fsdp {section.fsdp}, tensor {section.tensor}; lower fsdp or tensor"
        )


def _place(device: Any) -> tuple[int, int]:
    return getattr(device, "slice_index", None) or 0, device.process_index


def runs_seeds_sequentially(mesh: Mesh) -> bool:
    """Whether the seeds of a model run one after another instead of under `vmap`: on CPUs.

    On a CPU one product with a seed axis is slower than one product per seed: a sequential step of
    8 seeds of benchmarks/many_students.py took 0.86 of the time of `vmap` (2 cores, jax 0.10.2) and
    the activation memory of one seed.
    """
    return platform_of(mesh) == "cpu"


def unrolls_layers(platform: str) -> bool:
    """Whether layers are compiled one by one where the config leaves it open: on GPUs and TPUs.

    A loop over layers copies their arrays into and out of stacks in every step: docs/scale.md.
    """
    return platform != "cpu"


def platform_of(mesh: Mesh) -> str:
    """cpu, gpu or tpu, of the devices that the program will run on."""
    return mesh.devices.flat[0].platform


def num_batch_shards(mesh: Mesh) -> int:
    """Number of parts that the mesh splits a batch into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
