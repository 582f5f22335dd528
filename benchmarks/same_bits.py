"""Proves that two versions of the project compute the same bits.

    python benchmarks/same_bits.py BEFORE [AFTER] [--keep DIR]

Each is a git revision or a checkout's folder; AFTER is by default the checkout one stands in. Both
versions run the same small configs on the same text, on CPU (same_bits_inputs.py): six stages, a
family with seeds, MiniLMv2's and DistilBERT's losses, token stores, a regression. AFTER also ends
runs that BEFORE began and SIGKILL stopped. Weights have to be equal byte for byte, logged values
and scores exactly. One line a run says so; the names of what differs follow, and the exit status
is then 1.

With --keep DIR the outputs stay in DIR. A further comparison with the same BEFORE runs AFTER alone:
BEFORE is known by its source, its inputs and the installed packages. A second comparison in the
same DIR waits until the first has ended.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import same_bits_inputs as inputs
import yaml
from same_bits_inputs import ENVIRONMENT, KILLED_AT, KILLED_IN, RUNS

CLOCKS = {"time", "seconds", "seconds_left", "tokens_per_second", "mfu"}
SCORES = ("role", "name", "stage", "metrics", "by_seed", "mean", "deviation", "confusion")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


class Side(NamedTuple):
    """One version: its name, its source, and the folder that its runs are in."""

    label: str
    checkout: Path
    work: Path
    cache: Path
    lock: int

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Starts a command of this version, which sees its working folder as the current one."""
        own = {"PYTHONPATH": str(self.checkout), "JAX_COMPILATION_CACHE_DIR": str(self.cache)}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=self.work,
            env={**kept, **ENVIRONMENT, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=(self.lock,),
        )

    def call(self, *words: str) -> str:
        """Runs a command and returns what it printed; raises RuntimeError where it fails."""
        process = self.start(*words)
        output, _ = process.communicate()
        if process.returncode:
            tail = "\n    ".join(output.splitlines()[-12:])
            raise RuntimeError(f"{self.label}: `{' '.join(words)}` failed:\n    {tail}")
        return output

    def command(self, name: str, run_dir: str) -> list[str]:
        """Gives the words that run a config into a folder of its own."""
        return ["-m", "tinybert_jax", "run", f"{name}.yaml", f"run_dir={run_dir}"]


# Runs


def write_configs(side: Side, text: Path, teacher: Path) -> None:
    """Writes the configs of all runs, and that of the token store, into a working folder."""
    side.work.mkdir(parents=True, exist_ok=True)
    configs = {"six": inputs.six_stages(text), **inputs.other_runs(text, teacher)}
    for name, config in configs.items():
        content = yaml.safe_dump({"run_dir": name, **config}, sort_keys=False)
        (side.work / f"{name}.yaml").write_text(content)
    prepared = inputs.token_store(text, teacher)
    (side.work / "prepare.yaml").write_text(yaml.safe_dump(prepared))


def prepare(before: Side, after: Side, text: Path) -> None:
    """Writes inputs and configs, drops an earlier AFTER, and checks which package is run."""
    text.mkdir(parents=True, exist_ok=True)
    inputs.write_text(text)
    shutil.rmtree(after.work, ignore_errors=True)
    for side in (before, after):
        write_configs(side, text, before.work / "six" / "models" / "pretrain")
        check_source(side)


def check_source(side: Side) -> None:
    """Raises RuntimeError where Python would find another copy of the package."""
    code = "import importlib.util as u; print(u.find_spec('tinybert_jax').origin)"
    found = Path(side.call("-c", code).strip()).resolve()
    if not found.is_relative_to(side.checkout):
        raise RuntimeError(f"{side.label}: expected the package of {side.checkout}, got {found}")


def run_once(side: Side, name: str) -> None:
    """Runs a config from its beginning, unless a mark says that it is done."""
    mark = side.work / f"{name}.done"
    if mark.exists():
        return
    shutil.rmtree(side.work / name, ignore_errors=True)
    if name == "stores":
        shutil.rmtree(side.work / "store", ignore_errors=True)
        side.call("-m", "tinybert_jax", "data", "prepare", "prepare.yaml")
    side.call(*side.command(name, name))
    mark.touch()


