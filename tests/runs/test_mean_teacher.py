"""finetune.teach: mean: the student learns from the mean of all teachers of the run."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_inputs import STAGE, STUDENT, TEACHER, TEXTS, write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.batches.tokenize import tokenize_texts
from tinybert_jax.config import load as config_files
from tinybert_jax.config.load import ConfigError
from tinybert_jax.inference.predict import predict
from tinybert_jax.runs import teacher_logits
from tinybert_jax.runs.preflight import read_run

pytestmark = pytest.mark.usefixtures("cheap_programs")

SHORT = {**STAGE, "num_steps": 6}
FINETUNE = {**STAGE, "num_steps": 40, "num_seeds": 2, "teach": "mean"}


def _config(folder, **sections):
    sections = {"finetune": FINETUNE, "prediction": SHORT, **sections}
    return write_config(folder / "run.yaml", folder, folder / "run", student=STUDENT, **sections)


def test_the_mean_of_all_seeds_is_kept_and_read(tmp_path):
    write_inputs(tmp_path, **TEACHER)
    config = _config(tmp_path)
    assert cli.main(["run", config]) == 0
    run = read_run(config_files.load(config), ())
    folders = [tmp_path / "run" / "models" / f"finetune-seed-{seed}" for seed in (0, 1)]
    said = [
        np.array([list(answer["logits"].values()) for answer in predict(str(folder), TEXTS)])
        for folder in folders
    ]
    assert np.abs(said[0] - said[1]).max() > 1e-2
    rows = tokenize_texts(run.tokenizer, run.required_task.data.distilled, 16)
    mean, _ = teacher_logits.read(run, run.plans["prediction"], rows)
    np.testing.assert_allclose(mean, (said[0] + said[1]) / 2, rtol=1e-5, atol=1e-5)
    files = list((tmp_path / "run" / "teacher_logits").rglob("*.safetensors"))
    assert len(files) == 2
    kept = np.mean([load_file(file)["logits"] for file in files], axis=0)
    np.testing.assert_allclose(kept, mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"finetune": {**FINETUNE, "num_seeds": 1}}, "set finetune.num_seeds to 2 or more"),
        ({"prediction": None}, "finetune.teach: expected a prediction stage with a term logits"),
        ({"distillation": {"keep_logits": False}}, "several teachers .finetune.teach. are always"),
    ],
)
def test_a_mean_that_nobody_can_learn_is_refused(tmp_path, sections, message):
    _config(tmp_path, **sections)
    with pytest.raises(ConfigError, match=message):
        config_files.load(tmp_path / "run.yaml")
