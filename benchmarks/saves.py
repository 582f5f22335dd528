"""What saving costs a run, and how soon a run that is asked to stop has saved and ended.

    TEACHER=<all-MiniLM-L6-v2 folder> python benchmarks/saves.py

Pretraining on built-in text, 32 rows of 128 tokens a step (or --rows and --width). The share of
saving is what the steps wait for a save, and by how much steps are slower while it is written, over
the time of 100 steps without a save; --every sets how often the run here saves. The seconds from
SIGTERM to the end are measured while the step is compiled and after some steps. Last, the rate of
`tinybert ckpt verify`.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

STEPS = 100  # that the share is told of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--presets", nargs="+", default=["tinybert-4l-312d", "bert-base"])
    parser.add_argument("--every", type=int, default=30, help="steps from save to save")
    parser.add_argument("--saves", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args()
    print(
        "| model | state | step | step while a save is written | the step waits | a save takes "
        f"| share, every {STEPS} steps | SIGTERM to exit: compiling | in a step | verified |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for preset in args.presets:
        with tempfile.TemporaryDirectory() as folder:
            print(line(preset, Path(folder), args), flush=True)


def line(preset: str, folder: Path, args: argparse.Namespace) -> str:
    config = write_config(folder, preset, args, args.every * args.saves + args.every // 2)
    measured = measure_saves(config)
    run = folder / "run"
    verified = subprocess.run(tinybert("ckpt", "verify", run), capture_output=True, text=True)
    rate = re.search(r"at ([\d,]+ MB/s)", verified.stdout)
    assert verified.returncode == 0 and rate, verified.stderr
    size = sum(f.stat().st_size for f in newest_state(run).rglob("*") if f.is_file())
    compiling = seconds_to_exit(write_config(folder / "a", preset, args, 10_000), None)
    in_step = [
        seconds_to_exit(write_config(folder / str(steps), preset, args, 10_000), steps)
        for steps in (5, 8, 11)
    ]
    without, during = (statistics.median(measured[name]) for name in ("without", "during"))
    waits, takes = (statistics.median(measured[name]) for name in ("waits", "takes"))
    slower = max(during - without, 0.0) * takes / during  # over the steps while it is written
    share = (waits + slower) / (STEPS * without)
    return (
        f"| {preset}, {args.rows} × {args.width} | {size / 1e6:,.0f} MB | {without:.2f} s "
        f"| {during:.2f} s | {waits:.2f} s | {takes:.1f} s | {share:.1%} | {compiling:.1f} s "
        f"| {min(in_step):.1f} to {max(in_step):.1f} s | {rate[1]} |"
    )


def write_config(folder: Path, preset: str, args: argparse.Namespace, num_steps: int) -> Path:
    folder.mkdir(exist_ok=True)
    stage = {"num_steps": num_steps, "max_length": args.width, "global_batch_size": args.rows}
    stage |= {"batching": "pack", "learning_rate": 1e-4, "log_every": 1, "save_every": args.every}
    stage["loss_chunk_size"] = 64
    config = {
        "name": "saves",
        "run_dir": str(folder / "run"),
        "keep_checkpoints": True,
        "teacher": {"preset": preset},
        "tokenizer": {"path": os.environ["TEACHER"]},
        "corpus": {"builtin": True},
        "pretrain": stage,
        "compute": {"dtype": "bfloat16_products", "unroll_layers": True},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def tinybert(*words: object) -> list[str]:
    return [sys.executable, "-m", "tinybert_jax", *map(str, words)]


def newest_state(run: Path) -> Path:
    states = (run / "checkpoints" / "pretrain" / "last").glob("[0-9]*")
    return max(states, key=lambda path: int(path.name))


def measure_saves(config: Path) -> dict[str, list[float]]:
    """Seconds of steps without a save and during one, that steps wait, and that a save takes."""
    from tinybert_jax import cli
    from tinybert_jax.training import checkpoint
    from tinybert_jax.training.step import TrainStep

    begun: list[float] = []
    waits: list[tuple[float, float]] = []
    writes: list[tuple[float, float]] = []

    def timed(function, spans):
        def call(*arguments, **options):
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spans.append((begin, time.perf_counter()))

        return call

    def step(self, *arguments, _take=TrainStep.__call__):
        begun.append(time.perf_counter())
        return _take(self, *arguments)

    checkpoint.fetch = timed(checkpoint.fetch, waits)
    checkpoint.write = timed(checkpoint.write, writes)
    TrainStep.__call__ = step
    assert cli.main(["run", str(config)]) == 0
    without, during = [], []
    for begin, end in zip(begun[2:], begun[3:], strict=False):  # the first ones warm up
        if any(begin < stop and start < end for start, stop in waits):
            continue  # its own time holds that of the copy
        is_written = any(begin < stop and start < end for start, stop in writes)
        (during if is_written else without).append(end - begin)
    copies = [end - begin for begin, end in waits if end < begun[-1]]
    return {
        "without": without,
        "during": during or without,
        "waits": copies,
        "takes": [end - begin for begin, end in writes if begin < begun[-1]],
    }


def seconds_to_exit(config: Path, steps: int | None) -> float:
    """From SIGTERM, while the step is compiled (None) or after so many steps, to the end."""
    process = subprocess.Popen(
        tinybert("run", config), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seen = 0
    for text in process.stdout or ():
        seen += text.startswith("pretrain") and "/10000 " in text
        if steps is None and "rows of at most" in text:
            time.sleep(6)  # by then it is compiled
            break
        if steps is not None and seen >= steps:
            break
    begin = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate()
    assert process.returncode == 75, told
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
