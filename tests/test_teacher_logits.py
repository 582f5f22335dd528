"""Logits of teachers, made once: the same training as with a teacher in every step, several too."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_inputs import write_config, write_inputs

from tinybert_jax import cli, config, plan
from tinybert_jax.convert import hf_files
from tinybert_jax.data.pipeline import tokenize_task
from tinybert_jax.evaluate import make_scorer
from tinybert_jax.model.heads import make_classifier
from tinybert_jax.run import read_run

TEACHER = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32}
STUDENT = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
}
STAGE = {
    "num_steps": 6,
    "global_batch_size": 8,
    "max_length": 16,
    "batching": "pad",
    "learning_rate": 1e-2,
    "log_every": 1,
    "save_every": 2,
    "eval_every": 6,
}
WEIGHTS = "models/prediction/model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with text, a teacher, and that teacher fine-tuned from two seeds."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, **TEACHER)
    finetune = {**STAGE, "num_steps": 40, "eval_every": 20, "num_seeds": 2}
    file = write_config(folder / "teachers.yaml", folder, folder / "teachers", finetune=finetune)
    assert cli.main(["run", file]) == 0
    return folder


def _teacher(inputs, seed):
    return str(inputs / "teachers" / "models" / f"finetune-seed-{seed}")


def _config(inputs, run_dir, *, stage=None, student=STUDENT, **distillation):
    return write_config(
        run_dir.with_suffix(".yaml"),
        inputs,
        run_dir,
        teacher={"path": str(inputs / "teacher"), "finetuned": _teacher(inputs, 0)},
        student=student,
        prediction={**STAGE, **(stage or {})},
        distillation=distillation,
    )


def _run(inputs, run_dir, **changes):
    assert cli.main(["run", _config(inputs, run_dir, **changes)]) == 0
    return run_dir


def _kept(run_dir):
    (file,) = (run_dir / "teacher_logits").iterdir()
    return file, load_file(file)["logits"]


def _logits(inputs, file, seed):
    """What a teacher says of the task's text, by a scorer of its own."""
    run = read_run(config.load(file), ("prediction",))
    path = _teacher(inputs, seed)
    apply, init = make_classifier(hf_files.read_model(path).config, 2)
    score = make_scorer(apply, buckets=(16,), pad_token_id=run.tokenizer.pad_token_id)
    rows = tokenize_task(run.tokenizer, run.data.distilled, 16)
    return score(hf_files.start_params(path, init, whole=True), rows)


def _assert_close(one, other):
    one, other = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "stage",
    [
        {"batching": "pad"},
        {"batching": "bucket", "length_buckets": [8, 16]},
        {"batching": "pack", "global_batch_size": 16, "gradient_accumulation_steps": 2},
    ],
    ids=lambda stage: stage["batching"],
)
def test_the_student_learns_what_it_learns_from_a_teacher_in_every_step(inputs, tmp_path, stage):
    kept = _run(inputs, tmp_path / "kept", stage=stage)
    every = _run(inputs, tmp_path / "every", stage=stage, keep_logits=False)
    assert not (every / "teacher_logits").exists()
    _assert_close(kept, every)


def test_logits_are_made_once(inputs, tmp_path, capsys):
    """A run that goes on reads the file; another text or teacher does not."""
    run = _run(inputs, tmp_path / "run")
    file, logits = _kept(run)
    np.testing.assert_allclose(
        logits, _logits(inputs, tmp_path / "run.yaml", 0), rtol=1e-6, atol=1e-6
    )
    weights = (run / WEIGHTS).read_bytes()
    shutil.rmtree(run / "models" / "prediction")
    shutil.rmtree(run / "checkpoints")
    before = file.stat().st_mtime_ns
    capsys.readouterr()
    _run(inputs, tmp_path / "run")
    assert file.stat().st_mtime_ns == before
    assert "go through" not in capsys.readouterr().out
    assert (run / WEIGHTS).read_bytes() == weights

    other = _run(inputs, tmp_path / "shorter", stage={"max_length": 8})
    assert _kept(other)[0].name != file.name


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-8]), "cannot be read"),
        (lambda file: save_file({"logits": np.zeros((3, 2))}, file), "got [3, 2]"),
    ],
    ids=["cut", "shape"],
)
def test_a_damaged_file_is_refused(inputs, tmp_path, capsys, damage, words):
    run = _run(inputs, tmp_path / "run")
    damage(_kept(run)[0])
    shutil.rmtree(run / "models" / "prediction")
    capsys.readouterr()
    assert cli.main(["run", str(tmp_path / "run.yaml")]) == 2
    told = capsys.readouterr().err
    assert words in told and "delete it" in told and str(run / "teacher_logits") in told


