"""Saves on a storage that fails; test_storage.py runs this file with the library that fails it."""

import errno
import os
import time

import jax
import jax.numpy as jnp
import pytest
from faulty import after_power_loss

from tinybert_jax.training import checkpoint
from tinybert_jax.training.metric_log import MetricLog, read_rows
from tinybert_jax.training.saver import SaveError, Saver

SOON = 30.0  # seconds; a save that hangs takes 300


def _tree(value):
    """Many arrays: more than one write is under way when one is refused."""
    arrays = {f"a{i}": jnp.full((64, 50), value + i, jnp.float32) for i in range(24)}
    return arrays | {"key": jax.random.key(3)}


def _abstract():
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), _tree(0)
    )


@pytest.fixture
def said(monkeypatch):
    lines = []
    yield lines
    for name in ("FAULTY_PATH", "FAULTY_READS", "FAULTY_DELAY", "FAULTY_SHADOW"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULTY_ROOT", str(tmp_path))
    return tmp_path / "last"


def _save(saver, folder, step):
    tree = checkpoint.fetch(_tree(step))
    saver.submit(f"saving step {step}", lambda: checkpoint.write(folder, step, tree, "{}"))


def _newest(folder):
    restored = checkpoint.restore_newest(folder, _abstract())
    assert float(restored.tree["a0"][0, 0]) == restored.step
    return restored.step


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_write_that_is_refused_for_a_moment_is_tried_again(folder, said, monkeypatch, number):
    saver = Saver(said.append)
    monkeypatch.setenv("FAULTY_ERRNO", str(number))
    monkeypatch.setenv("FAULTY_SECONDS", "0.25")
    place = "" if number == errno.EROFS else f"/state{'.' if number == errno.EIO else ''}"
    monkeypatch.setenv("FAULTY_PATH", f"{folder}/partial-2{place}")
    for step in (1, 2):
        _save(saver, folder, step)
    saver.wait()
    assert _newest(folder) == 2
    (line,) = said
    assert line.startswith(f"saving step 2 was refused ({os.strerror(number)}")
    assert line.endswith("; it is tried again")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("part", ["partial-2", "partial-2/state", "partial-2/manifest.json"])
def test_a_write_that_is_refused_for_good_says_so_soon(
    folder, said, monkeypatch, capfd, number, part
):
    saver, start = Saver(said.append), time.monotonic()
    _save(saver, folder, 1)
    saver.wait()
    monkeypatch.setenv("FAULTY_ERRNO", str(number))
    monkeypatch.setenv("FAULTY_SECONDS", "1e9")
    monkeypatch.setenv("FAULTY_PATH", f"{folder}/{part}")
    _save(saver, folder, 2)
    with pytest.raises(SaveError, match="saving step 2 was refused 4 times") as raised:
        saver.wait()
    assert time.monotonic() - start < SOON
    assert os.strerror(number) in str(raised.value) and "\n" not in str(raised.value)
    assert len(said) == 1 and capfd.readouterr().err == ""
    assert _newest(folder) == 1


def test_a_step_does_not_wait_for_a_slow_storage(folder, said, monkeypatch):
    monkeypatch.setenv("FAULTY_DELAY", "100")
    saver, start = Saver(said.append), time.monotonic()
    _save(saver, folder, 1)
    submitted = time.monotonic() - start
    saver.wait()
    assert submitted < (time.monotonic() - start) / 2
    assert _newest(folder) == 1 and not said


@pytest.mark.parametrize("part", ["1/state", "1/manifest.json"])
def test_a_storage_that_cannot_be_read_is_no_damage(folder, said, monkeypatch, part):
    saver = Saver(said.append)
    _save(saver, folder, 1)
    saver.wait()
    monkeypatch.setenv("FAULTY_ERRNO", str(errno.EIO))
    monkeypatch.setenv("FAULTY_READS", "1")
    monkeypatch.setenv("FAULTY_SECONDS", "1e9")
    monkeypatch.setenv("FAULTY_PATH", f"{folder}/{part}")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        checkpoint.restore_newest(folder, _abstract())
    monkeypatch.setenv("FAULTY_PATH", "/no such path")  # the storage works again
    assert _newest(folder) == 1


def test_a_committed_checkpoint_outlasts_a_loss_of_power(tmp_path, said, monkeypatch):
    root, shadow = tmp_path / "root", tmp_path / "shadow"
    root.mkdir()
    shadow.mkdir()
    monkeypatch.setenv("FAULTY_ROOT", str(root))
    monkeypatch.setenv("FAULTY_SHADOW", str(shadow))
    saver, found = Saver(said.append), []
    for step in (1, 2, 3):
        _save(saver, root / "stage" / "last", step)
        saver.wait()
        left = tmp_path / f"left-{step}"
        after_power_loss(root, shadow, left)
        found.append(_newest(left / "stage" / "last"))
        lost = f"stage/last/lost-{step}"
        (root / lost).write_text("written, and never synced")
        after_power_loss(root, shadow, left)
        assert not (left / lost).exists()
    assert found == [1, 2, 3]


def test_rows_of_metrics_outlast_a_loss_of_power(tmp_path, said, monkeypatch):
    """Those of steps before a state, also where a resumed run has rewritten the file."""
    root, shadow = tmp_path / "root", tmp_path / "shadow"
    root.mkdir()
    shadow.mkdir()
    monkeypatch.setenv("FAULTY_ROOT", str(root))
    monkeypatch.setenv("FAULTY_SHADOW", str(shadow))
    log = MetricLog(root / "metrics.jsonl")
    for step in (1, 2):
        log.write("train", "finetune", step, {"loss": 1.0})
    log.sync()
    after_power_loss(root, shadow, tmp_path / "left")
    assert len(read_rows(tmp_path / "left" / "metrics.jsonl")) == 2
    log.rewind("finetune", 1)
    after_power_loss(root, shadow, tmp_path / "left")
    assert [row["step"] for row in read_rows(tmp_path / "left" / "metrics.jsonl")] == [1]


def test_the_clock_may_be_wrong(folder, said, monkeypatch):
    saver = Saver(said.append)
    for step, seconds in ((1, "0"), (2, "-500000000"), (3, "500000000"), (4, "-500000000")):
        monkeypatch.setenv("FAULTY_CLOCK", seconds)
        _save(saver, folder, step)
        saver.wait()
        assert _newest(folder) == step
    monkeypatch.delenv("FAULTY_CLOCK")
    assert checkpoint.steps(folder) == [1, 2, 3, 4]
