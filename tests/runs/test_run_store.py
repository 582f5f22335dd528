"""A run folder is copied in generations; what is fetched is what was copied, or is refused."""

import atexit
import functools
import importlib.util
import json
import shutil
import tempfile
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tinybert_jax import cli
from tinybert_jax.performance import disk
from tinybert_jax.runs import run_store
from tinybert_jax.runs.run_store import RunStore, open_store
from tinybert_jax.training import checkpoint
from tinybert_jax.training.generations import Generations
from tinybert_jax.training.manifest import find_damage
from tinybert_jax.training.saver import SaveError, Saver


class RefusedError(Exception):
    """No OSError: the clients of object stores have such exceptions."""


class Flaky(MemoryFileSystem):
    """Refuses `refusals` writes after `passed` more, and keeps the names of those that it did."""

    protocol = "flaky"
    store: dict = {}
    pseudo_dirs = [""]
    refusals, passed, written = 0, 0, []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _open(self, path, mode="rb", **options):
        if mode == "wb":
            if self.passed == 0 and self.refusals:
                Flaky.refusals -= 1
                raise RefusedError("503 try later")
            Flaky.passed = max(self.passed - 1, 0)
            self.written.append(path)
        return super()._open(path, mode, **options)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    for files in (MemoryFileSystem, Flaky):
        files.store.clear()
    Flaky.refusals, Flaky.passed, Flaky.written = 0, 0, []
    place = str(tmp_path / "store") if request.param == "file" else "/bucket/run"
    return f"{request.param}://{place}"


flaky_only = pytest.mark.parametrize("url", ["flaky"], indirect=True)
local_only = pytest.mark.parametrize("url", ["file"], indirect=True)


def _write_run(folder, steps=(4, 8)):
    """What a run has written in the middle of its second stage."""
    texts = {"config.yaml": "seed: 0", "inputs.json": '{"data": {"corpus": "a"}, "models": {}}'}
    texts |= {"stages/finetune.json": "{}", "models/finetune/config.json": "{}"}
    texts |= {"models/finetune/model.safetensors": "weights", "tokenizer/tokenizer.json": "{}"}
    texts |= {"teacher_logits/key/0.safetensors": "logits", "hf/config.json": "{}"}
    texts |= {".lock": "", "profile/trace": "t", "teacher_logits/key/1.partial": "p"}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for step in steps:
        _save(folder, step)
    (folder / "checkpoints/prediction/last/partial-9").mkdir(parents=True)


def _save(folder, step):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {step}}}\n')
    for kind in ("best", "last"):
        states = folder / "checkpoints" / "prediction" / kind
        shutil.copytree(_checkpoint(step), states / str(step))
        checkpoint.prune(states, last=2)


