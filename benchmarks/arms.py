"""Runs the arms of a comparison with the command `tinybert run` and prints one table of them.

    TEACHER=<all-MiniLM-L6-v2 folder> TINYBERT_DATA=<data> python benchmarks/arms.py ablation

In the repository's root, after what the comparison needs. Both it and the arms are told by
benchmarks/arms.yaml. Each arm has a folder and a log under --runs; a stage that is done is not done
again. `--together 6` runs so many at one time, to fill a GPU or its host. Further arguments are
settings for all arms, over their own: `compute.unroll_layers=true`.
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
    """1 if an arm failed; the others are in the table."""
    comparisons = yaml.safe_load(_ARMS.read_text())
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("comparison", choices=list(comparisons))
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--together", type=int, default=1, help="arms at one time")
    args = parser.parse_intermixed_args()
    if args.together < 1:
        parser.error(f"--together: expected 1 or more, got {args.together}")
    # Else the first of several processes on one GPU takes three quarters of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    comparison = comparisons[args.comparison]
    shared = comparison.get("settings", [])
    folders = {
        name: args.runs / f"{args.comparison}-{name.replace(',', '').replace(' ', '-')}"
        for name in comparison["arms"]
    }
    with concurrent.futures.ThreadPoolExecutor(args.together) as pool:
        ended = {
            name: pool.submit(
                _run, comparison["config"], folders[name], [*shared, *settings, *args.settings]
            )
            for name, settings in comparison["arms"].items()
        }
    print("| arm | dev score, mean ± deviation over seeds | share of teacher | minutes |")
    print("|---|---|---|---|")
    for name, folder in folders.items():
        print(_line(name, folder, ended[name].result()), flush=True)
    return int(any(status.result() for status in ended.values()))


def _run(config: str, folder: Path, settings: list[str]) -> int:
    """The command's exit status; its output goes to the log beside the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tinybert_jax", "run", config, f"run_dir={folder}", *settings]
    with _log_of(folder).open("a") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode


def _log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _line(name: str, folder: Path, status: int) -> str:
    """The arm's row of the table, or where to read why it has none."""
    if status:
        return f"| {name} | failed with {status}, see {_log_of(folder)} | | |"
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    metric = results["metric"]
    student = next(model for model in results["models"] if model["role"] == "student")
    spread = f" ± {student['deviation'][metric]:.4f}" if "deviation" in student else ""
    kept = f"{results['share_kept']:.1%}" if "share_kept" in results else ""
    minutes = sum(results["seconds"].values()) / 60
    return f"| {name} | {student['metrics'][metric]:.4f}{spread} | {kept} | {minutes:.1f} |"


if __name__ == "__main__":
    sys.exit(main())
