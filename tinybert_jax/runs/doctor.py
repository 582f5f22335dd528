"""`tinybert doctor`: what this machine is, how fast it multiplies, and what would help a run.

The second part reads a run folder: how long its stages took, how much of that was padding, and
which settings would make the next run faster.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import yaml

from tinybert_jax import __version__
from tinybert_jax.performance import host
from tinybert_jax.performance.device_peaks import measure_gemm_peak, peak_flops
from tinybert_jax.performance.program_cache import keep_programs
from tinybert_jax.report.tables import format_si
from tinybert_jax.runs.environment import float8_note
from tinybert_jax.training.metric_log import read_rows

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    *("transformers", "tokenizers", "datasets", "safetensors"),
)
# Extra -> the module that it brings.
_EXTRAS = {
    "linear": "sklearn",
    "index": "faiss",
    "tpu": "libtpu",
    "ray": "ray",
    "gcs": "gcsfs",
    "s3": "s3fs",
}
_VARIABLES = ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "LIBTPU_INIT_ARGS")
_MUCH_PADDING = 0.15  # of the token slots


class Report(NamedTuple):
    """Facts by title, and what to change."""

    facts: dict[str, str]
    advice: list[str]


def examine(run_dir: str | None = None) -> Report:
    """Looks at the machine and, with `run_dir`, at a run; ValueError for a folder that is none."""
    device = jax.devices()[0]
    kept = keep_programs(device.platform)
    facts = {
        "tinybert_jax": __version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "packages": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES),
        "extras": ", ".join(e for e, m in _EXTRAS.items() if importlib.util.find_spec(m)) or "none",
        "processors": f"{_num_processors()}",
        "memory": _memory(),
        "free disk": format_si(float(shutil.disk_usage(".").free), "B") + " in this folder",
        "devices": f"{jax.device_count()} × {device.device_kind} ({device.platform})",
        "device memory": _device_memory(device),
        "products": _products(device),
        "programs": f"kept in {kept}" if kept else "not kept from run to run",
        "environment": ", ".join(f"{n}={os.environ[n]}" for n in _VARIABLES if n in os.environ)
        or f"none of {', '.join(_VARIABLES)}",
    }
    advice = list(_advice_of_machine(device.platform))
    if run_dir is not None:
        found, more = _examine_run(Path(run_dir).expanduser(), device.platform)
        facts |= found
        advice += more
    return Report({name: text for name, text in facts.items() if text}, advice)


def describe(report: Report, *, is_markdown: bool) -> str:
    """The report as text, or as a Markdown table for a report of a bug."""
    if is_markdown:
        rows = [f"| {name} | {text.replace('|', '/')} |" for name, text in report.facts.items()]
        lines = ["| | |", "|---|---|", *rows, "", *(f"- {line}" for line in report.advice)]
        return "\n".join(lines).rstrip()
    width = max(map(len, report.facts))
    lines = [f"{name:<{width}}  {text}" for name, text in report.facts.items()]
    lines += [f"advice: {line}" for line in report.advice or ["nothing to change"]]
    return "\n".join(lines)


def _num_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str:
    file = Path("/proc/meminfo")
    if not file.is_file():
        return ""
    kilobytes = dict(line.split(":", 1) for line in file.read_text().splitlines())
    free, total = (
        format_si(1024 * float(kilobytes[name].split()[0]), "B")
        for name in ("MemAvailable", "MemTotal")
    )
    return f"{free} free of {total}"


def _device_memory(device: Any) -> str:
    stats = device.memory_stats() if device.platform != "cpu" else None
    return format_si(float(stats["bytes_limit"]), "B") + " each" if stats else ""


def _products(device: Any) -> str:
    """FLOP/s of matrix products: measured on a CPU, of the vendor for others."""
    if device.platform == "cpu":
        rates = {name: measure_gemm_peak(name) for name in ("float32", "bfloat16")}
        shown = ", ".join(f"{name} {format_si(rate, 'FLOP/s')}" for name, rate in rates.items())
        return f"{shown} (measured, all processors)"
    rate = peak_flops(device.device_kind, "bfloat16")
    return f"bfloat16 {format_si(rate, 'FLOP/s')} each (vendor)" if rate else ""


def _advice_of_machine(backend: str) -> Iterator[str]:
    if backend == "cpu":
        if Path("/dev/nvidia0").exists():
            yield "a GPU is here that JAX does not use: pip install 'jax[cuda13]'"
        if any(Path("/dev").glob("accel[0-9]")):
            yield "a TPU is here that JAX does not use: pip install 'jax[tpu]'"
        if host.multiplies_bfloat16():
            yield (
                "compute.dtype=bfloat16_products is the fastest here that trains as well; "
                "recipe: by_rows takes it"
            )


def _examine_run(folder: Path, backend: str) -> tuple[dict[str, str], list[str]]:
    """(facts, advice) of a run folder."""
    files = [folder / name for name in ("config.yaml", "metrics.jsonl")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{folder}: expected the folder of a run, got one without {' and '.join(missing)}; "
            "give the run_dir of a run that has begun"
        )
    config, rows = yaml.safe_load(files[0].read_text(encoding="utf-8")), read_rows(files[1])
    facts, advice = {}, []
    for name in dict.fromkeys(row["stage"] for row in rows if row["kind"] == "train"):
        train = [row for row in rows if row["kind"] == "train" and row["stage"] == name]
        whole = [row["seconds"] for row in rows if row["kind"] == "stage" and row["stage"] == name]
        steps = sum(row["seconds"] for row in train)
        padding = sum(row["padding_share"] for row in train) / len(train)
        use = [row["mfu"] for row in train if isinstance(row.get("mfu"), float)]
        shown = [f"{padding:.0%} padding"] + ([f"{max(use):.0%} of the peak"] if use else [])
        # The seconds of a stage are those of the process that ended it.
        is_whole = whole and whole[-1] >= steps
        took = f"{whole[-1]:.0f} s, {steps:.0f} s of them steps" if is_whole else f"{steps:.0f} s"
        facts[name] = f"{took}; {', '.join(shown)}"
        section = config.get(name) or {}
        if padding > _MUCH_PADDING and section.get("batching") != "pack":
            advice.append(f"{name}: {padding:.0%} of the tokens are padding: {name}.batching=pack")
    return facts, [*advice, *_advice_of_config(config, facts, backend)]


def _advice_of_config(
    config: dict[str, Any], stages: Mapping[str, str], backend: str
) -> Iterator[str]:
    compute = config.get("compute") or {}
    is_slow = compute.get("dtype") == "float32"
    if is_slow and backend != "cpu":
        yield "fp32 products take at least twice the time on accelerators: compute.dtype=bfloat16"
    if is_slow and backend == "cpu" and host.multiplies_bfloat16():
        yield "this processor multiplies bfloat16 faster: compute.dtype=bfloat16_products"
    if compute.get("unroll_layers") is False and backend == "cpu":
        yield "layers that are unrolled run faster and compile longer: compute.unroll_layers=true"
    if note := float8_note(compute.get("teacher_dtype") or "", backend):
        yield note
    if "baseline" in stages:
        yield "baseline trains the student once more, for comparison alone: baseline=null"
