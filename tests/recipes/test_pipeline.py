"""metrics.jsonl of whole runs, at the ends that kills and early stops bring."""

import json
import re
import shutil

import pytest
from tiny_inputs import TEACHER, write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.config.tasks import ClassificationTask
from tinybert_jax.recipes.pipeline import _data_name
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
        inputs / f"{name}.yaml",
        inputs,
        inputs / name,
        finetune={**STAGE, **finetune},
        keep_checkpoints=True,
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


def test_the_score_of_a_single_evaluation_is_not_called_the_best(inputs, capsys):
    _run(inputs, "once", eval_every=12)
    told = capsys.readouterr().out
    assert re.search(r"^finetune: accuracy \d\.\d{4} at the end \(step 6\)$", told, re.M)
    _run(inputs, "twice", eval_every=3)
    told = capsys.readouterr().out
    assert re.search(r"^finetune: best accuracy \d\.\d{4} by step [36]$", told, re.M)


def test_a_student_reduced_from_its_teacher_starts_nearest_to_it(inputs):
    """Of both seeds; its projection starts as the way back to the teacher's width."""
    sizes = {**TEACHER, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    starts = ("teacher_reduced", "teacher_embeddings", "random")
    config = write_config(
        inputs / "starts.yaml",
        inputs,
        inputs / "starts",
        students={start.replace("_", "-"): {**sizes, "init": start} for start in starts},
        num_seeds=2,
        finetune={**STAGE, "num_steps": 40, "learning_rate": 1e-2},
        intermediate={**STAGE, "num_steps": 1, "log_every": 1, "dropout": 0.0},
    )
    assert cli.main(["run", config]) == 0
    (row,) = [row for row in _train_rows(inputs / "starts") if row["stage"] == "intermediate"]
    losses = [row[f"loss/{start.replace('_', '-')}"] for start in starts]
    assert losses[0] < 0.8 * losses[1] and losses[1] < losses[2]


def _train_rows(run):
    return [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]


@pytest.mark.parametrize(
    "given, name",
    [
        ({"builtin": True}, ""),
        ({"builtin": True, "name": "demo"}, "demo"),
        ({"train": "a/mail.csv", "dev": "dev.csv"}, "mail"),
        ({"train": "a/mail.csv", "dev": "dev.csv", "name": "task"}, "mail"),  # a dumped config
    ],
)
def test_the_default_name_of_a_task_is_not_that_of_its_data(given, name):
    assert _data_name(ClassificationTask(**given)) == name
