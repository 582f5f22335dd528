"""Runs the arms of a comparison with the command `tinybert run` and prints one table of them.

    TEACHER=<all-MiniLM-L6-v2 folder> TINYBERT_DATA=<data> python benchmarks/arms.py ablation

What an arm is: benchmarks/arms.yaml. Each has a folder and a log under --runs; one that is done is
not run again. `--together 6` runs so many at one time, to fill a GPU or its host. Further arguments
are settings for all arms: `compute.unroll_layers=true`.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

_ARMS = Path(__file__).with_name("arms.yaml")


def main() -> int:
    comparisons = yaml.safe_load(_ARMS.read_text())
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("comparison", choices=list(comparisons))
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--together", type=int, default=1, help="arms at one time")
    args = parser.parse_intermixed_args()
    # Else the first of several processes on one GPU takes three quarters of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    comparison = comparisons[args.comparison]
    shared = [*comparison.get("settings", []), *args.settings]
    folders = {
        name: args.runs / f"{args.comparison}-{name.replace(',', '').replace(' ', '-')}"
        for name in comparison["arms"]
    }
    with concurrent.futures.ThreadPoolExecutor(args.together) as pool:
        ended = {
            name: pool.submit(run, comparison["config"], folders[name], [*shared, *settings])
            for name, settings in comparison["arms"].items()
        }
    print("| arm | dev score, mean ± deviation over seeds | share of teacher | minutes |")
    print("|---|---|---|---|")
    for name, folder in folders.items():
        print(line(name, folder, ended[name].result()), flush=True)
    return int(any(status.result() for status in ended.values()))


def run(config: str, folder: Path, settings: list[str]) -> int:
    """The command's exit status; its output goes to the log beside the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tinybert_jax", "run", config, f"run_dir={folder}", *settings]
    with folder.with_suffix(".log").open("w") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode


def line(name: str, folder: Path, status: int) -> str:
    if status:
        return f"| {name} | failed with {status}, see {folder.with_suffix('.log')} | | |"
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    metric = results["metric"]
    student = next(model for model in results["models"] if model["role"] == "student")
    spread = f" ± {student['deviation'][metric]:.4f}" if "deviation" in student else ""
    minutes = sum(results["seconds"].values()) / 60
    return (
        f"| {name} | {student['metrics'][metric]:.4f}{spread} | {results['share_kept']:.1%} "
        f"| {minutes:.1f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
