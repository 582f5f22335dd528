"""FLOP/s that one device can reach: from data sheets for accelerators, measured for this CPU."""

import functools
import re
import time
from typing import Any


def peak_flops(device_kind: str, dtype: Any) -> float | None:
    """Dense FLOP/s that one device can reach, by `jax.Device.device_kind`; None where unknown.

    `dtype` is float32, bfloat16 or float16, as a string or a numpy/jax dtype. float32 means what
    XLA runs for float32 operands at default precision: TF32 on Ampere and later, one bfloat16
    pass on TPU. MIG slices and CPUs have no entry (for a CPU: `measure_gemm_peak`). A "TPU7x"
    device is half a chip (one of two chiplets), a "TPU v4" or "TPU v5p" device a whole chip.

    Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x system architecture), agreeing
    with jax/_src/pallas/mosaic/tpu_info.py; NVIDIA data sheets for V100, T4, A100, L4, H100 and
    H200, halved where they quote structured sparsity.
    """
    if "MIG" in device_kind.split():
        return None
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    for pattern, peaks in _PEAK_TFLOPS:
        if re.search(pattern, device_kind):
            tflops = peaks.get(name)
            return None if tflops is None else tflops * 1e12
    return None


def _tpu(tflops: float) -> dict[str, float]:
    return {"bfloat16": tflops, "float32": tflops}


def _gpu(half: float, tf32: float) -> dict[str, float]:
    return {"bfloat16": half, "float16": half, "float32": tf32}


# The first matching pattern wins, so a variant such as "H100 PCIe" stands before "H100".
_PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"^TPU v4$", _tpu(275.0)),
    (r"^TPU v5( lite|e)$", _tpu(197.0)),
    (r"^TPU v5p?$", _tpu(459.0)),
    (r"^TPU v6( lite|e)$", _tpu(918.0)),
    (r"^TPU ?7x$", _tpu(2307.0 / 2)),
    (r"\bH(100|200) NVL\b", _gpu(835.5, 417.7)),
    (r"\bH100 PCIe\b", _gpu(756.0, 378.0)),
    (r"\bH(100|200)\b", _gpu(989.4, 494.7)),
    (r"\bA100\b", _gpu(312.0, 156.0)),
    (r"\bL4\b", _gpu(121.0, 60.5)),
    (r"\bT4\b", {"float16": 65.0, "float32": 8.1}),
    (r"\bV100S?-PCIE\b", {"float16": 112.0, "float32": 14.0}),
    (r"\bV100\b", {"float16": 125.0, "float32": 15.7}),
)


def measure_gemm_peak(dtype: str = "float32", budget_s: float = 0.5) -> float:
    """FLOP/s of a jitted matrix product on this CPU, accumulated in fp32: the best of several runs.

    The shape (2048×768 times 768×3072) is a BERT-base feed-forward. Other load on the machine
    lowers the result, so that utilisation may come out above 1 when the load ends. `budget_s`
    bounds the seconds of the runs, not of the compilation.
    """
    import jax
    import jax.numpy as jnp

    rows, inner, columns = 2048, 768, 3072
    with jax.default_device(jax.devices("cpu")[0]):
        left = jnp.full((rows, inner), 0.5, dtype)
        right = jnp.full((inner, columns), 0.5, dtype)
        multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
        multiply(left, right).block_until_ready()
        deadline = time.perf_counter() + budget_s
        best = float("inf")
        while best == float("inf") or time.perf_counter() < deadline:
            start = time.perf_counter()
            multiply(left, right).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * columns / best
