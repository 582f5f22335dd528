"""What a run finds that goes on: damage in `best`, or another number of devices.

Nothing is trained for nothing.
"""

import json
import shutil

import bad_world
import numpy as np
import pytest
from safetensors.numpy import load_file

from tinybert_jax import cli
from tinybert_jax.parallel.mesh import make_mesh
from tinybert_jax.runs import preflight
from tinybert_jax.runs.run import IDENTITIES
from tinybert_jax.runs.stage_state import prune_best
from tinybert_jax.training import checkpoint
from tinybert_jax.training.metric_log import read_rows

pytestmark = pytest.mark.usefixtures("cheap_programs")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, models):
    """A run whose only stage is done; its last states are those of the steps 2, 6 and 8."""
    folder = tmp_path_factory.mktemp("trained")
    stage = {"num_steps": 8, "save_every": 2, "eval_every": 2}
    path = bad_world.World(folder, models, None).config(
        "finetune", finetune=stage, keep_checkpoints=True
    )
    assert cli.main(["run", path]) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it, in which the models are gone: the stage ends again from its checkpoints."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for file in (copy / "config.yaml", copy / "run" / "config.yaml"):
        file.write_text(file.read_text().replace(str(trained), str(copy)))
    shutil.rmtree(copy / "run" / "models")
    shutil.rmtree(copy / "run" / IDENTITIES)
    return copy


def _flip(folder):
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def _best_step(checkpoints):
    newest = checkpoint.steps(checkpoints / "last")[-1]
    return checkpoint.read_meta(checkpoints / "last" / str(newest))["best_step"]


def _ends_as(trained, folder):
    with pytest.warns(UserWarning, match="renamed to damaged-"):
        assert cli.main(["run", str(folder / "config.yaml")]) == 0
    file = "run/models/finetune/model.safetensors"
    assert (folder / file).read_bytes() == (trained / file).read_bytes()
    ours, theirs = ((p / "run/metrics.jsonl").read_text().count("\n") for p in (folder, trained))
    assert ours == theirs + 1  # the line of the whole stage


def test_the_best_parameters_are_taken_from_the_state_of_their_step(trained, folder, capfd):
    checkpoints = folder / "run" / "checkpoints" / "finetune"
    best = _best_step(checkpoints)
    assert best in checkpoint.steps(checkpoints / "last"), "the state of the best score is kept"
    _flip(checkpoints / "best" / str(best))
    _ends_as(trained, folder)
    output = capfd.readouterr().out
    assert f"took the best parameters from the state of step {best}" in output
    assert "resumes at step 8 of 8" in output


def test_without_that_state_the_stage_begins_again_and_says_so(trained, folder, capfd):
    checkpoints = folder / "run" / "checkpoints" / "finetune"
    best = _best_step(checkpoints)
    _flip(checkpoints / "best" / str(best))
    _flip(checkpoints / "last" / str(best))
    for step in checkpoint.steps(checkpoints / "last"):
        if step != best:
            shutil.rmtree(checkpoints / "last" / str(step))
    _ends_as(trained, folder)
    assert "no checkpoint can be used; the stage begins again" in capfd.readouterr().out


def test_damage_in_an_older_state_stops_nobody(folder):
    """Neither a run that keeps a better score, whose new parameters stay, nor `ckpt prune`."""
    stage = folder / "run" / "checkpoints" / "finetune"
    oldest, *_, newest = checkpoint.steps(stage / "last")
    best = _best_step(stage)
    (stage / "last" / str(oldest) / "meta.json").write_text('{"best_step": ')
    for step in (best + 100, best + 200):
        shutil.copytree(stage / "best" / str(best), stage / "best" / str(step))
    prune_best(stage, also=[best + 100])  # as if that one has just been written
    assert checkpoint.steps(stage / "best") == [best, best + 100, best + 200]
    assert prune_best(stage) == [best + 100]
    assert cli.main(["ckpt", "prune", str(folder / "run"), "--keep", "1"]) == 0
    assert checkpoint.steps(stage / "last") == sorted({newest, best})


def test_pruning_frees_the_best_of_states_that_go(folder, capfd):
    """As where `keep_every` has kept many states, each with best parameters of its own."""
    stage = folder / "run" / "checkpoints" / "finetune"
    best, newest = _best_step(stage), checkpoint.steps(stage / "last")[-1]
    for step in range(20, 24):
        shutil.copytree(stage / "best" / str(best), stage / "best" / str(step))
        shutil.copytree(stage / "last" / str(newest), stage / "last" / str(step))
        (stage / "last" / str(step) / "meta.json").write_text(json.dumps({"best_step": step}))
    assert cli.main(["ckpt", "prune", str(folder / "run"), "--keep", "1"]) == 0
    assert checkpoint.steps(stage / "last") == checkpoint.steps(stage / "best") == [23]
    assert "finetune/best/20" in capfd.readouterr().out


def test_the_commands_on_checkpoints(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    run = "run"
    states = checkpoint.steps(folder / "run" / "checkpoints" / "finetune" / "last")
    assert cli.main(["ckpt", "ls", run]) == 0
    assert "finetune/last/8" in capfd.readouterr().out
    assert cli.main(["ckpt", "verify", run]) == 0
    assert "MB/s" in capfd.readouterr().out
    output = folder / "state.safetensors"
    for stage, place, told in (
        ("prediction", output, "expected a stage with saved states, got prediction"),
        ("finetune", folder / "none" / "x.safetensors", "expected a file in a folder that exists"),
    ):
        assert cli.main(["ckpt", "export", run, stage, "-o", str(place)]) == 2
        assert told in capfd.readouterr().err
    assert cli.main(["ckpt", "export", run, "finetune", "-o", str(output)]) == 0
    arrays = load_file(output)
    assert (
        arrays["classifier.kernel"].shape == (16, 2)
        and np.isfinite(arrays["classifier.bias"]).all()
    )
    assert cli.main(["ckpt", "prune", run, "--keep", "1"]) == 0
    left = checkpoint.steps(folder / "run" / "checkpoints" / "finetune" / "last")
    best = checkpoint.steps(folder / "run" / "checkpoints" / "finetune" / "best")
    assert left == [step for step in states if step == 8 or step in best]
    _flip(folder / "run" / "checkpoints" / "finetune" / "last" / "8")
    assert cli.main(["ckpt", "verify", run]) == 3
    assert "finetune/last/8" in capfd.readouterr().out
    assert cli.main(["ckpt", "export", run, "finetune", "-o", str(output)]) == 2
    assert cli.main(["ckpt", "ls", str(folder / "nowhere")]) == 2


def test_another_number_of_devices_goes_on_with_the_same_batches(trained, folder, monkeypatch):
    """One device until step 6, then eight: sums have another order, so losses differ a little."""
    shutil.rmtree(folder / "run" / "checkpoints" / "finetune" / "last" / "8")
    monkeypatch.setattr(preflight, "make_mesh", make_mesh)
    assert cli.main(["run", str(folder / "config.yaml")]) == 0
    assert '"num_devices": 8' in (folder / "run" / "env.json").read_text()
    by_run = [read_rows(path / "run" / "metrics.jsonl") for path in (folder, trained)]
    for kind in ("train", "eval"):
        ours, theirs = ([row for row in rows if row["kind"] == kind] for rows in by_run)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        same = ("padding_share", "learning_rate", "accuracy")
        for name in set(same) & ours[-1].keys():
            assert ours[-1][name] == theirs[-1][name]
        for name in {"loss", "grad_norm"} & ours[-1].keys():
            np.testing.assert_allclose(ours[-1][name], theirs[-1][name], rtol=1e-4)
