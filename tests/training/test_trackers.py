"""Trackers get every row; one that raises in every call changes no bit of a run."""

import filecmp
import sys
import types
from pathlib import Path

import pytest
import tiny_inputs

from tinybert_jax import cli
from tinybert_jax.training import trackers
from tinybert_jax.training.metric_log import MetricLog, read_rows

STAGES = {"finetune": tiny_inputs.STAGE | {"num_epochs": 2, "log_every": 1}}


def broken(*args, **kwargs):
    raise ConnectionError("no route to the service")


def fake_module(monkeypatch, name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    module.__spec__ = types.SimpleNamespace(name=name)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def inputs(tmp_path):
    tiny_inputs.write_inputs(tmp_path, **tiny_inputs.TEACHER)
    return tmp_path


def run(inputs: Path, name: str, *names: str) -> Path:
    config = tiny_inputs.write_config(
        inputs / f"{name}.yaml", inputs, inputs / name, log={"trackers": list(names)}, **STAGES
    )
    assert cli.main(["run", config]) == 0
    return inputs / name


def test_a_tracker_that_raises_in_every_call_changes_no_bit(
    inputs, cheap_programs, monkeypatch, capsys
):
    raising = types.SimpleNamespace(log=broken, finish=broken, define_metric=broken)
    fake_module(monkeypatch, "wandb", init=lambda **settings: raising)
    fake_module(monkeypatch, "trackio", init=broken)
    alone = run(inputs, "alone")
    told = run(inputs, "told", "wandb", "trackio")
    output = capsys.readouterr().out
    assert output.count("wandb has failed") == 1
    assert output.count("trackio does not open") == 1
    assert "no route to the service" in output
    assert filecmp.cmp(alone / "hf/model.safetensors", told / "hf/model.safetensors", shallow=False)
    assert len(read_rows(told / "metrics.jsonl")) == len(read_rows(alone / "metrics.jsonl"))


def test_tensorboard_gets_the_rows_of_the_file(inputs):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    folder = run(inputs, "board", "tensorboard")
    (file,) = (folder / "tensorboard").iterdir()
    found = {}
    data = file.read_bytes()
    while data:  # length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert rows
    for row in rows:
        assert found["finetune/train/loss", row["step"]] == pytest.approx(row["loss"], rel=1e-6)


def test_each_stage_counts_its_own_steps_in_wandb(monkeypatch):
    calls = []
    service = types.SimpleNamespace(
        log=lambda values: calls.append(("log", values)),
        define_metric=lambda name, **rest: calls.append(("define", name, rest)),
        finish=lambda: calls.append(("finish",)),
    )
    fake_module(monkeypatch, "wandb", init=lambda **settings: service)
    section = trackers.LogSection(trackers=("wandb",))
    opened = trackers.open_trackers(section, "a run", Path("."), {}, print)
    opened.write("train", "general", 50, {"loss": 0.5, "text": "left out", "nan": float("nan")})
    opened.close()
    assert calls == [
        ("define", "general/step", {"hidden": True}),
        ("define", "general/*", {"step_metric": "general/step"}),
        ("log", {"general/train/loss": 0.5, "general/step": 50}),
        ("finish",),
    ]


def test_a_missing_package_is_told_before_anything_is_written(inputs, monkeypatch, capsys):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = tiny_inputs.write_config(
        inputs / "run.yaml", inputs, inputs / "run", log={"trackers": ["trackio"]}, **STAGES
    )
    assert cli.main(["run", config]) == 2
    assert "pip install 'tinybert-jax[trackio]'" in capsys.readouterr().err
    assert not (inputs / "run").exists()


def test_a_log_without_trackers_writes_its_file(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.write("train", "general", 1, {"loss": 1.0})
    assert [row["loss"] for row in read_rows(log.path)] == [1.0]
