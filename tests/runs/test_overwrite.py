"""`--overwrite` removes a run, tells what, and nothing that is not of a run."""

import fcntl
import shutil
import sys

import pytest
from tiny_inputs import STAGE, TEACHER, write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.runs import run_folder, run_store

pytestmark = pytest.mark.usefixtures("cheap_programs")


@pytest.fixture
def world(tmp_path):
    write_inputs(tmp_path, **TEACHER)

    def config(**stage):
        stage = {**STAGE, "num_steps": 2, **stage}
        return write_config(tmp_path / "run.yaml", tmp_path, tmp_path / "run", finetune=stage)

    return tmp_path, config


def _write_run(folder):
    for name in ("stages/finetune.json", "models/finetune/config.json", "checkpoints/a/b"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("x" * 1000)
    (folder / "config.yaml").write_text("seed: 3\n")
    (folder / ".hf-partial").mkdir()


def test_a_run_of_another_config_is_removed_when_asked(world, capsys):
    folder, config = world
    _write_run(folder / "run")
    assert cli.main(["run", config()]) == 2
    error = capsys.readouterr().err
    assert "remove that run with --overwrite (the finished stages finetune; 1 models; " in error
    assert (folder / "run/checkpoints/a/b").exists()
    assert cli.main(["run", config(), "--overwrite"]) == 0
    assert f"removed from {folder / 'run'}: the finished stages" in capsys.readouterr().out
    assert not (folder / "run/checkpoints/a").exists()
    assert (folder / "run/results.json").exists()
    assert run_folder.check(folder / "run")  # it knows every name that a run writes
    folders = {part.split("/")[0] for part in run_store._PARTS if "/" in part}
    assert folders <= run_folder._FOLDERS


@pytest.mark.parametrize(
    "setting, told",
    [
        ("finetune.max_length=4000", "max_length"),
        ("log.trackers=[trackio]", "package trackio"),
        ("teacher.path=RUN/models/finetune", "that the new one does not read, got "),
        ("corpus.files=[RUN/../*/models/*]", "run with corpus.files; choose"),
    ],
)
def test_what_cannot_begin_removes_nothing(world, capsys, setting, told, monkeypatch):
    folder, config = world
    _write_run(folder / "run")
    before = sorted((folder / "run").rglob("*"))
    monkeypatch.setitem(sys.modules, "trackio", None)
    setting = setting.replace("RUN", str(folder / "run"))
    assert cli.main(["run", config(), "--overwrite", setting]) == 2
    assert told in capsys.readouterr().err
    assert sorted((folder / "run").rglob("*")) == before


def test_overwrite_is_not_offered_where_the_new_run_reads_the_old_one(world, capsys):
    folder, config = world
    _write_run(folder / "run")
    assert cli.main(["run", config(), f"teacher.path={folder / 'run/models/finetune'}"]) == 2
    error = capsys.readouterr().err
    assert "choose another run_dir, or undo these changes" in error and "--overwrite" not in error
    assert cli.main(["run", config(), "name=~models"]) == 2  # neither a path nor a home folder
    assert "remove that run with --overwrite" in capsys.readouterr().err


def test_a_run_that_was_killed_after_it_wrote_its_config_goes_on(world):
    folder, config = world
    assert cli.main(["run", config()]) == 0
    written = (folder / "run/config.yaml").read_text()
    shutil.rmtree(folder / "run")
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text(written)  # with a choice for unroll_layers
    (folder / "run/.lock").touch()
    assert cli.main(["run", config()]) == 0


def test_a_config_of_one_s_own_is_no_run(world, capsys):
    folder, config = world
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text("seed: 3  # mine\n")
    (folder / "run/.lock").touch()
    for more in ([], ["--overwrite"]):
        assert cli.main(["run", config(), *more]) == 2
        assert "a config.yaml that no run wrote; choose another run_dir" in capsys.readouterr().err
    assert (folder / "run/config.yaml").read_text() == "seed: 3  # mine\n"


@pytest.mark.parametrize("name", ["thesis.txt", ".git", "models-old"])
def test_other_files_are_never_removed(world, capsys, name):
    folder, config = world
    _write_run(folder / "run")
    (folder / "run" / name).mkdir()
    before = sorted((folder / "run").rglob("*"))
    assert cli.main(["run", config(), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert "--overwrite: expected the folder of a run alone" in error and name in error
    assert sorted((folder / "run").rglob("*")) == before


def test_a_folder_without_a_config_is_not_a_run(world, capsys):
    folder, config = world
    (folder / "run/models").mkdir(parents=True)
    assert cli.main(["run", config(), "--overwrite"]) == 2
    assert "with models" in capsys.readouterr().err


def test_a_run_with_a_copy_elsewhere_is_refused(world, capsys):
    folder, config = world
    _write_run(folder / "run")
    assert cli.main(["run", config(), "--overwrite", f"run_store={folder / 'store'}"]) == 2
    assert "got run_store" in capsys.readouterr().err
    assert (folder / "run/config.yaml").exists()


def test_a_run_in_use_is_not_removed(tmp_path):
    _write_run(tmp_path)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="in use by another process"):
            run_folder.remove(tmp_path)
    assert (tmp_path / "models/finetune/config.json").exists()


def test_the_config_goes_last(tmp_path, monkeypatch):
    _write_run(tmp_path)

    def fail(path):
        raise OSError("full")

    monkeypatch.setattr(run_folder.shutil, "rmtree", fail)
    with pytest.raises(OSError, match="full"):
        run_folder.remove(tmp_path)
    assert run_folder.check(tmp_path)
