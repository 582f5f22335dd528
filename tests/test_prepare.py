"""prepare: same text, same bytes, however often it is killed; what changed is refused by name."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import BertTokenizer

from tests.reference import write_vocab
from tinybert_jax import cli, config
from tinybert_jax.convert import hf_folder
from tinybert_jax.data import prepare
from tinybert_jax.data.store import INDEX, open_store, partial_of
from tinybert_jax.data_sections import PrepareConfig

ROOT = Path(__file__).parent.parent


def _text(num_documents, seed=0):
    """Documents of sentences of made-up words; a fixed text for a seed."""
    rng = random.Random(seed)
    documents = []
    for _ in range(num_documents):
        lines = []
        for _ in range(rng.randint(1, 9)):
            words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 6))) for _ in range(12)]
            lines.append(" ".join(words).capitalize() + ".")
        documents.append("\n".join(lines))
    return "\n\n".join(documents) + "\n"


class World:
    """A folder with a text, a tokenizer and a config."""

    def __init__(self, folder):
        self.folder = folder
        self.text, self.tokenizer = folder / "text.txt", folder / "tokenizer"
        self.text.write_text(_text(300))
        BertTokenizer.from_pretrained(str(write_vocab(folder / "vocab"))).save_pretrained(
            str(self.tokenizer)
        )
        self.settings = {
            "output": str(folder / "store"),
            "sources": [str(self.text)],
            "tokenizer": str(self.tokenizer),
            "width": 32,
            "chunk_bytes": 8000,
            "shard_rows": 200,
            "workers": 1,
        }
        self.config = folder / "prepare.yaml"
        self.config.write_text(yaml.safe_dump(self.settings))

    def prepare(self, **settings):
        loaded = PrepareConfig(**self.settings | settings)
        return prepare.prepare(loaded, hf_folder.load_tokenizer(loaded.tokenizer))

    def command(self, output, **settings):
        given = [f"{name}={value}" for name, value in settings.items()]
        arguments = ["data", "prepare", str(self.config), f"output={output}", *given]
        return [sys.executable, "-m", "tinybert_jax", *arguments]

    def refused(self, *parts, **settings):
        with pytest.raises(ValueError) as caught:
            self.prepare(**settings)
        for part in (": expected ", "; got ", "; fix: ", *parts):
            assert part in str(caught.value)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def _lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _same(first, second):
    first, second = _contents(first), _contents(second)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name] == second[name], name


@pytest.mark.parametrize("mode", ["documents", "pairs"])
def test_a_store_holds_the_text_and_verifies(world, mode, capsys):
    assert cli.main(["data", "prepare", str(world.config), f"mode={mode}"]) == 0
    store = open_store(world.folder / "store", verify=True)
    facts = store.manifest
    assert facts["num_documents"] == facts["num_records"] == 300
    assert len((store.folder / INDEX).read_text().splitlines()) > 5
    rows = store.gather(np.arange(store.num_rows))
    assert (rows.segment_ids > 0).sum() == store.num_tokens == facts["num_tokens"]
    assert rows.segment_ids.max() > 1 or mode == "pairs"
    assert set(np.unique(rows.labels)) == ({-1} if mode == "documents" else {0, 1})
    if mode == "documents":
        tokenizer = hf_folder.load_tokenizer(world.tokenizer)
        ids = tokenizer(world.text.read_text(), add_special_tokens=False)["input_ids"]
        pieces = rows.ids[(rows.segment_ids > 0) & (rows.ids > 4)]
        assert sorted(pieces.tolist()) == sorted(i for i in ids if i > 4)
    capsys.readouterr()
    assert cli.main(["data", "inspect", str(store.folder), "--verify", "-n", "2"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "[CLS]",
        f"rows            {store.num_rows:,} of 32",
        "verified",
        "unknown tokens",
    ):
        assert part in shown


def test_worker_count_chunks_and_repetition_change_no_byte(world):
    one = world.prepare(output=str(world.folder / "one"))
    before = _contents(one)
    assert world.prepare(output=str(one)) == one  # nothing left to do
    assert _contents(one) == before
    _same(one, world.prepare(output=str(world.folder / "three"), workers=3))
    other = world.prepare(output=str(world.folder / "other"), seed=1)
    assert (other / "shard-00000.ids").read_bytes() != before["shard-00000.ids"]


def test_special_tokens_in_a_text_are_text(world):
    world.text.write_text("a [SEP] b [PAD] c\n")
    rows = open_store(world.prepare()).gather(np.array([0]))
    length = int((rows.segment_ids > 0).sum())
    assert rows.ids[0, 1 : length - 1].min() > 0
    assert (rows.ids[0, :length] == 3).sum() == 1  # the one [SEP] that ends the segment


# Killed


def _entries(output):
    index = partial_of(output) / INDEX
    return index.read_bytes().count(b"\n") if index.is_file() else 0


def _kill_when(process, is_time):
    """SIGKILL once `is_time` says so; its orphans must not live on. Was it still running?"""
    deadline = time.monotonic() + 120
    while process.poll() is None and not is_time():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = _children(process.pid)
    killed = process.poll() is None
    process.kill()
    process.wait()
    while any(_is_alive(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.01)
    return killed


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


def _killed_until_done(world, golden, num_kills, moments, **settings):
    """Kills the real command at the given moments, lets it finish, compares every byte."""
    output = world.folder / "killed"
    killed = 0
    for moment in range(num_kills):
        process = subprocess.Popen(world.command(output, **settings), cwd=ROOT)
        killed += _kill_when(process, moments(moment, output))
    assert killed == num_kills, "a run ended before its kill: give it more text"
    assert not output.exists()
    before = _entries(output)
    done = subprocess.run(
        world.command(output, **settings), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not partial_of(output).exists()
    _same(golden, output)
    return before


def test_killed_while_it_writes_it_goes_on_with_the_same_bytes(world):
    world.text.write_text(_text(1500))
    golden = world.prepare(output=str(world.folder / "golden"))
    num_chunks = len((golden / INDEX).read_text().splitlines())

    def moments(kill, output):
        return lambda: _entries(output) >= [3, num_chunks // 2][kill]

    assert _killed_until_done(world, golden, 2, moments, workers=2) >= num_chunks // 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["documents", "pairs"])
def test_killed_at_ten_random_moments(world, mode):
    world.text.write_text(_text(60_000))
    golden = world.prepare(output=str(world.folder / "golden"), mode=mode)
    rng = random.Random(mode)

    def moments(kill, output):
        # Some while it starts, most while it writes: so long after the first chunk of its own.
        late, before, first = rng.uniform(0, 0.8), _entries(output), []
        if kill % 4 == 3:
            start = time.monotonic()
            return lambda: time.monotonic() - start > 4 * late

        def is_time():
            if _entries(output) > before and not first:
                first.append(time.monotonic())
            return bool(first) and time.monotonic() - first[0] > late

        return is_time

    assert _killed_until_done(world, golden, 10, moments, workers=2, mode=mode) > 0


def test_a_killed_worker_is_told_and_the_next_run_goes_on(world):
    world.text.write_text(_text(1500))
    output = world.folder / "store"
    command = world.command(output, workers=2)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while _entries(output) < 2:
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(_children(process.pid)[-1], signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "workers: expected processes that live; got one that was killed" in told
    world.prepare()
    _same(output, world.prepare(output=str(world.folder / "golden")))


@pytest.mark.slow
def test_ray_gives_the_same_bytes_and_goes_on_too(world):
    pytest.importorskip("ray")
    for number in range(3):  # several groups of files, several chunks a group
        (world.folder / f"more{number}.txt").write_text(_text(100, seed=number))
    settings = {"sources": [str(world.folder / "more*.txt"), str(world.text)]}
    output = world.prepare(**settings)
    golden = world.prepare(output=str(world.folder / "golden"), **settings)
    _unfinish(output)
    given = {"engine": "ray", "workers": 2, "sources": json.dumps(settings["sources"])}
    for store in (output, world.folder / "fresh"):
        done = subprocess.run(
            world.command(store, **given), cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        _same(golden, store)


# No room


def test_no_room_is_told_and_leaves_whole_chunks(world):
    """A limit on file size stands for the full disk: the write fails in the middle of a chunk."""
    golden = world.prepare(output=str(world.folder / "golden"), shard_rows=10**6)
    limit = (golden / "shard-00000.ids").stat().st_size // 2
    output = world.folder / "store"
    limited = (  # by the child itself: a fork of a process with JAX's threads may hang
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
    assert "run the same command again: it goes on" in done.stderr
    assert not output.exists()
    entries = _lines(partial_of(output) / INDEX)
    rows = sum(entry["rows"] for entry in entries)
    assert rows and (partial_of(output) / "shard-00000.ids").stat().st_size == rows * 32 * 2
    _same(golden, world.prepare(output=str(output), shard_rows=10**6))


@pytest.mark.slow
def test_a_full_disk_is_told(world):
    disk = world.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        world.text.write_text(_text(1500))
        world.refused("room on the disk; got No space left", output=str(disk / "store"))
        assert not (disk / "store").exists()
        assert subprocess.run(["mount", "-o", "remount,size=20m", str(disk)]).returncode == 0
        _same(world.prepare(output=str(disk / "store")), world.prepare())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Refused


def _unfinish(output):
    """Takes a store back to where three of its chunks were done."""
    folder = output.rename(partial_of(output))
    facts = json.loads((folder / "manifest.json").read_text())
    kept = {name: facts[name] for name in ("settings", "tokenizer_sha256", "sources")}
    (folder / "identity.json").write_text(json.dumps(kept))
    index = folder / INDEX
    index.write_text("".join(index.read_text().splitlines(True)[:3]))
    (folder / "manifest.json").unlink()


@pytest.fixture(params=["finished", "unfinished"])
def begun(world, request):
    """A world with a store, whole or stopped on the way."""
    output = world.prepare()
    if request.param == "unfinished":
        _unfinish(output)
    return world


def test_what_changed_is_refused_by_name(begun):
    text, path = begun.text.read_text(), str(begun.text)
    begun.text.write_text(text.replace("a", "b", 1))
    begun.refused(f"{path}: expected the source", "got a changed one", "name another output")
    begun.text.write_text(text)
    more = begun.folder / "more.txt"
    more.write_text("more\n")
    both = [path, str(more)]
    begun.refused(f"{more}: expected the source", "got a new one", sources=both)
    begun.refused(f"{path}: expected the source", "got none", sources=[str(more)])
    begun.refused("width: expected 32", "got 48", width=48)
    vocab = (begun.folder / "vocab" / "vocab.txt").read_text()
    (begun.folder / "vocab" / "vocab.txt").write_text(vocab.replace("!", "$"))
    begun.refused("vocab: expected the tokenizer", tokenizer=str(begun.folder / "vocab"))
    begun.prepare()


def test_an_output_that_is_something_else_is_refused(world):
    (world.folder / "store").mkdir()
    world.refused("store: expected a new folder or a store; got something else")


def test_an_output_among_the_sources_is_refused(world):
    inside = world.folder / "text" / "store"
    inside.parent.mkdir()
    world.text.rename(inside.parent / "text.txt")
    world.refused("outside of", sources=[str(inside.parent)], output=str(inside))
    world.prepare(sources=[str(inside.parent)])


def test_a_source_that_changes_while_it_is_read_is_refused(world):
    world.text.write_text(_text(1500))
    output = world.folder / "store"
    process = subprocess.Popen(
        world.command(output), cwd=ROOT, stderr=subprocess.PIPE, text=True, bufsize=0
    )
    while _entries(output) < 2:
        assert process.poll() is None
        time.sleep(0.002)
    with world.text.open("a") as file:
        file.write("\n\nmore\n")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2 and not output.exists()
    assert f"{world.text}: expected text that stays as it is" in told


def test_an_output_in_use_is_refused(world):
    partial = partial_of(world.folder / "store")
    partial.mkdir()
    with (partial / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="output: .*store.partial is in use by another"):
            world.prepare()


def test_bad_records_are_listed_and_stop_past_a_share(world):
    lines = [json.dumps({"text": f"sentence {n}."}) for n in range(200)]
    lines[50], lines[120] = "{", '{"txt": 1}'
    path = world.folder / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    settings = {"sources": [str(path)], "chunk_bytes": 600}
    world.refused(
        "store.partial/bad_records.jsonl: expected at most 0.50% of the records to be bad",
        "got 2, the first: ",
        '"place": "line 51"',
        max_bad_share=0.005,
        **settings,
    )
    store = open_store(world.prepare(max_bad_share=0.01, **settings), verify=True)
    listed = _lines(store.folder / "bad_records.jsonl")
    assert [(bad["source"], bad["place"]) for bad in listed] == [
        (str(path), "line 51"),
        (str(path), "line 121"),
    ]
    assert store.manifest["num_bad_records"] == 2 and store.manifest["num_records"] == 200
    path.write_text("{\n" * 3000)
    world.refused("bad_records.jsonl", output=str(world.folder / "worse"), **settings)
    entries = _entries(world.folder / "worse")
    assert 0 < entries < 10  # it did not read on to the end


def test_no_text_and_no_pairs_are_refused(world):
    world.text.write_text("\n\n")
    world.refused("sources: expected text; got none")
    world.text.write_text("One sentence.\nAnother one.\n")
    world.refused(
        "mode: pairs: expected pairs of texts", mode="pairs", output=str(world.folder / "alone")
    )


# Settings


def test_settings_are_read_and_mistakes_named(world, capsys):
    command = ["data", "prepare", str(world.config), "width=64", "--print-config"]
    assert cli.main(command) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["width"] == 64 and PrepareConfig(**shown).chunk_bytes == 8000
    with pytest.raises(config.ConfigError, match="widht: unknown key; did you mean 'width'"):
        config.load_as(PrepareConfig, world.config, ["widht=64"])
