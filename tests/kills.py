"""Kills a run of all six stages many times, flips bits and cuts the power: it ends as without.

    python tests/kills.py --kills 50 --flips 50 --power 5 [--seed N] [--keep DIR]

SIGKILL comes at random, half of the times while a checkpoint is written. A flip is one bit of one
file of the newest state, the best parameters or the finished models; the next process has to tell
it, by name, before it trains a step. A loss of power (needs a C compiler) is a kill after which
everything that was not synced is gone. Runs that end have to have the golden run's weights and
metrics, bit for bit. Prints the seed, each fault, and a summary; status 1 where a run differs.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import faulty
import forked
import jax
import tiny_inputs

STAGES = ("pretrain", "finetune", "general", "intermediate", "prediction", "baseline")
JUDGED = ("finetune", "prediction", "baseline")
CLOCKS = {"time", "seconds", "seconds_left", "tokens_per_second", "mfu"}


def write_inputs(folder: Path) -> None:
    """Writes a config of all stages on tiny inputs."""
    tiny_inputs.write_inputs(folder, **tiny_inputs.TEACHER)
    stage = {**tiny_inputs.STAGE, "num_steps": 12, "log_every": 3, "save_every": 4}
    judged = {**stage, "eval_every": 5, "gradient_accumulation_steps": 2}
    sections = {name: judged if name in JUDGED else stage for name in STAGES}
    tiny_inputs.write_config(
        folder / "run.yaml",
        folder,
        folder / "golden",
        student=tiny_inputs.STUDENT,
        distillation={"teacher_margin": -1},
        **sections,
    )


class Runner:
    """Starts processes of a run in `folder`, and hurts them."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.seconds = 0.0  # of the golden run
        self.shadow = folder / "shadow"
        self.differences: list[str] = []

    def start(self, name: str) -> int:
        words = ["run", str(self.folder / "run.yaml"), f"run_dir={self.folder / name}"]
        with self.output(name).open("wb") as output:
            return forked.fork({"words": words}, output.fileno(), output.fileno())

    def output(self, name: str) -> Path:
        return self.folder / f"{name}.output"

    def finish(self, name: str) -> None:
        """Runs to the end."""
        begin, pid = time.monotonic(), self.start(name)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == 0, self.output(name).read_text()
        self.seconds = self.seconds or time.monotonic() - begin

    def kill(self, name: str, *, in_save: bool) -> bool:
        """Starts a process and kills it; returns False where it ends before."""
        pid, begin = self.start(name), time.monotonic()
        wait = self.random.uniform(0, self.seconds)
        pause = self.random.uniform(0, 0.02)
        number = self.random.randint(1, 4)  # of the saves of this process
        seen: set[str] = set()
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(status)
                assert status == 0, self.output(name).read_text()
                return False
            if in_save:
                found = (self.folder / name).glob("checkpoints/*/*/partial-*")
                seen |= {str(path) for path in found}
                is_time = len(seen) >= number
            else:
                is_time = time.monotonic() - begin > wait
            if is_time:
                break
            time.sleep(0.001)
        time.sleep(pause)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return True

    def flip(self, name: str) -> Path | None:
        """Flips a bit of a file that the next process reads; None where there is none yet."""
        files: list[list[Path]] = [[], [], []]
        for stage in STAGES:
            if (self.folder / name / "stages" / f"{stage}.json").exists():
                files[0] += self._files(self.folder / name / "models" / stage)
                continue
            last = self.folder / name / "checkpoints" / stage / "last"
            newest = _newest_readable(last)
            if newest:
                files[1] = self._files(newest)
                best = json.loads((newest / "meta.json").read_text())
                if "best_step" in best:
                    files[2] = self._files(last.with_name("best") / str(best["best_step"]))
        chosen = [group for group in files if group]
        if not chosen:
            return None
        file = self.random.choice(self.random.choice(chosen))
        content = bytearray(file.read_bytes())
        place = self.random.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)
        return file

    def _files(self, folder: Path) -> list[Path]:
        return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)

    def find(self, name: str, file: Path) -> str:
        """Starts a process after a flip; returns how it told the file, which is then mended."""
        if file.is_relative_to(self.folder / name / "models"):
            pid = self.start(name)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            told = self.output(name).read_text()
            assert status == 2 and str(file) in told and " 1/12" not in told, told
            stage = file.relative_to(self.folder / name / "models").parts[0]
            shutil.rmtree(self.folder / name / "models" / stage)
            return "refused by name; the stage trains again"
        step = next(p for p in file.parents if p.name.isdigit())
        damaged = step.with_name(f"damaged-{step.name}")
        shutil.rmtree(damaged, ignore_errors=True)
        pid, end = self.start(name), time.monotonic() + 600
        while not damaged.exists() and time.monotonic() < end:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), self.output(name).read_text()
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert damaged.exists(), f"{file}: no word of the flip"
        return "set aside"

    @contextlib.contextmanager
    def watched(self, name: str) -> Iterator[None]:
        """Processes that start inside keep what they sync in a shadow of the run folder."""
        shutil.rmtree(self.shadow, ignore_errors=True)
        faulty.keep_all(self.folder / name, self.shadow)
        os.environ |= {"FAULTY_ROOT": str(self.folder / name), "FAULTY_SHADOW": str(self.shadow)}
        yield
        del os.environ["FAULTY_SHADOW"]

    def lose_power(self, name: str) -> None:
        """Drops from the run folder what no fsync has written."""
        if not (self.folder / name).exists():
            return  # killed before it made the folder
        left = self.folder / "left"
        faulty.after_power_loss(self.folder / name, self.shadow, left)
        shutil.rmtree(self.folder / name)
        left.rename(self.folder / name)

    def compare_models(self, name: str) -> None:
        golden, run = self.folder / "golden", self.folder / name
        for folder in ("hf", *(f"models/{stage}" for stage in STAGES)):
            file = f"{folder}/model.safetensors"
            if (golden / file).read_bytes() != (run / file).read_bytes():
                self.differences.append(f"{name}: {file}")

    def compare(self, name: str) -> None:
        golden, run = self.folder / "golden", self.folder / name
        self.compare_models(name)
        partial = [*run.glob("models/.*"), *run.glob(".*-partial"), *run.glob("**/partial-*")]
        self.differences += [f"{name}: {path} is left" for path in partial]
        if _metrics(golden) != _metrics(run):
            self.differences.append(f"{name}: metrics.jsonl")