def begin_once(side: Side, name: str) -> None:
    """Begins a run and kills it in the middle of a stage, unless a mark says that it is done."""
    stage, run = KILLED_IN[name], side.work / f"{name}-killed"
    mark = side.work / f"{run.name}.done"
    if mark.exists():
        return
    shutil.rmtree(run, ignore_errors=True)
    process = side.start(*side.command(name, run.name))
    wanted = f'"stage": "{stage}", "step": {KILLED_AT},'
    metrics, is_time = run / "metrics.jsonl", False
    while process.poll() is None and not is_time:
        time.sleep(0.005)
        is_saved = any(run.glob(f"checkpoints/{stage}/last/[0-9]*"))
        is_time = is_saved and metrics.exists() and wanted in metrics.read_text()
    process.kill()
    output, _ = process.communicate()
    is_killed = is_time and process.returncode == -signal.SIGKILL
    if not is_killed or list(run.glob(f"models/{stage}*")):
        tail = "\n    ".join(output.splitlines()[-12:])
        raise RuntimeError(f"{side.label}: no kill inside {stage} of {name}:\n    {tail}")
    mark.touch()


def resume(before: Side, after: Side, name: str) -> None:
    """Lets AFTER end a copy of the run that BEFORE began; raises RuntimeError if it begins anew."""
    run = f"{name}-killed"
    shutil.copytree(before.work / run, after.work / run, symlinks=True)
    output = after.call(*after.command(name, run))
    if f"{KILLED_IN[name]}: resumes at step" not in output:
        raise RuntimeError(f"{after.label}: {KILLED_IN[name]} does not go on at the checkpoint")


# Comparison


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a safetensors file as plain bytes, those of fp32 as numbers."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, told in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = told["data_offsets"]
            dtype = np.float32 if told["dtype"] == "F32" else np.uint8
            tensors[name] = np.frombuffer(content[start + first : start + last], dtype)
    return tensors


