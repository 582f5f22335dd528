"""The accelerators that jobs are rendered for: memory, chips of a host, topologies, vendors' names.

Owns the two tables and the reading of NAME:SHAPE, such as v5e:16x16 (a topology) or h100:16 (a
number of GPUs).
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple


class Tpu(NamedTuple):
    """One version of TPUs. A host has 4 chips, except in the slices of `small`."""

    memory_gb: int  # of a chip
    gke_accelerator: str  # the node label cloud.google.com/gke-tpu-accelerator
    machine: str  # the machine type without its end, -4t for 4 chips
    type_name: str  # the accelerator type without its number, v5litepod for v5litepod-16
    cores_per_chip: int  # the number in an accelerator type counts these
    small: dict[str, int]  # slices of one host: chips by topology
    flat: tuple[str, ...]  # all larger topologies, where there are few; empty for `num_cubes`
    num_cubes: int  # otherwise: the largest slice, in cubes of 4 × 4 × 4 chips
    memory_rate: float  # bytes a second between memory and chip
    link_rate: float  # bytes a second that a chip sends to its neighbours, all links together
    tile: int  # width of a matrix unit
    runtime: str | None  # runtime version for queued resources; None: Compute Engine has this TPU


# Memory, rates (of links one way: half of what is told for both), topologies and accelerator types:
# docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e.
# Labels and machine types: docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
# TPUs of Compute Engine: docs.cloud.google.com/compute/docs/tpus/tpu-machines (v5p, v6e, TPU7x).
# Runtime versions: docs.cloud.google.com/tpu/docs/runtimes.
_FLAT = ("4x4", "4x8", "8x8", "8x16", "16x16")
_FLAT_SMALL = {"1x1": 1, "2x2": 4, "2x4": 8}
_DEEP_SMALL = {"2x2x1": 4}
TPUS = {
    "v4": Tpu(
        *(32, "tpu-v4-podslice", "ct4p-hightpu", "v4", 2, _DEEP_SMALL, (), 64),
        *(1228e9, 300e9, 128),
        runtime="tpu-ubuntu2204-base",
    ),
    "v5e": Tpu(
        *(16, "tpu-v5-lite-podslice", "ct5lp-hightpu", "v5litepod", 1, _FLAT_SMALL, _FLAT, 0),
        *(819e9, 200e9, 128),
        runtime="v2-alpha-tpuv5-lite",
    ),
    "v5p": Tpu(
        *(95, "tpu-v5p-slice", "ct5p-hightpu", "v5p", 2, _DEEP_SMALL, (), 96),
        *(2765e9, 600e9, 128),
        runtime=None,
    ),
    "v6e": Tpu(
        *(32, "tpu-v6e-slice", "ct6e-standard", "v6e", 1, _FLAT_SMALL, _FLAT, 0),
        *(1638e9, 400e9, 256),
        runtime=None,
    ),
}


class Gpu(NamedTuple):
    """One kind of NVIDIA GPUs, 8 a host where nothing else is asked for."""

    memory_gb: int
    gke_accelerator: str  # the node label cloud.google.com/gke-accelerator
    machines: dict[int, str]  # machine types of Google Cloud by their number of GPUs
    sky_name: str


# Memory, GPUs of a machine and machine types: docs.cloud.google.com/compute/docs/gpus; labels:
# docs.cloud.google.com/kubernetes-engine/docs/how-to/gpus. The memory agrees with NVIDIA's data
# sheets of A100, H100, H200 and HGX B200. Names of SkyPilot: `sky show-gpus`.
GPUS = {
    "a100": Gpu(
        40, "nvidia-tesla-a100", {n: f"a2-highgpu-{n}g" for n in (1, 2, 4, 8)}, sky_name="A100"
    ),
    "a100-80gb": Gpu(
        *(80, "nvidia-a100-80gb", {n: f"a2-ultragpu-{n}g" for n in (1, 2, 4, 8)}),
        sky_name="A100-80GB",
    ),
    "h100": Gpu(
        80, "nvidia-h100-80gb", {n: f"a3-highgpu-{n}g" for n in (1, 2, 4, 8)}, sky_name="H100"
    ),
    "h200": Gpu(141, "nvidia-h200-141gb", {8: "a3-ultragpu-8g"}, sky_name="H200"),
    "b200": Gpu(180, "nvidia-b200", {8: "a4-highgpu-8g"}, sky_name="B200"),
}
_GPUS_PER_HOST = 8


class Machines(NamedTuple):
    """The machines of one job."""

    name: str  # v5e, h100, …
    accelerator: Tpu | Gpu
    topology: str | None  # of a TPU slice
    chips_per_host: int
    hosts_per_slice: int
    num_slices: int
    has_whole_hosts: bool = True

    @property
    def num_hosts(self) -> int:
        return self.hosts_per_slice * self.num_slices

    @property
    def num_chips(self) -> int:
        """Chips of all slices. JAX sees one device for each: also on v4 and v5p, whose chips have
        two cores."""
        return self.chips_per_host * self.num_hosts

    @property
    def is_tpu(self) -> bool:
        return isinstance(self.accelerator, Tpu)

    @property
    def machine_type(self) -> str:
        """The machine type of Google Cloud; ValueError for a number of GPUs that none has."""
        if isinstance(self.accelerator, Tpu):
            return f"{self.accelerator.machine}-{self.chips_per_host}t"
        machines = self.accelerator.machines
        if self.chips_per_host not in machines:
            raise ValueError(
                f"--accelerator: expected {_either(machines)} GPUs of {self.name} on each host of "
                f"Google Cloud, got {self.chips_per_host}; change the number, or --gpus-per-host"
            )
        return machines[self.chips_per_host]

    @property
    def accelerator_type(self) -> str:
        """The name of the slice in the Cloud TPU API, such as v5litepod-16; only of TPUs."""
        assert isinstance(self.accelerator, Tpu)
        chips = self.chips_per_host * self.hosts_per_slice
        return f"{self.accelerator.type_name}-{chips * self.accelerator.cores_per_chip}"

    def __str__(self) -> str:
        kind = f"{'TPU ' if self.is_tpu else ''}{self.name} ({self.accelerator.memory_gb} GB)"
        shape = f", {self.topology}" if self.topology else ""
        slices = f" in each of {self.num_slices} slices" if self.num_slices > 1 else ""
        hosts = f", {self.num_hosts} host{'' if self.num_hosts == 1 else 's'}"
        return f"{self.num_chips} × {kind}{shape}{slices}{hosts}"


def read(
    text: str,
    num_slices: int = 1,
    gpus_per_host: int | None = None,
    *,
    option: str = "--accelerator",
) -> Machines:
    """The machines for NAME:SHAPE; ValueError for an unknown name or a shape that does not exist.

    `num_slices`: slices of TPUs of this shape. `gpus_per_host`: 8 where it is None. `option`: the
    argument that a message names.
    """
    name, _, shape = text.lower().partition(":")
    if num_slices < 1 or (gpus_per_host or 1) < 1:
        raise ValueError(
            f"expected --slices and --gpus-per-host of at least 1, got {num_slices} and "
            f"{gpus_per_host}; correct them"
        )
    if name in TPUS:
        if gpus_per_host:
            raise ValueError(
                f"--gpus-per-host: expected none for TPUs, got {gpus_per_host}; remove it"
            )
        return _read_tpu(name, shape, num_slices, option)
    if name in GPUS:
        if num_slices > 1:
            raise ValueError(f"--slices: expected TPUs, got {text}; give the number of all GPUs")
        return _read_gpu(name, shape, gpus_per_host, option)
    raise ValueError(
        f"{option}: expected NAME:SHAPE with a name of {_either([*TPUS, *GPUS])}, got "
        f"'{text}'; write it as v5e:4x4 or h100:8"
    )


def _read_tpu(name: str, shape: str, num_slices: int, option: str) -> Machines:
    tpu = TPUS[name]
    example = "4x4x4" if tpu.num_cubes else "4x4"
    if not re.fullmatch(r"\d+(x\d+)+", shape):
        raise ValueError(
            f"{option}: expected a topology that is a product for {name}, got '{shape}'; "
            f"write it as {name}:{example}"
        )
    if shape in tpu.small:
        return Machines(name, tpu, shape, tpu.small[shape], 1, num_slices)
    if shape not in tpu.flat and not _is_made_of_cubes(shape, tpu.num_cubes):
        known = [*tpu.small, *tpu.flat]
        if tpu.num_cubes:
            known += [
                *_PARTS_OF_A_CUBE,
                f"AxBxC (multiples of 4, A ≤ B ≤ C, {tpu.num_cubes} cubes)",
            ]
        raise ValueError(
            f"{option}: expected a topology of {name}, one of {', '.join(known)}, got "
            f"'{shape}'; choose one, such as {name}:{example}"
        )
    num_chips = math.prod(map(int, shape.split("x")))
    return Machines(name, tpu, shape, 4, num_chips // 4, num_slices)


_PARTS_OF_A_CUBE = ("2x2x2", "2x2x4", "2x4x4")


def _is_made_of_cubes(shape: str, num_cubes: int) -> bool:
    """Whether a slice of at most `num_cubes` cubes, or a part of one cube, has this topology."""
    if shape in _PARTS_OF_A_CUBE:
        return num_cubes > 0
    sizes = [int(size) for size in shape.split("x")]
    is_ordered = len(sizes) == 3 and sizes == sorted(sizes) and sizes[0] > 0
    return is_ordered and not any(size % 4 for size in sizes) and math.prod(sizes) <= 64 * num_cubes


def _read_gpu(name: str, shape: str, gpus_per_host: int | None, option: str) -> Machines:
    per_host = gpus_per_host or _GPUS_PER_HOST
    num_gpus = int(shape) if re.fullmatch(r"\d{1,6}", shape) else 0
    if num_gpus < 1 or num_gpus > per_host and num_gpus % per_host:
        raise ValueError(
            f"{option}: expected a number of GPUs for {name}, at most {per_host} or a "
            f"multiple of it ({per_host} on a host), got '{shape}'; write it as {name}:{per_host}"
        )
    used = min(per_host, num_gpus)
    return Machines(name, GPUS[name], None, used, num_gpus // used, 1, used == per_host)


def _either(names: Sequence[object] | dict) -> str:
    return ", ".join(map(str, names))