def _newest_readable(states: Path) -> Path | None:
    """After a loss of power a state that was removed may stand there again, in part."""
    for step in sorted((int(path.name) for path in states.glob("[0-9]*")), reverse=True):
        file = states / str(step) / "meta.json"
        if file.is_file() and file.read_text().startswith("{"):
            return file.parent
    return None


def _metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in CLOCKS} for r in rows if r["kind"] != "stage"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("kills", 50), ("flips", 50), ("power", 5), ("seed", None)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", type=Path, help="where inputs, runs and programs stay")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return _hurt(Runner(folder, seed), given.kills, given.flips, given.power)


def _hurt(runner: Runner, kills: int, flips: int, power: int) -> int:
    folder = runner.folder
    if not (folder / "run.yaml").exists():
        # In a process of its own: this one may not start JAX's threads, as it forks.
        code = f"import pathlib, kills; kills.write_inputs(pathlib.Path({str(folder)!r}))"
        tests = Path(__file__).parent
        subprocess.run([sys.executable, "-c", code], cwd=tests, check=True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    forked.import_all()
    runner.finish("golden")  # compiles
    shutil.rmtree(folder / "golden")
    runner.seconds = 0.0
    runner.finish("golden")
    print(f"golden: {runner.seconds:.0f} s", flush=True)
    faults = ["kill"] * (kills // 2) + ["kill in a save"] * (kills - kills // 2)
    faults += ["power"] * power + ["flip"] * flips
    runner.random.shuffle(faults)
    number, told = 1, {fault: 0 for fault in sorted(set(faults))}
    while faults:
        fault, name = faults[-1], f"run-{number:03}"
        begin, how = time.monotonic(), ""
        if fault == "flip":
            file = runner.flip(name)
            if file is None:
                faults.insert(0, faults.pop())  # nothing to flip yet
                if set(faults) == {"flip"}:
                    runner.kill(name, in_save=True)
                continue
            how = f"{file.relative_to(folder)}: {runner.find(name, file)}"
        else:
            with runner.watched(name) if fault == "power" else contextlib.nullcontext():
                is_hit = runner.kill(name, in_save=fault == "kill in a save")
            if not is_hit:
                runner.compare(name)
                number += 1
                continue
            if fault == "power":
                runner.lose_power(name)
        faults.pop()
        told[fault] += 1
        print(
            f"{fault} {told[fault]} of {name} {how} ({time.monotonic() - begin:.0f} s)", flush=True
        )
    with runner.watched(name := f"run-{number:03}") if power else contextlib.nullcontext():
        runner.finish(name)
    if power:  # just after the end
        runner.lose_power(name)
        runner.compare_models(name)
        runner.finish(name)
    runner.compare(name)
    print(f"{number} runs with {told}: ", end="")
    print("; ".join(runner.differences) or "the golden run's weights and metrics, bit for bit")
    return 1 if runner.differences else 0


if __name__ == "__main__":
    if "LD_PRELOAD" not in os.environ:
        with tempfile.TemporaryDirectory() as scratch:
            library = faulty.build(Path(scratch))
            environment = {**os.environ, "LD_PRELOAD": library or ""}
            done = subprocess.run([sys.executable, *sys.argv], env=environment)
        sys.exit(done.returncode)
    sys.exit(main())
