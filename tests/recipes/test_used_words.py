"""trained_words: used, against the same run with whole tables."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_inputs import STAGE, TEACHER, write_config, write_inputs

from tinybert_jax import cli

pytestmark = pytest.mark.usefixtures("cheap_programs")

# Without weight decay rows that no text uses keep their start with whole tables too.
SHORT = {**STAGE, "batching": "pack", "num_steps": 12, "weight_decay": 0.0, "save_every": 4}
HEADED = {**SHORT, "eval_every": 4}
SIZES = {**TEACHER, "num_attention_heads": 2}
TABLE = "embeddings.word_embeddings.weight"


def _run(folder, name, words):
    stages = {"finetune": HEADED, "intermediate": SHORT, "prediction": HEADED, "baseline": HEADED}
    config = write_config(
        folder / f"{name}.yaml",
        folder,
        folder / name,
        num_seeds=2,
        keep_checkpoints=True,
        students={
            "same": {**SIZES, "init": "teacher_layers"},
            "slim": {**SIZES, "hidden_size": 8, "init": "teacher_reduced"},
        },
        distillation={"teacher_margin": -1},
        **{stage: {**section, "trained_words": words} for stage, section in stages.items()},
    )
    assert cli.main(["run", config]) == 0
    return folder / name / "models"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, cheap_programs):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, **TEACHER)
    # Words of two texts: a part of the vocabulary; dev has a word that train has not.
    (folder / "rows.tsv").write_text("text\tlabel\n" + "tea and toast\tpos\na film\tneg\n" * 12)
    return folder


@pytest.fixture(scope="module")
def models(inputs):
    return {words: _run(inputs, words, words) for words in ("all", "used")}


def test_the_models_are_those_of_whole_tables(models):
    folders = sorted(path.name for path in models["all"].iterdir())
    assert len(folders) == 1 + 3 * 4
    for name in folders:
        whole, used = (load_file(models[w] / name / "model.safetensors") for w in models)
        assert whole.keys() == used.keys()
        for key, array in whole.items():
            np.testing.assert_allclose(used[key], array, atol=2e-3, err_msg=f"{name} {key}")


def test_rows_that_no_text_uses_keep_their_start(inputs, models):
    start = load_file(inputs / "teacher" / "model.safetensors")
    start = start[next(key for key in start if key.endswith(TABLE))]
    trained = load_file(models["used"] / "finetune" / "model.safetensors")
    trained = trained[next(key for key in trained if key.endswith(TABLE))]
    is_moved = (start != trained).any(axis=1)
    assert start.shape == trained.shape and 3 < is_moved.sum() < len(start) / 2


def test_a_resumed_stage_has_the_same_bits(inputs, models):
    run = models["used"].parent
    before = (models["used"] / "prediction-slim-seed-1" / "model.safetensors").read_bytes()
    for folder in models["used"].glob("prediction-*"):
        shutil.rmtree(folder)
    for step in ("8", "12"):
        shutil.rmtree(run / "checkpoints" / "prediction" / "last" / step, ignore_errors=True)
    again = _run(inputs, "used", "used")
    assert (again / "prediction-slim-seed-1" / "model.safetensors").read_bytes() == before
