"""metrics.jsonl of whole runs, at the ends that kills and early stops bring."""

import json
import shutil

import pytest
from tiny_inputs import TEACHER, write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.training.metric_log import read_rows

STAGE = {
    "num_steps": 6,
    "global_batch_size": 8,
    "max_length": 16,
    "batching": "pad",
    "learning_rate": 1e-3,
    "log_every": 2,
}

pytestmark = pytest.mark.usefixtures("cheap_programs")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, cheap_programs):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, **TEACHER)
    return folder


def _run(inputs, name, **finetune):
    config = write_config(
        inputs / f"{name}.yaml", inputs, inputs / name, finetune={**STAGE, **finetune}
    )
    assert cli.main(["run", config]) == 0
    return inputs / name


def _scores(run):
    return [model["metrics"] for model in json.loads((run / "results.json").read_text())["models"]]


def test_a_finished_run_with_a_last_line_cut_short_is_run_again(inputs):
    run = _run(inputs, "cut")
    before = _scores(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "stage", "stage": "fine')
    assert _run(inputs, "cut") == run
    assert _scores(run) == before


@pytest.mark.parametrize("resumes", ["after the stop", "before the stop"])
def test_an_early_stop_logs_the_last_steps_once(inputs, resumes):
    """The learning rate is too small to improve the accuracy of step 3 by step 6."""
    settings = {"num_steps": 12, "learning_rate": 1e-12, "log_every": 4, "save_every": 1}
    settings |= {"eval_every": 3, "patience": 1}
    run = _run(inputs, "stopped", **settings)
    rows = _train_rows(run)
    assert [row["step"] for row in rows] == [4, 6]
    assert rows[0]["seconds_left"] > rows[1]["seconds_left"] == 0
    shutil.rmtree(run / "models")
    if resumes == "before the stop":
        shutil.rmtree(run / "checkpoints" / "finetune" / "last" / "6")
    _run(inputs, "stopped", **settings)
    assert [row["step"] for row in _train_rows(run)] == [4, 6]
    assert [row["loss"] for row in _train_rows(run)] == [row["loss"] for row in rows]


def _train_rows(run):
    return [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]