def describe_tensors(before: Path, after: Path) -> str:
    """Tells how much of two files of weights differs."""
    ours, theirs = read_tensors(before), read_tensors(after)
    if {name: own.shape for name, own in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return "tensors of other names or sizes"
    different = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    if not different:
        return "equal tensors, another header"
    gaps = [
        np.abs(ours[name].astype(np.float64) - theirs[name].astype(np.float64)).max()
        for name in different
    ]
    return f"{len(different)} of {len(ours)} tensors, by up to {max(gaps):.1e}"


def compare_files(before: Path, after: Path, patterns: Sequence[str]) -> tuple[int, list[str]]:
    """Counts the files that either folder has, and tells which are missing or not equal."""
    found = (path for root in (before, after) for p in patterns for path in root.glob(p))
    names = {path.relative_to(before if before in path.parents else after) for path in found}
    differences = []
    for name in sorted(names):
        ours, theirs = before / name, after / name
        if not (ours.is_file() and theirs.is_file()):
            missing = "AFTER" if ours.is_file() else "BEFORE"
            differences.append(f"{name}: missing in {missing}")
        elif ours.read_bytes() != theirs.read_bytes():
            is_weights = name.suffix == ".safetensors"
            how = describe_tensors(ours, theirs) if is_weights else "other bytes"
            differences.append(f"{name}: {how}")
    return len(names), differences


def read_metrics(run: Path) -> list[dict[str, str]]:
    """Reads the logged rows without clocks; each value as JSON, in which NaN equals NaN."""
    file = run / "metrics.jsonl"
    rows = map(json.loads, file.read_text().splitlines()) if file.is_file() else ()
    return [
        {key: json.dumps(value) for key, value in row.items() if key not in CLOCKS}
        for row in rows
        if row["kind"] != "stage"
    ]


def compare_metrics(before: Path, after: Path) -> tuple[int, list[str]]:
    """Counts the logged rows and tells how many differ, and the first that does."""
    ours, theirs = read_metrics(before), read_metrics(after)
    pairs = list(itertools.zip_longest(ours, theirs, fillvalue={}))
    different = [(a, b) for a, b in pairs if a != b]
    if not different:
        return len(ours), []
    first, second = different[0]
    keys = sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
    place = " ".join((first or second).get(key, "") for key in ("kind", "stage", "step"))
    shown = ", ".join(f"{key} {first.get(key)} and {second.get(key)}" for key in keys[:3])
    told = f"{len(different)} of {len(pairs)} lines, the first ({place}): {shown}"
    return len(ours), [f"metrics.jsonl: {told}"]


def read_scores(run: Path) -> dict[str, str]:
    """Reads each model's scores and what the students kept, as JSON by name."""
    file = run / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {"models": []}
    scores = {
        f"{model['role']} {model['name']} {key}": json.dumps(model[key], sort_keys=True)
        for model in results["models"]
        if model["stage"] is not None  # the linear model beside them is no model of the run
        for key in SCORES
        if key in model
    }
    whole = {key: json.dumps(results.get(key)) for key in ("share_kept", "heldout")}
    return scores | whole


def compare(title: str, before: Path, after: Path) -> list[str]:
    """Compares two run folders, prints a line and the differences, and returns these."""
    weights = [f"{folder}/model*.safetensors" for folder in ("models/*", "hf/**")]
    counts, differences = {}, []
    kinds = {"models": weights, "projections": ["models/*/projection.safetensors"]}
    for kind, patterns in kinds.items():
        counts[kind], told = compare_files(before, after, patterns)
        differences += told
    if before.name == "stores":
        stores = before.with_name("store"), after.with_name("store")
        counts["shard files"], told = compare_files(*stores, ["shard-*"])
        differences += told
    counts["metric lines"], told = compare_metrics(before, after)
    differences += told
    ours, theirs = read_scores(before), read_scores(after)
    counts["scores"] = len(ours)
    names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    differences += [f"results.json, {n}: {ours.get(n)} and {theirs.get(n)}" for n in names]
    if not (counts["models"] and counts["metric lines"]):
        differences.append("nothing to compare")
    told = ", ".join(f"{kind} {count}" for kind, count in counts.items() if count)
    print(f"{title}: {'DIFFERENT' if differences else 'equal'} ({told})", flush=True)
    for difference in differences:
        print(f"  {difference}", flush=True)
    return differences


# Versions


def git(*words: str) -> str:
    """Runs git in the current folder and returns what it printed."""
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`git {' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def checked_out(version: str, scratch: Path) -> Iterator[Path]:
    """Gives the folder of a version: the checkout itself, or a worktree for as long as it lasts."""
    folder = Path(version).expanduser().resolve()
    if (folder / "tinybert_jax").is_dir():
        yield folder
        return
    commit = git("rev-parse", "--verify", f"{version}^{{commit}}")
    worktree = scratch / f"worktree-{commit}"
    git("worktree", "add", "--quiet", "--detach", str(worktree), commit)
    try:
        yield worktree
    finally:
        git("worktree", "remove", "--force", str(worktree))


def locked(root: Path) -> int:
    """Waits until no other comparison uses the folder, nor a run that one of them left behind.

    The runs inherit the file that this returns: the lock is free when the last of them has ended.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another comparison in {root}", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def fingerprint(checkout: Path) -> str:
    """Hashes what decides a version's outputs: its package, its inputs, the packages it uses."""
    files = [path for end in ("py", "yaml") for path in checkout.glob(f"tinybert_jax/**/*.{end}")]
    digest = hashlib.sha256(sys.version.encode() + Path(inputs.__file__).read_bytes())
    for name in PACKAGES:
        digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    for name, path in sorted((str(p.relative_to(checkout)), p) for p in files):
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def run_before(before: Side, pool: ThreadPoolExecutor) -> None:
    """Runs what is missing of BEFORE: first the teacher of the others, at last what is killed."""
    run_once(before, "six")
    others = [pool.submit(run_once, before, name) for name in RUNS if name != "six"]
    others += [pool.submit(begin_once, before, name) for name in KILLED_IN]
    for task in others:
        task.result()


def run_after(before: Side, after: Side, pool: ThreadPoolExecutor) -> bool:
    """Runs all of AFTER, tells of each run as soon as it is done, and whether all are equal."""
    tasks = [
        (title, name, name, pool.submit(run_once, after, name)) for name, title in RUNS.items()
    ]
    tasks += [
        (f"{RUNS[name]}, {stage} resumed", name, f"{name}-killed", task)
        for name, stage in KILLED_IN.items()
        for task in [pool.submit(resume, before, after, name)]
    ]
    is_equal = True
    for title, name, run, task in tasks:
        try:
            task.result()
        except RuntimeError as error:
            print(f"{title}: FAILED\n  {error}", flush=True)
            is_equal = False
        else:
            is_equal &= not compare(title, before.work / name, after.work / run)
    return is_equal


def main() -> int:
    """Compares the two versions of the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", help="a git revision or the folder of a checkout")
    parser.add_argument("after", nargs="?", help="the same; default: the current checkout")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where outputs stay for next time")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        root = (arguments.keep or scratch).expanduser().resolve() / "same_bits"
        lock, sides = locked(root), []
        for label, version in (("before", arguments.before), ("after", arguments.after)):
            version = version or git("rev-parse", "--show-toplevel")
            (scratch / label).mkdir()
            checkout = stack.enter_context(checked_out(version, scratch / label))
            own = f"{label}-{fingerprint(checkout)}" if label == "before" else label
            sides.append(Side(label.upper(), checkout, root / own, root / "cache", lock))
        before, after = sides
        begin = time.monotonic()
        prepare(before, after, root / "inputs")
        pool = stack.enter_context(ThreadPoolExecutor(arguments.jobs))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # where something fails
        run_before(before, pool)
        is_equal = run_after(before, after, pool)
    outcome = "the same bits" if is_equal else "NOT the same bits"
    print(f"{outcome} ({time.monotonic() - begin:.0f} s)")
    return 0 if is_equal else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the worktrees are removed then, too
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(f"same_bits: {error}")
