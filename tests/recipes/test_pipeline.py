"""metrics.jsonl of whole runs, at the ends that kills and early stops bring."""

import json

import pytest
from tiny_inputs import TEACHER, write_config, write_inputs

from tinybert_jax import cli

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