def test_several_teachers_are_their_weighted_mean(inputs, tmp_path):
    further = [{"path": _teacher(inputs, 1), "weight": 3.0}]
    run = _run(inputs, tmp_path / "run", further_teachers=further)
    one, other = (_logits(inputs, tmp_path / "run.yaml", seed) for seed in (0, 1))
    assert np.abs(one - other).max() > 1e-2
    np.testing.assert_allclose(_kept(run)[1], (one + 3 * other) / 4, rtol=1e-5, atol=1e-6)


def test_features_are_the_teachers_own_beside_everyones_logits(inputs, tmp_path):
    """Hidden states and logits: with itself as the further teacher nothing changes."""
    terms = [{"term": "logits"}, {"term": "hidden"}, {"term": "label"}]
    both = _run(
        inputs,
        tmp_path / "both",
        prediction=terms,
        further_teachers=[{"path": _teacher(inputs, 0)}],
    )
    alone = _run(inputs, tmp_path / "alone", prediction=terms)
    assert not (alone / "teacher_logits").exists()  # its pass gives them anyway
    _assert_close(both, alone)
    other = _run(
        inputs,
        tmp_path / "other",
        prediction=terms,
        further_teachers=[{"path": _teacher(inputs, 1)}],
    )
    ours, theirs = (load_file(own / WEIGHTS) for own in (both, other))
    assert any(np.abs(array - theirs[name]).max() > 1e-4 for name, array in ours.items())


def _refused(inputs, tmp_path, capsys, **changes):
    assert cli.main(["run", _config(inputs, tmp_path / "run", **changes)]) == 2
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().err


def test_further_teachers_that_do_not_fit_are_refused(inputs, tmp_path, capsys):
    further = tmp_path / "further"
    shutil.copytree(_teacher(inputs, 1), further)
    given = {"further_teachers": [{"path": str(further)}]}

    told = _refused(inputs, tmp_path, capsys, prediction=[{"term": "label"}], **given)
    assert "further_teachers: expected a prediction stage with a term logits" in told

    sizes = json.loads((further / "config.json").read_text())
    swapped = {**sizes, "id2label": {"0": "pos", "1": "neg"}, "label2id": {"pos": 0, "neg": 1}}
    (further / "config.json").write_text(json.dumps(swapped))
    told = _refused(inputs, tmp_path, capsys, **given)
    assert "labels: expected the teacher's order ['pos', 'neg']" in told
    (further / "config.json").write_text(json.dumps(sizes))

    pieces = json.loads((further / "tokenizer.json").read_text())
    vocab = pieces["model"]["vocab"]
    words = sorted(vocab, key=vocab.get)
    vocab[words[-1]], vocab[words[-2]] = vocab[words[-2]], vocab[words[-1]]
    (further / "tokenizer.json").write_text(json.dumps(pieces))
    told = _refused(inputs, tmp_path, capsys, **given)
    assert "distillation.further_teachers.0" in told

    shutil.rmtree(further)
    told = _refused(inputs, tmp_path, capsys, **given)
    assert "distillation.further_teachers.0" in told and str(further) in told


def test_a_further_teacher_near_chance_is_refused(inputs, tmp_path, capsys):
    further = tmp_path / "further"
    shutil.copytree(_teacher(inputs, 1), further)
    weights = load_file(further / "model.safetensors")
    weights["classifier.weight"] *= 0
    save_file(weights, further / "model.safetensors", metadata={"format": "pt"})
    told = _refused(inputs, tmp_path, capsys, further_teachers=[{"path": str(further)}])
    assert "expected a dev accuracy of at least" in told and str(further) in told


def test_costs_count_the_pass_once(inputs, tmp_path):
    """Three epochs read what one pass made; a further teacher has its own."""
    stage = {"num_steps": None, "num_epochs": 3.0}
    further = [{"path": _teacher(inputs, 1)}]
    once, every, two = (
        plan.price(
            read_run(config.load(_config(inputs, tmp_path / name, stage=stage, **changes)), ()),
            "prediction",
        ).flops["teacher"]
        for name, changes in (
            ("once", {}),
            ("every", {"keep_logits": False}),
            ("two", {"further_teachers": further}),
        )
    )
    assert every == 3 * once and two == 2 * once
