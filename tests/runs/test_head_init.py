"""head_init: linear_probe, where nothing else of a model moves."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_inputs import STAGE, TEACHER, TEXTS, write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.config import load as config_files
from tinybert_jax.config.load import ConfigError
from tinybert_jax.inference.predict import predict

pytestmark = pytest.mark.usefixtures("cheap_programs")

STILL = {**STAGE, "num_steps": 1, "learning_rate": 1e-12, "dropout": 0.0}
SAME = {**TEACHER, "num_attention_heads": 2, "init": "teacher_layers", "init_layers": "uniform"}


def _inputs(folder, kind):
    write_inputs(folder, **TEACHER)
    values = [len(text) / 10 for text in TEXTS]
    if kind == "regression":
        rows = "".join(f"{text}\t{value}\n" for text, value in zip(TEXTS, values, strict=True))
        (folder / "rows.tsv").write_text("text\tlabel\n" + rows)
    if kind == "tagging":
        tag = {"film": "B-ART", "tea": "B-FOOD", "toast": "B-FOOD", "jam": "B-FOOD"}
        lines = ["\n".join(f"{w}\t{tag.get(w, 'O')}" for w in text.split()) for text in TEXTS]
        (folder / "rows.tsv").write_text("\n\n".join(lines) + "\n")
    return {"train": str(folder / "rows.tsv"), "dev": str(folder / "rows.tsv"), "kind": kind}


def _scores(folder, task, metric, start, **finetune):
    """role -> score, where only the head of the student, and maybe of the teacher, is fitted."""
    config = write_config(
        folder / "run.yaml",
        folder,
        folder / start,
        task=task,
        student=SAME,
        finetune={**STILL, "head_init": start, **finetune},
        prediction={**STILL, "head_init": start},
        distillation={"teacher_margin": -1},
    )
    assert cli.main(["run", config]) == 0
    models = json.loads((folder / start / "results.json").read_text())["models"]
    return {model["role"]: model["metrics"][metric] for model in models}


METRICS = {"classification": "accuracy", "regression": "pearson", "tagging": "f1"}


@pytest.mark.parametrize("kind", ["regression", "tagging"])
def test_a_fitted_head_knows_the_labels(tmp_path, kind):
    task, metric = _inputs(tmp_path, kind), METRICS[kind]
    starts = ("random", "linear_probe")
    random, fitted = (_scores(tmp_path, task, metric, start) for start in starts)
    assert fitted["teacher"] > 0.5 and fitted["teacher"] > random["teacher"] + 0.1


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_fitted_head_of_a_student_says_what_its_teacher_says(tmp_path, kind):
    """The encoders are equal, and the teacher is far from sure of the labels."""
    task = _inputs(tmp_path, kind)
    _scores(tmp_path, task, METRICS[kind], "linear_probe", num_steps=60, learning_rate=1e-2)
    models = [tmp_path / "linear_probe" / "models" / name for name in ("finetune", "prediction")]
    answers = [predict(str(model), TEXTS) for model in models]
    if kind == "regression":
        teacher, student = (np.array([own["value"] for own in said]) for said in answers)
    else:
        logits = (np.array([list(own["logits"].values()) for own in said]) for said in answers)
        teacher, student = (own[:, 0] - own[:, 1] for own in logits)
    np.testing.assert_allclose(student, teacher, atol=0.1 * np.ptp(teacher))


def test_the_seeds_of_a_fitted_head_differ_by_their_random_starts(tmp_path):
    task = _inputs(tmp_path, "classification")
    config = write_config(
        tmp_path / "run.yaml",
        tmp_path,
        tmp_path / "run",
        task=task,
        finetune={**STILL, "head_init": "linear_probe", "num_seeds": 2},
    )
    assert cli.main(["run", config]) == 0
    folders = [tmp_path / "run" / "models" / f"finetune-seed-{seed}" for seed in (0, 1)]
    heads = [load_file(folder / "model.safetensors")["classifier.weight"] for folder in folders]
    assert 1e-3 < np.abs(heads[0] - heads[1]).max()
    said = [[answer["label"] for answer in predict(str(folder), TEXTS)] for folder in folders]
    assert said[0] == said[1]


def test_a_head_cannot_fit_logits_that_nobody_keeps(tmp_path):
    write_config(
        tmp_path / "run.yaml",
        tmp_path,
        tmp_path / "run",
        student=SAME,
        prediction={**STILL, "head_init": "linear_probe"},
        distillation={"keep_logits": False},
    )
    with pytest.raises(ConfigError, match="prediction.head_init: linear_probe"):
        config_files.load(tmp_path / "run.yaml")
