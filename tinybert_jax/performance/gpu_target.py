"""GPUs as XLA's compiler sees them, so that their programs are compiled where none is."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One kind of NVIDIA GPUs."""

    name: str  # device_kind
    capability: tuple[int, int]
    num_cores: int  # streaming multiprocessors
    memory_gb: int
    memory_rate: float  # bytes a second between memory and chip
    link_rate: float  # bytes a second that a GPU sends to the others of its host
    cache_mb: int  # of level 2
    shared_kb: int  # shared memory of a multiprocessor; a block may have all but one KB
    clock_ghz: float


# NVIDIA's data sheets and white papers of A100, H100 and H200 (SXM); shared memory: "Technical
# Specifications per Compute Capability" of the CUDA C++ programming guide.
CHIPS = {
    "a100": Chip("NVIDIA A100-SXM4-40GB", (8, 0), 108, 40, 1555e9, 300e9, 40, 164, 1.41),
    "a100-80gb": Chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 80, 2039e9, 300e9, 40, 164, 1.41),
    "h100": Chip("NVIDIA H100 80GB HBM3", (9, 0), 132, 80, 3352e9, 450e9, 50, 228, 1.98),
    "h200": Chip("NVIDIA H200", (9, 0), 132, 141, 4800e9, 450e9, 50, 228, 1.98),
}


def target_text(chip: Chip) -> str:
    """The chip as a `GpuTargetConfigProto` of XLA in text form.

    What the table does not hold is the same for all its chips.
    """
    major, minor = chip.capability
    features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
platform_name: "CUDA"
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{chip.name}"
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
  core_count: {chip.num_cores}
  clock_rate_ghz: {chip.clock_ghz}
  memory_bandwidth: {chip.memory_rate:.0f}
  device_memory_size: {chip.memory_gb * 2**30}
  l2_cache_size: {chip.cache_mb * 2**20}
  shared_memory_per_core: {chip.shared_kb * 2**10}
  shared_memory_per_block_optin: {(chip.shared_kb - 1) * 2**10}
  shared_memory_per_block: 49152
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  fpus_per_core: {128 if major >= 9 else 64}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}}
"""