@functools.cache
def _checkpoint(step):
    """Written once: Orbax is slow."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return checkpoint.save(folder, step, {"a": np.full(300, step, np.float32)}, {"step": step})


def _files(folder):
    """What a copy has to hold, by name."""
    left_out = ("profile", ".", "checkpoints/prediction/last/partial-9", "teacher_logits/key/1")
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(left_out)}


def _open(url, folder, check=lambda file: None):
    said = []
    return open_store(url, folder, check, said.append), said


def _copy(url, folder):
    store, _ = _open(url, folder)
    store.copy()
    return store


def test_a_missing_folder_is_fetched_as_it_was(url, tmp_path):
    _write_run(tmp_path / "run")
    _copy(url, tmp_path / "run")
    _, said = _open(url, tmp_path / "new")
    assert _files(tmp_path / "new") == _files(tmp_path / "run")
    assert not (tmp_path / "new" / "profile").exists()
    assert said == [f"run_store: fetched generation 1 of {url}, 0.0 MB"]
    assert find_damage(tmp_path / "new/checkpoints/prediction/last/8") is None


@flaky_only
def test_only_what_has_changed_is_sent(url, tmp_path):
    _write_run(tmp_path / "run")
    store = _copy(url, tmp_path / "run")
    Flaky.written.clear()
    store.copy()
    assert not Flaky.written
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10}\n')
    store.copy()
    _copy(url, tmp_path / "run")  # in another process
    assert [path.split("/")[-2] for path in Flaky.written] == ["objects", "generations"]


def test_older_generations_are_removed_with_their_objects(url, tmp_path):
    _write_run(tmp_path / "run")
    store = _copy(url, tmp_path / "run")
    for step in (12, 16, 20):
        _save(tmp_path / "run", step)
        store.copy()
    found = Generations(url)
    assert [generation.number for generation in found.kept] == [4, 3]
    files, root = fsspec.core.url_to_fs(url)
    objects = {path.rsplit("/", 1)[-1] for path in files.ls(f"{root}/objects", detail=False)}
    assert objects == {f.sha256 for own in found.kept for f in own.files.values()}
    _open(url, tmp_path / "new")
    assert checkpoint.steps(tmp_path / "new/checkpoints/prediction/last") == [16, 20]


@flaky_only
def test_a_copy_that_ends_anywhere_leaves_the_generation_before_it(url, tmp_path):
    _write_run(tmp_path / "run")
    _copy(url, tmp_path / "run")
    before, number = _files(tmp_path / "run"), 0
    _save(tmp_path / "run", 12)
    while True:
        Flaky.refusals, Flaky.passed = 1, number
        try:
            _copy(url, tmp_path / "run")
            break
        except OSError as error:
            assert "RefusedError: 503 try later" in str(error)
        Flaky.refusals = 0
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        _open(url, tmp_path / "new")
        assert _files(tmp_path / "new") == before
        number += 3
    assert number > 10
    Flaky.refusals = 0
    shutil.rmtree(tmp_path / "new")
    _open(url, tmp_path / "new")
    assert _files(tmp_path / "new") == _files(tmp_path / "run")


@flaky_only
@pytest.mark.parametrize("refusals", [2, 1000])
def test_a_store_that_refuses_is_tried_again(url, tmp_path, refusals):
    _write_run(tmp_path / "run")
    store, _ = _open(url, tmp_path / "run")
    said, Flaky.refusals = [], refusals
    saver = Saver(said.append)
    saver.copy_with(f"copying to {url}", store.copy)
    if refusals == 2:
        saver.drain()
        assert len(Generations(url).kept) == 1
    else:
        with pytest.raises(SaveError, match=f"copying to {url} was refused 4 times: RefusedError"):
            saver.drain()
        with pytest.raises(SaveError):  # the next step
            saver.check()
    assert said == [
        f"copying to {url} was refused (RefusedError: 503 try later); it is tried again"
    ]


def test_a_write_is_followed_by_a_copy_and_does_not_wait_for_it(url, tmp_path):
    _write_run(tmp_path / "run")
    store, _ = _open(url, tmp_path / "run")
    saver, calls, is_written = Saver(print), [], threading.Event()

    def copy():
        calls.append(None)
        assert is_written.wait(60)
        store.copy()

    saver.copy_with("copying", copy)
    for step in (12, 16):
        saver.submit("saving", lambda step=step: _save(tmp_path / "run", step))
    saver.wait()
    is_written.set()
    saver.drain()
    newest = Generations(url).kept[0].files
    assert "checkpoints/prediction/last/16/manifest.json" in newest and len(calls) == 2


@local_only
def test_a_flipped_bit_is_found(url, tmp_path):
    """The part is left out and said where a run can make it again; else an older one is taken."""
    _write_run(tmp_path / "run")
    store = _copy(url, tmp_path / "run")
    _save(tmp_path / "run", 12)
    store.copy()
    right, rng = _files(tmp_path / "run"), np.random.default_rng(0)
    newest, outcomes = store.generations.kept[0], set()
    of_part = {run_store._part_of(name): file.sha256 for name, file in newest.files.items()}
    names = {newest.name, *of_part.values()}  # of each part one file
    for file in [file for file in (tmp_path / "store").rglob("*") if file.name in names]:
        content = file.read_bytes()
        place, spoilt = int(rng.integers(8 * len(content))), bytearray(content)
        spoilt[place // 8] ^= 1 << place % 8
        file.write_bytes(spoilt)
        assert cli.main(["ckpt", "verify", url]) == 3
        new = tmp_path / "new"
        shutil.rmtree(new, ignore_errors=True)
        try:
            _, said = _open(url, new)
        except ValueError as error:
            assert "run_store: expected an intact generation" in str(error)
            assert not _files(new)
            outcomes.add("refused")
        else:
            is_older = "fetched generation 1 " in said[-1]
            assert len(said) > 1
            outcomes.add("older" if is_older else "left out")
            for name, found in _files(new).items():
                if not (is_older and name == "metrics.jsonl") and name in right:
                    assert found == right[name], name
            assert checkpoint.steps(new / "checkpoints/prediction/last")
        file.write_bytes(content)
    assert outcomes == {"refused", "older", "left out"}
    assert cli.main(["ckpt", "verify", url]) == 0


@local_only
def test_a_finished_stage_needs_none_of_its_states(url, tmp_path):
    """As where `keep_every` has kept one, which is damaged; its model is what a run reads."""
    run = tmp_path / "run"
    _write_run(run, steps=(4,))
    for name in ("stages/prediction.json", "models/prediction/config.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("{}")
    store = _copy(url, run)
    state = "checkpoints/prediction/last/4/meta.json"
    damaged = store.generations.kept[0].files[state].sha256
    next(tmp_path.glob(f"store/**/{damaged}")).write_text("{}")
    _, said = _open(url, tmp_path / "new")
    assert "leaves checkpoints/prediction/last/4 " in said[0] and "fetched" in said[-1]
    assert (tmp_path / "new/models/prediction/config.json").is_file()


@local_only
def test_a_finished_stage_is_ahead_of_its_states(url, tmp_path):
    """The store has the states that the run has removed since; the run is further all the same."""
    run = tmp_path / "run"
    _write_run(run)
    _copy(url, run)
    for name in ("stages/prediction.json", "models/prediction/config.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("{}")
    shutil.rmtree(run / "checkpoints")
    (run / ".run_store.json").unlink()  # as on a machine that knows nothing of the store
    before = _files(run)
    _open(url, run)
    assert _files(run) == before


def test_a_run_of_another_config_or_other_inputs_is_refused(url, tmp_path):
    def refuse(file):
        assert file.read_text() == "seed: 0"
        raise ValueError("run_store: another config")

    _write_run(tmp_path / "run")
    _copy(url, tmp_path / "run")
    with pytest.raises(ValueError, match="another config"):
        _open(url, tmp_path / "new", refuse)
    assert not _files(tmp_path / "new")
    _write_run(tmp_path / "other")
    (tmp_path / "other" / "inputs.json").write_text('{"data": {"corpus": "b"}, "models": {}}')
    with pytest.raises(ValueError, match="other content of corpus than .*; choose another run_st"):
        _open(url, tmp_path / "other")


def test_the_newer_of_folder_and_store_wins(url, tmp_path):
    _write_run(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "stale")
    _save(tmp_path / "run", 12)
    _copy(url, tmp_path / "run")
    _save(tmp_path / "run", 16)  # killed before it was copied
    newest = _files(tmp_path / "run")
    assert _open(url, tmp_path / "run")[1] == []
    assert _files(tmp_path / "run") == newest
    _copy(url, tmp_path / "run")
    (_, said) = _open(url, tmp_path / "stale")  # the disk of an earlier machine
    assert _files(tmp_path / "stale") == newest and "fetched generation 2" in said[0]
    # A folder of which only the hidden files are left is fetched again.
    for path in (tmp_path / "stale").glob("[!.]*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _open(url, tmp_path / "stale")
    assert _files(tmp_path / "stale") == newest
    # What a user removes from a folder that was copied stays removed.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "prediction")
    assert _open(url, tmp_path / "run")[1] == []
    assert not (tmp_path / "run" / "checkpoints" / "prediction").exists()


@local_only
@pytest.mark.parametrize("number", range(12))
def test_a_fetch_that_ends_anywhere_is_done_again(url, tmp_path, monkeypatch, number):
    _write_run(tmp_path / "run")
    _copy(url, tmp_path / "run")
    _write_run(tmp_path / "new", steps=())
    left, calls = tmp_path / "left", []
    sync = disk.sync
    rename = Path.rename

    def cut(call):
        def counted(*arguments):
            if len(calls) == number and not left.exists():  # as a kill would leave it
                shutil.copytree(tmp_path / "new", left)
            calls.append(call)
            return call(*arguments)

        return counted

    monkeypatch.setattr(disk, "sync", cut(sync))
    monkeypatch.setattr(Path, "rename", cut(rename))
    monkeypatch.setattr(disk, "sync_tree", lambda folder: None)
    _open(url, tmp_path / "new")
    monkeypatch.undo()
    assert len(calls) > number
    _open(url, left)
    assert _files(left) == _files(tmp_path / "run")


def test_two_runs_do_not_copy_to_one_store(url, tmp_path):
    _write_run(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    first, second = (_open(url, tmp_path / name)[0] for name in ("run", "other"))
    first.copy()
    with pytest.raises(OSError, match="another run copies to it: it has written generation 0000"):
        second.copy()
    _save(tmp_path / "run", 12)
    first.copy()
    _open(url, tmp_path / "new")
    assert _files(tmp_path / "new") == _files(tmp_path / "run")


@local_only
def test_a_checkpoint_that_is_damaged_here_is_not_copied(url, tmp_path):
    _write_run(tmp_path / "run")
    (tmp_path / "run/checkpoints/prediction/last/8/meta.json").write_text("{}")
    store, said = _open(url, tmp_path / "run")
    store.copy()
    assert len(said) == 1 and "checkpoints/prediction/last/8 is damaged here" in said[0]
    _open(url, tmp_path / "new")
    assert checkpoint.steps(tmp_path / "new/checkpoints/prediction/last") == [4]


@local_only
def test_a_store_that_vanishes_is_a_refusal(url, tmp_path, monkeypatch):
    """Not a file of the run that was removed meanwhile."""
    _write_run(tmp_path / "run")
    store, _ = _open(url, tmp_path / "run")
    monkeypatch.setattr(store.generations._files, "auto_mkdir", False)
    with pytest.raises(OSError, match="FileNotFoundError"):
        store.copy()


@local_only
def test_a_store_that_cannot_be_read_is_not_empty(url, tmp_path):
    _write_run(tmp_path / "run")
    _copy(url, tmp_path / "run")
    (tmp_path / "store").rename(tmp_path / "aside")
    (tmp_path / "store").write_text("a file")
    with pytest.raises(OSError, match="cannot be read: Not a directory") as raised:
        _open(url, tmp_path / "new")
    assert str(raised.value).startswith(f"run_store: {url}")
    assert not (tmp_path / "new").exists()


def test_a_manifest_names_no_file_outside_of_the_folder(url, tmp_path):
    _write_run(tmp_path / "run")
    store = _copy(url, tmp_path / "run")
    files = dict(store.generations.kept[0].files)
    store.generations.commit({**files, "../outside": files["config.yaml"]}, lambda name: None)
    with pytest.raises(ValueError, match="'../outside' lies outside of a run folder"):
        _open(url, tmp_path / "new")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    "bad, parts",
    [
        ("gs://bucket/run", "pip install 'tinybert-jax[gcs]'"),
        ("s3://bucket/run", "pip install 'tinybert-jax[s3]'"),
        ("nowhere://bucket", "expected a URL that fsspec opens, got: Protocol not known"),
    ],
)
def test_a_url_that_cannot_be_opened(bad, parts, tmp_path):
    if importlib.util.find_spec({"gs": "gcsfs", "s3": "s3fs"}.get(bad[:2], "no such package")):
        pytest.skip("is installed")
    with pytest.raises(ValueError) as raised:
        _open(bad, tmp_path / "run")
    assert parts in str(raised.value) and bad in str(raised.value)


@local_only
def test_a_store_inside_of_the_run_folder_is_refused(url, tmp_path):
    with pytest.raises(ValueError, match="expected a place outside of run_dir"):
        _open(str(tmp_path / "run" / "store"), tmp_path / "run")


@local_only
def test_ckpt_takes_the_url(url, tmp_path, capsys):
    _write_run(tmp_path / "run")
    assert cli.main(["ckpt", "ls", url]) == 2
    _copy(url, tmp_path / "run")
    assert cli.main(["ckpt", "ls", url]) == 0
    assert "checkpoints/prediction/last/8 " in capsys.readouterr().out
    assert cli.main(["ckpt", "verify", url]) == 0
    assert cli.main(["ckpt", "fetch", url, "-o", str(tmp_path / "new")]) == 0
    assert _files(tmp_path / "new") == _files(tmp_path / "run")
    assert cli.main(["ckpt", "fetch", url, "-o", str(tmp_path / "new")]) == 2
    assert cli.main(["ckpt", "prune", url]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / run_store._RECORD).read_text())
    assert record["url"] == url and isinstance(_open(url, tmp_path / "run")[0], RunStore)
