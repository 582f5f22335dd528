"""A run refuses inputs and models that changed since it began, by name, before it trains."""

import fcntl
import json
import os
import shutil

import bad_world
import numpy as np
import pytest

from tinybert_jax import cli
from tinybert_jax.config import load as config_files
from tinybert_jax.performance import host
from tinybert_jax.runs import identity, preflight
from tinybert_jax.runs.run import IDENTITIES, INPUTS

pytestmark = pytest.mark.usefixtures("cheap_programs")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, models):
    """A folder whose run has done finetune; prediction is still to come."""
    folder = tmp_path_factory.mktemp("finished")
    world = bad_world.World(folder, models, None)
    copy = world.model("encoder")
    path = world.config(
        "finetune", "prediction", teacher={"path": str(copy)}, distillation={"teacher_margin": -1}
    )
    assert cli.main(["finetune", path]) == 0
    return folder


@pytest.fixture
def spoilt(finished, tmp_path, capfd):
    """A copy of that folder: (folder, its config, what is printed)."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(finished), str(copy)))
    saved = copy / "run" / "config.yaml"
    saved.write_text(saved.read_text().replace(str(finished), str(copy)))
    record = copy / "run" / INPUTS
    record.write_text(record.read_text().replace(str(finished), str(copy)))
    return copy, config, capfd


def _fails(spoilt, *named, more=()):
    copy, config, capfd = spoilt
    capfd.readouterr()
    assert cli.main(["run" if more else "distill", str(config), *more]) == 2
    message = capfd.readouterr().err
    assert message.startswith("tinybert: ") and "Traceback" not in message
    for part in named:
        assert part in message, message
    assert not (copy / "run" / "checkpoints" / "prediction").exists()


def test_a_label_that_changed_between_two_stages_is_refused(spoilt):
    rows = (spoilt[0] / "train.tsv").read_text()
    (spoilt[0] / "train.tsv").write_text(rows.replace("\tneg", "\tpos", 1))
    saved = (spoilt[0] / "run" / "config.yaml").read_bytes()
    _fails(spoilt, "task.train: expected the content that this run began with")
    step = ["--from-step", "prediction:0", "prediction.learning_rate=1e-5"]
    _fails(spoilt, "task.train: expected the content that this run began with", more=step)
    assert (spoilt[0] / "run" / "config.yaml").read_bytes() == saved


def test_a_teacher_that_changed_between_two_stages_is_refused(spoilt):
    folder = spoilt[0] / "encoder-copy"
    weights = bad_world.load_file(folder / "model.safetensors")
    name = next(iter(weights))
    bad_world.change(folder, name, np.nextafter(weights[name], np.float32(9), dtype=np.float32))
    _fails(spoilt, f"teacher ({folder})", "other content of model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_one_bit_of_a_finished_stage_is_refused(spoilt, name):
    file = spoilt[0] / "run" / "models" / "finetune" / name
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    _fails(spoilt, str(file), "that finetune wrote, got other bytes", "delete")


def test_a_model_that_was_deleted_is_made_again(spoilt):
    copy, config, capfd = spoilt
    folder = copy / "run" / "models" / "finetune"
    before = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    assert cli.main(["finetune", str(config)]) == 0
    told = capfd.readouterr().out
    assert "lacks a model folder; runs again" in told and "wrote other files" not in told
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_stage_that_writes_another_model_than_before_says_so(spoilt):
    copy, config, capfd = spoilt
    record = copy / "run" / IDENTITIES / "finetune.json"
    record.write_text(record.read_text().replace("0", "1"))  # as written by another machine
    shutil.rmtree(copy / "run" / "models" / "finetune")
    assert cli.main(["finetune", str(config)]) == 0
    assert "finetune: wrote other files than before" in capfd.readouterr().out


def test_a_run_folder_may_be_moved(spoilt):
    copy, config, _ = spoilt
    (copy / "run").rename(copy / "elsewhere")
    assert cli.main(["finetune", str(config), f"run_dir={copy / 'elsewhere'}"]) == 0
    assert not (copy / "run").exists()


def test_a_run_that_version_0_1_began_is_taken_over(spoilt):
    """It has neither file; what it finished counts as finished."""
    copy, config, _ = spoilt
    (copy / "run" / INPUTS).unlink()
    shutil.rmtree(copy / "run" / IDENTITIES)
    settings = config_files.load(str(config))
    with preflight.open_run(settings, settings.stages) as run:
        assert run.is_done("finetune") and identity.has_finished(run, run.plans["finetune"])
    assert "model.safetensors" in str(
        json.loads((copy / "run" / IDENTITIES / "finetune.json").read_text())["outputs"]
    )


def test_deleting_the_lock_admits_nobody(tmp_path):
    with host.locked_folder(tmp_path / "run", "run_dir"):
        (tmp_path / "run" / ".lock").unlink()
        with pytest.raises(ValueError, match="in use by another process"):
            with host.locked_folder(tmp_path / "run", "run_dir"):
                pass
    with host.locked_folder(tmp_path / "run", "run_dir"):  # it is free again
        descriptor = os.open(tmp_path / "run", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
