"""prepare: the same text gives the same bytes with any workers, after kills and on full disks."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.prepare_world import (
    World,
    contents,
    count_entries,
    make_text,
    read_jsonl,
    same,
    unfinish,
)
from tests.sleeper import make_sleeper
from tinybert_jax import cli
from tinybert_jax.data.errors import LostWorkerError
from tinybert_jax.data.records import Chunk, Piece, Source
from tinybert_jax.huggingface.hub import load_tokenizer
from tinybert_jax.tokens import workers
from tinybert_jax.tokens.store import INDEX, open_store, partial_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.mark.parametrize("mode", ["documents", "pairs"])
def test_a_store_holds_the_text_and_passes_verification(world, mode, capsys):
    assert cli.main(["data", "prepare", str(world.config), f"mode={mode}"]) == 0
    store = open_store(world.folder / "store", verify=True)
    manifest = store.manifest
    assert manifest["num_documents"] == manifest["num_records"] == 300
    assert len((store.folder / INDEX).read_text().splitlines()) > 5
    rows = store.gather(np.arange(store.num_rows))
    assert (rows.segment_ids > 0).sum() == store.num_tokens == manifest["num_tokens"]
    assert rows.segment_ids.max() > 1 or mode == "pairs"
    assert set(np.unique(rows.labels)) == ({-1} if mode == "documents" else {0, 1})
    if mode == "documents":
        tokenizer = load_tokenizer(world.tokenizer)
        ids = tokenizer(world.text.read_text(), add_special_tokens=False)["input_ids"]
        pieces = rows.ids[(rows.segment_ids > 0) & (rows.ids > 4)]
        assert sorted(pieces.tolist()) == sorted(i for i in ids if i > 4)
    capsys.readouterr()
    assert cli.main(["data", "inspect", str(store.folder), "--verify", "-n", "2"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "[CLS]",
        f"rows            {store.num_rows:,} of 32 tokens",
        "verified",
        "unknown tokens",
    ):
        assert part in shown


def test_worker_count_and_repetition_change_no_byte(world):
    one = world.prepare(output=str(world.folder / "one"))
    before = contents(one)
    assert world.prepare(output=str(one)) == one  # the store is complete
    assert contents(one) == before
    same(one, world.prepare(output=str(world.folder / "three"), workers=3))
    other = world.prepare(output=str(world.folder / "other"), seed=1)
    assert (other / "shard-00000.ids").read_bytes() != before["shard-00000.ids"]


def test_names_of_special_tokens_in_a_text_are_tokenised_as_text(world):
    world.text.write_text("a [SEP] b [PAD] c\n")
    rows = open_store(world.prepare()).gather(np.array([0]))
    length = int((rows.segment_ids > 0).sum())
    assert rows.ids[0, 1 : length - 1].min() > 0
    assert (rows.ids[0, :length] == 3).sum() == 1  # only the [SEP] that ends the segment


# Kills


def _kill_when(process, is_time):
    """Sends SIGKILL once `is_time()`; returns whether the process was still running.

    Waits until the worker processes have ended too.
    """
    deadline = time.monotonic() + 120
    while process.poll() is None and not is_time():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = _children(process.pid)
    was_running = process.poll() is None
    process.kill()
    process.wait()
    while any(_is_alive(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlives the parent process"
        time.sleep(0.01)
    return was_running


def _children(pid):
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _kill_and_finish(world, golden, num_kills, moments, **settings):
    """Kills the command at the given moments, lets it finish, compares every byte."""
    output = world.folder / "killed"
    killed = 0
    for moment in range(num_kills):
        process = subprocess.Popen(world.command(output, **settings), cwd=ROOT)
        killed += _kill_when(process, moments(moment, output))
    assert killed == num_kills, "a run finished before the kill: the test needs more text"
    assert not output.exists()
    before = count_entries(output)
    done = subprocess.run(
        world.command(output, **settings), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not before or f"{partial_of(output)}: resumes after" in done.stdout
    assert not partial_of(output).exists()
    same(golden, output)
    return before


def test_a_run_killed_while_it_writes_resumes_with_the_same_bytes(world):
    world.text.write_text(make_text(1500))
    golden = world.prepare(output=str(world.folder / "golden"))
    num_chunks = len((golden / INDEX).read_text().splitlines())

    def moments(kill, output):
        return lambda: count_entries(output) >= [3, num_chunks // 2][kill]

    assert _kill_and_finish(world, golden, 2, moments, workers=2) >= num_chunks // 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["documents", "pairs"])
def test_a_run_killed_at_ten_random_moments_resumes_with_the_same_bytes(world, mode):
    world.text.write_text(make_text(60_000))
    golden = world.prepare(output=str(world.folder / "golden"), mode=mode)
    rng = random.Random(mode)

    def moments(kill, output):
        # One kill in four while the run starts; the others some time after the first new chunk.
        delay, before, first = rng.uniform(0, 0.8), count_entries(output), []
        if kill % 4 == 3:
            start = time.monotonic()
            return lambda: time.monotonic() - start > 4 * delay

        def is_time():
            if count_entries(output) > before and not first:
                first.append(time.monotonic())
            return bool(first) and time.monotonic() - first[0] > delay

        return is_time

    assert _kill_and_finish(world, golden, 10, moments, workers=2, mode=mode) > 0


def test_a_killed_worker_is_named_and_the_next_run_resumes(world):
    world.text.write_text(make_text(1500))
    output = world.folder / "store"
    command = world.command(output, workers=2)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while count_entries(output) < 2:
        assert process.poll() is None
        time.sleep(0.002)
    worker = _children(process.pid)[-1]
    os.kill(worker, signal.SIGKILL)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 4
    assert message.count("\n") == 1
    found = re.fullmatch(
        rf"tinybert: data worker {worker}: expected a running process; got one killed by SIGKILL"
        rf"(, at work on {world.text} from line \d+ on)?; fix: run the same command again, which "
        "resumes; with fewer workers or a smaller chunk_bytes if memory ran out\n",
        message,
    )
    assert found, message
    world.prepare()
    same(output, world.prepare(output=str(world.folder / "golden")))


def test_a_stopped_worker_is_named_within_the_patience_and_the_next_run_resumes(
    world, monkeypatch, capfd
):
    monkeypatch.setattr(workers, "PATIENCE", 3.0)
    world.text.write_text(make_text(1500))
    output, stopped = world.folder / "store", []

    def stop_a_worker():
        while count_entries(output) < 2:
            time.sleep(0.002)
        stopped.append((multiprocessing.active_children()[0].pid, time.monotonic()))
        os.kill(stopped[0][0], signal.SIGSTOP)

    thread = threading.Thread(target=stop_a_worker, daemon=True)
    thread.start()
    status = cli.main(["data", "prepare", str(world.config), f"output={output}", "workers=2"])
    seconds = time.monotonic() - stopped[0][1]
    message = capfd.readouterr().err
    assert status == 4
    assert seconds < 60
    assert message.count("\n") == 1
    assert message.startswith(
        f"tinybert: data worker {stopped[0][0]}: expected a running process; got one stopped by a "
        f"signal (SIGSTOP), without progress for 3 s, at work on {world.text} from line "
    )
    thread.join()
    assert not multiprocessing.active_children()
    world.prepare()
    same(output, world.prepare(output=str(world.folder / "golden")))


def test_workers_that_go_on_within_the_patience_change_no_byte(world, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 20.0)
    world.text.write_text(make_text(1500))
    golden = world.prepare(output=str(world.folder / "golden"))
    stopped = []

    def stop_and_continue():
        while not count_entries(world.folder / "store"):
            time.sleep(0.002)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGSTOP)
            stopped.append(worker.pid)
        time.sleep(1.5)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop_and_continue, daemon=True)
    thread.start()
    same(golden, world.prepare(workers=2))
    thread.join()
    assert len(stopped) == 2


def test_a_worker_that_hangs_and_one_that_raises_are_reported(monkeypatch):
    """Workers that sleep in a call: they are not stopped, and use no processor time."""
    monkeypatch.setattr(workers, "PATIENCE", 3.0)
    chunks = [Chunk(0, 0, [Piece(Source("a.txt", ".txt", 9, 0), 7, b"")])]
    with pytest.raises(LostWorkerError, match="one that hangs, .*at work on a.txt from line 7"):
        list(workers.run_in_processes(make_sleeper, 1000.0, chunks, 1))
    with pytest.raises(OverflowError, match="out of range"):
        list(workers.run_in_processes(make_sleeper, 1e300, chunks, 1))
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_ray_gives_the_same_bytes_and_resumes(world):
    pytest.importorskip("ray")
    for number in range(3):  # several groups of files, several chunks a group
        (world.folder / f"more{number}.txt").write_text(make_text(100, seed=number))
    settings = {"sources": [str(world.folder / "more*.txt"), str(world.text)]}
    output = world.prepare(**settings)
    golden = world.prepare(output=str(world.folder / "golden"), **settings)
    unfinish(output)
    given = {"engine": "ray", "workers": 2, "sources": json.dumps(settings["sources"])}
    for store in (output, world.folder / "fresh"):
        done = subprocess.run(
            world.command(store, **given), cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        same(golden, store)


# Full disk


def test_a_failed_write_is_reported_and_leaves_complete_chunks(world):
    """A limit on file size instead of a full disk: the write fails in the middle of a chunk."""
    golden = world.prepare(output=str(world.folder / "golden"), shard_rows=10**6)
    limit = (golden / "shard-00000.ids").stat().st_size // 2
    output = world.folder / "store"
    limited = (  # the child sets the limit: a fork of a process with JAX's threads may hang
        "import os, resource, sys; limit = int(sys.argv[1]); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); "
        "os.execv(sys.argv[2], sys.argv[2:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, str(limit), *world.command(output, shard_rows=10**6)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"output: {output}.partial: expected room on the disk; got File too large" in done.stderr
    assert "run the same command again to resume" in done.stderr
    assert not output.exists()
    entries = read_jsonl(partial_of(output) / INDEX)
    rows = sum(entry["rows"] for entry in entries)
    assert rows and (partial_of(output) / "shard-00000.ids").stat().st_size == rows * 32 * 2
    same(golden, world.prepare(output=str(output), shard_rows=10**6))


@pytest.mark.slow
def test_a_full_disk_is_reported(world):
    disk = world.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        world.text.write_text(make_text(1500))
        world.refused("room on the disk; got No space left", output=str(disk / "store"))
        assert not (disk / "store").exists()
        assert subprocess.run(["mount", "-o", "remount,size=20m", str(disk)]).returncode == 0
        same(world.prepare(output=str(disk / "store")), world.prepare())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
