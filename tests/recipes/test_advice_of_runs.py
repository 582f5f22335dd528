"""Advice of whole runs: one that deserves every line, one whose models learn yet, one that is well.

TF-IDF reads whole texts and the models their first 14 words. What follows those are words of either
class, so that a linear model cannot win where the models have learnt.
"""

import json

import numpy as np
import pytest
from tiny_inputs import STAGE, STUDENT, TEACHER, write_config, write_inputs

from tinybert_jax import cli

pytestmark = pytest.mark.usefixtures("cheap_programs")

WORDS = {"pos": ["fine", "jam"], "neg": ["dull", "sea"]}
OTHERS = ["tea", "toast", "film", "and", "with"]
EVERY = [*WORDS["pos"], *WORDS["neg"]]
SAME = {**TEACHER, "num_attention_heads": 2, "init": "teacher_layers"}
LINES = {
    "a teacher that guesses": "the teacher has hardly learnt",
    "a better baseline": "the same student without a teacher",
    "a better linear model": "TF-IDF with a linear model",
    "a teacher that learns yet": "the teacher was still learning",
    "a student that learns yet": "the student was still learning",
    "few dev rows": "dev rows tell two models apart only",
    "a label that looks like a mistake": "'NaN'",
}


def _write_rows(file, num_rows, seed, *, num_after=0, last=""):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        label = rng.choice(list(WORDS))
        words = rng.permutation([*rng.choice(OTHERS, 13), rng.choice(WORDS[label])])
        rows.append(f"{' '.join([*words, *rng.choice(EVERY, num_after)])}\t{label}\n")
    file.write_text("text\tlabel\n" + "".join(rows) + last)


def _write_counts(file, num_rows, seed):
    """Texts of eight words, and how often one of them is among these."""
    rng = np.random.default_rng(seed)
    texts = [rng.choice(["tea", "jam", "film", "and", "with"], 8) for _ in range(num_rows)]
    rows = (f"{' '.join(words)}\t{(words == 'jam').sum()}\n" for words in texts)
    file.write_text("text\tlabel\n" + "".join(rows))


def _advice(folder, num_dev, kind="classification", num_after=0, last="", **sections):
    write_inputs(folder, **TEACHER)
    if kind == "regression":
        _write_counts(folder / "train.tsv", 240, 0)
        _write_counts(folder / "dev.tsv", num_dev, 1)
    else:
        _write_rows(folder / "train.tsv", 240, 0, num_after=num_after, last=last)
        _write_rows(folder / "dev.tsv", num_dev, 1, num_after=num_after)
    config = write_config(
        folder / "run.yaml",
        folder,
        folder / "out",
        task={"train": f"{folder}/train.tsv", "dev": f"{folder}/dev.tsv", "kind": kind},
        distillation={"teacher_margin": -1},
        **{name: {**STAGE, **own} if name != "student" else own for name, own in sections.items()},
    )
    assert cli.main(["run", config]) == 0
    lines = json.loads((folder / "out" / "results.json").read_text())["advice"]
    return {name for name, text in LINES.items() if any(text in line for line in lines)}, lines


def test_models_that_do_not_move_deserve_what_is_said_of_them(tmp_path):
    still = {"num_steps": 4, "learning_rate": 1e-9}
    told, _ = _advice(
        tmp_path,
        num_dev=80,
        last="tea with toast\tNaN\n",
        student=STUDENT,
        finetune=still,
        prediction=still,
        baseline={"num_steps": 150, "learning_rate": 3e-2, "dropout": 0.0},
    )
    assert told == set(LINES) - {"a teacher that learns yet", "a student that learns yet"}


def test_models_that_learn_to_the_end_are_to_be_trained_longer(tmp_path):
    rising = {"num_steps": 60, "eval_every": 12, "schedule": "constant", "learning_rate": 3e-3}
    told, lines = _advice(
        tmp_path,
        num_dev=600,
        kind="regression",
        student={**SAME, "init": "random"},
        finetune={"num_steps": 150, "eval_every": 50},
        prediction=rising,
    )
    assert told >= {"a teacher that learns yet", "a student that learns yet"}
    assert any("prediction.num_steps=120" in line for line in lines)
    assert not told & {"a better baseline", "few dev rows", "a teacher that guesses"}


def test_a_run_that_is_well_has_no_advice(tmp_path):
    trained = {"num_steps": 120, "eval_every": 12, "dropout": 0.0}
    told, lines = _advice(
        tmp_path,
        num_dev=600,
        num_after=12,
        student=SAME,
        finetune=trained,
        prediction=trained,
        baseline={"num_steps": 10, "learning_rate": 1e-4},
    )
    assert told == set() and lines == []
