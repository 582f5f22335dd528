"""What a run folder tells of the run: its config, and every process that worked on it."""

import json
from pathlib import Path

import jax
import pytest
import yaml

from tinybert_jax.config import load as config_files
from tinybert_jax.parallel.mesh import unrolls_layers
from tinybert_jax.performance import host
from tinybert_jax.runs import preflight
from tinybert_jax.runs.preflight import open_run


def _open(world):
    """Opens the run once, as a process does, and returns what env.json tells then."""
    settings = config_files.load(world.config("finetune"))
    with open_run(settings, settings.stages):
        pass
    return json.loads((world.run_dir / "env.json").read_text())


def test_the_environment_of_every_process_is_kept(world):
    opened = [_open(world) for _ in range(3)]
    assert [len(own["earlier"]) for own in opened] == [0, 1, 2]
    for own in opened:
        assert {"started", "jax", "python", "device", "num_devices", "git_commit"} <= own.keys()
    for number, own in enumerate(opened[2]["earlier"]):  # oldest first, none inside another
        assert own == {name: v for name, v in opened[number].items() if name != "earlier"}


def test_the_environment_that_an_older_version_wrote_is_kept_too(world):
    first = _open(world)
    del first["earlier"]
    (world.run_dir / "env.json").write_text(json.dumps(first))
    assert _open(world)["earlier"] == [first]


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_an_environment_that_cannot_be_read_is_refused(world, content):
    _open(world)
    (world.run_dir / "env.json").write_text(content)
    path = world.config("finetune")
    world.fails("run", path, naming=("env.json", "expected the JSON object", "delete the file"))
    assert (world.run_dir / "env.json").read_text() == content


def _has_unrolled_layers(world, *words):
    settings = config_files.load(world.config("finetune"), words)
    with open_run(settings, settings.stages) as run:
        pass
    assert config_files.read_setting(world.run_dir / "config.yaml", LAYOUT) == (
        run.compute.unroll_layers
    )
    return run.compute.unroll_layers


LAYOUT = "compute.unroll_layers"


def test_layers_are_a_loop_on_cpus_and_of_their_own_on_accelerators(world):
    assert _has_unrolled_layers(world) is unrolls_layers(jax.default_backend())
    for platform, expected in (("cpu", False), ("gpu", True), ("tpu", True)):
        assert unrolls_layers(platform) is expected


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_goes_on_with_the_layers_it_began_with(world, monkeypatch, begun):
    """A version before this one wrote `false` where the config said nothing."""
    assert _has_unrolled_layers(world, f"{LAYOUT}={begun}") is begun
    monkeypatch.setattr(preflight, "unrolls_layers", lambda platform: not begun)
    assert _has_unrolled_layers(world) is begun
    path = world.config("finetune")
    named = (f"{LAYOUT}: {begun} there, {not begun} here",)
    world.fails("run", path, f"{LAYOUT}={not begun}", naming=named)


def test_a_run_goes_on_with_the_config_of_an_older_version(world):
    """As version 0.1 wrote it: with `regression` and without `kind`."""
    _open(world)
    tree = yaml.safe_load((world.run_dir / "config.yaml").read_text())
    assert tree["task"].pop("kind") == "classification"
    tree["task"]["regression"] = False
    (world.run_dir / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    assert len(_open(world)["earlier"]) == 1
    tree["task"]["regression"] = True
    (world.run_dir / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    named = ("run_dir", "task.kind: 'regression' there, 'classification' here")
    world.fails("run", world.config("finetune"), naming=named)


def test_a_run_that_cannot_be_locked_is_kept(tmp_path):
    """The message does not send the user to a new folder, where the run would begin again."""
    (tmp_path / ".lock").mkdir()  # refused by every file system, also for root
    with (
        pytest.raises(ValueError, match="choose another run_dir"),
        host.locked_folder(tmp_path, "run_dir"),
    ):
        pass
    (tmp_path / "config.yaml").write_text("seed: 0")
    with (
        pytest.raises(OSError, match="what is in it is kept.*repeat the command"),
        host.locked_folder(tmp_path, "run_dir"),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_refused():
    folder = Path("/proc/none/run")
    with (
        pytest.raises(
            ValueError, match="run_dir: expected a folder that can be written, got /proc"
        ),
        host.locked_folder(folder, "run_dir"),
    ):
        pass
