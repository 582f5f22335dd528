"""Logits of teachers, made once: the same training as with a teacher in every step, several too."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_inputs
from safetensors.numpy import load_file, save_file
from tiny_inputs import STUDENT, TEACHER, TEXTS, write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.batches.batch import Batch
from tinybert_jax.batches.tokenize import tokenize_texts
from tinybert_jax.config import load as config_files
from tinybert_jax.config.distillation import DistillSection
from tinybert_jax.config.stages import PREDICTION
from tinybert_jax.huggingface.folder import read_model, save_model, start_params
from tinybert_jax.huggingface.head import Head
from tinybert_jax.inference.scorer import make_scorer
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.models.inputs import Text
from tinybert_jax.objectives.distillation import Role, make_distill
from tinybert_jax.runs import estimate, teacher_logits
from tinybert_jax.runs.preflight import read_run
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.terms.table import reads_of

STAGE = {**tiny_inputs.STAGE, "num_steps": 6, "log_every": 1, "save_every": 2, "eval_every": 6}
WEIGHTS = "models/prediction/model.safetensors"

pytestmark = pytest.mark.usefixtures("cheap_programs")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, cheap_programs):
    """A folder with text, a teacher, and that teacher fine-tuned from two seeds."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, **TEACHER)
    finetune = {**STAGE, "num_steps": 40, "eval_every": 20, "num_seeds": 2}
    file = write_config(folder / "teachers.yaml", folder, folder / "teachers", finetune=finetune)
    assert cli.main(["run", file]) == 0
    return folder


def _teacher(inputs, seed):
    return str(inputs / "teachers" / "models" / f"finetune-seed-{seed}")


def _config(inputs, run_dir, *, stage=None, student=STUDENT, unroll=False, **distillation):
    return write_config(
        run_dir.with_suffix(".yaml"),
        inputs,
        run_dir,
        teacher={"path": str(inputs / "teacher"), "finetuned": _teacher(inputs, 0)},
        student=student,
        keep_checkpoints=True,
        prediction={**STAGE, **(stage or {})},
        distillation=distillation,
        compute={"unroll_layers": unroll},
    )


def _run(inputs, run_dir, **changes):
    assert cli.main(["run", _config(inputs, run_dir, **changes)]) == 0
    return run_dir


def _files(run_dir):
    return sorted((run_dir / "teacher_logits").rglob("*.safetensors"))


def _kept(run_dir):
    (file,) = _files(run_dir)
    return load_file(file)["logits"]


def _logits(inputs, file, seed):
    """What a teacher says of the task's text, by a scorer of its own."""
    run = read_run(config_files.load(file), [PREDICTION])
    path = _teacher(inputs, seed)
    apply, init = make_classifier(read_model(path).config, 2)
    score = make_scorer(apply, buckets=(16,), pad_token_id=run.tokenizer.pad_token_id)
    rows = tokenize_texts(run.tokenizer, run.required_task.data.distilled, 16)
    return score(start_params(path, init, whole=True), rows)


def _assert_close(one, other):
    one, other = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "stage",
    [
        {"batching": "bucket", "length_buckets": [6, 8, 16]},
        {"batching": "pack", "global_batch_size": 16, "gradient_accumulation_steps": 2},
    ],
    ids=lambda stage: stage["batching"],
)
def test_the_student_learns_what_it_learns_from_a_teacher_in_every_step(inputs, tmp_path, stage):
    unroll = stage["batching"] == "pack"
    kept = _run(inputs, tmp_path / "kept", stage=stage, unroll=unroll, keep_logits=True)
    every = _run(inputs, tmp_path / "every", stage=stage, unroll=unroll, keep_logits=False)
    assert _files(kept) and not _files(every)
    _assert_close(kept, every)


@pytest.mark.parametrize(
    "epochs, is_kept", [({"num_epochs": 2, "num_steps": None}, True), ({}, False)]
)
def test_only_what_is_read_again_is_kept(inputs, tmp_path, epochs, is_kept):
    run_config = config_files.load(_config(inputs, tmp_path / "run", stage=epochs))
    assert run_config.plans["prediction"].keeps_logits is is_kept


def test_a_regression_has_numbers(inputs, tmp_path):
    """The teacher's numbers of a task of two texts."""
    rows = "".join(f"{text}\ttea\t{len(text) / 9}\n" for text in TEXTS)
    (tmp_path / "numbers.tsv").write_text("text\tother\tlabel\n" + rows)
    file = str(tmp_path / "numbers.tsv")
    task = {"train": file, "dev": file, "text_pair": "other", "kind": "regression"}
    runs = [
        write_config(
            tmp_path / f"{name}.yaml",
            inputs,
            tmp_path / name,
            task=task,
            student=STUDENT,
            finetune=STAGE,
            prediction=STAGE,
            distillation={"keep_logits": is_kept},
        )
        for name, is_kept in (("kept", True), ("every", False))
    ]
    assert [cli.main(["run", run]) for run in runs] == [0, 0]
    assert _kept(tmp_path / "kept").shape == (24, 1)
    _assert_close(tmp_path / "kept", tmp_path / "every")


def test_logits_are_made_once(inputs, tmp_path, capsys, monkeypatch):
    """In several files; what is there is read, what is not is made, and the student is the same."""
    monkeypatch.setattr(teacher_logits, "ROWS_PER_FILE", 10)
    run = _run(inputs, tmp_path / "run", keep_logits=True)
    files = _files(run)
    assert sorted(file.name for file in files) == [f"{row}.safetensors" for row in (0, 10, 20)]
    logits = np.concatenate([load_file(file)["logits"] for file in sorted(files, key=_row)])
    np.testing.assert_allclose(
        logits, _logits(inputs, tmp_path / "run.yaml", 0), rtol=1e-6, atol=1e-6
    )
    weights = (run / WEIGHTS).read_bytes()

    shutil.rmtree(run / "models" / "prediction")
    shutil.rmtree(run / "checkpoints" / "prediction" / "last" / "6")  # goes on from step 4
    files[1].unlink()
    times = [file.stat().st_mtime_ns for file in (files[0], files[2])]
    capsys.readouterr()
    _run(inputs, tmp_path / "run", keep_logits=True)
    told = capsys.readouterr().out
    assert told.count("has scored") == 1 and "resumes at step 4" in told
    assert [file.stat().st_mtime_ns for file in (files[0], files[2])] == times
    assert (run / WEIGHTS).read_bytes() == weights


def _row(file):
    return int(file.stem)


def test_other_logits_are_never_taken_for_them(inputs, tmp_path):
    """Text, batching, a teacher's weights and what its config makes of them: one folder each."""
    teacher = tmp_path / "teacher"
    shutil.copytree(_teacher(inputs, 0), teacher)
    run = read_run(config_files.load(_config(inputs, tmp_path / "run", keep_logits=True)), ())
    run.folder.mkdir()
    rows = tokenize_texts(run.tokenizer, run.required_task.data.distilled, 16)

    plan = run.plans["prediction"]

    def read(rows=rows, plan=plan):
        section = run.teacher_section.model_copy(update={"finetuned": str(teacher)})
        given = run._replace(teacher_section=section, teacher=read_model(teacher).config)
        return teacher_logits.read(given, plan, rows)

    seen = [read()]
    assert read()[1] == seen[0][1] and len(_files(run.folder)) == 1
    seen.append(read(rows._replace(ids=rows.ids[::-1].copy())))
    packed = plan.section.model_copy(update={"batching": "pack"})
    seen.append(read(plan=plan._replace(section=packed)))
    sizes = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**sizes, "hidden_act": "relu"}))
    seen.append(read())
    weights = load_file(teacher / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + 1
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    seen.append(read())
    assert len({fingerprint for _, fingerprint in seen}) == len(_files(run.folder)) == 5
    assert np.abs(seen[0][0] - seen[3][0]).max() > 1e-4


def test_a_damaged_file_is_refused_and_made_again(inputs, tmp_path, capsys):
    run = _run(inputs, tmp_path / "run", keep_logits=True)
    weights = (run / WEIGHTS).read_bytes()
    (file,) = _files(run)
    content = file.read_bytes()
    shutil.rmtree(run / "models" / "prediction")
    shutil.rmtree(run / "checkpoints" / "prediction" / "last" / "6")
    for damage, words in (
        (lambda: file.write_bytes(content[:-8]), "cannot be read"),
        (
            lambda: save_file({"logits": np.zeros((3, 2))}, file),
            "got other content, float64 [3, 2]",
        ),
        (lambda: file.write_bytes(content[:-1] + b"x"), "as they were written"),
    ):
        damage()
        capsys.readouterr()
        assert cli.main(["run", str(tmp_path / "run.yaml")]) == 2
        told = capsys.readouterr().err
        assert words in told and "delete the file" in told and str(file) in told
    file.unlink()
    assert cli.main(["run", str(tmp_path / "run.yaml")]) == 0
    assert (run / WEIGHTS).read_bytes() == weights


def test_several_teachers_are_their_weighted_mean(inputs, tmp_path):
    further = [{"path": _teacher(inputs, 1), "weight": 3.0}]
    run = _run(inputs, tmp_path / "run", further_teachers=further)
    assert len(_files(run)) == 2
    one, other = (_logits(inputs, tmp_path / "run.yaml", seed) for seed in (0, 1))
    assert np.abs(one - other).max() > 1e-2
    opened = read_run(config_files.load(str(tmp_path / "run.yaml")), ())
    rows = tokenize_texts(opened.tokenizer, opened.required_task.data.distilled, 16)
    mean, _ = teacher_logits.read(opened, opened.plans["prediction"], rows)
    np.testing.assert_allclose(mean, (one + 3 * other) / 4, rtol=1e-5, atol=1e-6)


def test_features_are_the_teachers_own_beside_known_logits():
    """The frozen model's hidden states; the logits that the batch brings."""
    sizes = ModelConfig(vocab_size=20, num_attention_heads=2, max_position_embeddings=8, **TEACHER)
    apply, init = make_classifier(sizes, 3)
    params = init(jax.random.key(0))
    known = jax.random.normal(jax.random.key(1), (2, 3))
    batch = Batch(
        inputs=Text(jnp.ones((2, 8), jnp.int32), jnp.zeros((2, 8), jnp.int32)),
        attention_mask=jnp.ones((2, 8), bool),
        targets={"labels": jnp.zeros(2, jnp.int32)},
        weights=jnp.ones(2),
    )

    def targets(batch, *names):
        terms = DistillSection(prediction=[{"term": name} for name in names]).prediction
        student, teacher = (
            Role(apply, reads_of(terms, of_teacher=of_teacher), 2) for of_teacher in (False, True)
        )
        return make_distill(student, teacher, terms).targets(batch, params)

    theirs = apply(params, batch.inputs, batch.attention_mask, taps=True)
    both = targets(batch._replace(teacher_logits=known), "logits", "hidden")
    np.testing.assert_array_equal(both.logits, known)
    np.testing.assert_array_equal(both.encoder.hidden, theirs.encoder.hidden)
    assert targets(batch._replace(teacher_logits=known), "logits", "label").encoder is None
    np.testing.assert_array_equal(targets(batch, "logits", "hidden").logits, theirs.logits)


def _refused(inputs, tmp_path, capsys, with_status=2, **changes):
    assert cli.main(["run", _config(inputs, tmp_path / "run", **changes)]) == with_status
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().err


def test_further_teachers_that_do_not_fit_are_refused(inputs, tmp_path, capsys):
    further = tmp_path / "further"
    shutil.copytree(_teacher(inputs, 1), further)
    given = {"further_teachers": [{"path": str(further)}]}

    for changes in (given, {"keep_logits": True}):
        told = _refused(inputs, tmp_path, capsys, prediction=[{"term": "label"}], **changes)
        assert f"{next(iter(changes))}: expected a prediction stage with a term logits" in told
    told = _refused(inputs, tmp_path, capsys, keep_logits=False, **given)
    assert "keep_logits: expected true or null, got false" in told

    sizes = json.loads((further / "config.json").read_text())
    swapped = {**sizes, "id2label": {"0": "pos", "1": "neg"}, "label2id": {"pos": 0, "neg": 1}}
    (further / "config.json").write_text(json.dumps(swapped))
    told = _refused(inputs, tmp_path, capsys, **given)
    assert "further_teachers.0: labels: expected the teacher's order ['pos', 'neg']" in told
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
    given = {"further_teachers": [{"path": str(further)}]}
    told = _refused(inputs, tmp_path, capsys, with_status=3, **given)
    assert "expected a dev accuracy of at least" in told and str(further) in told


@pytest.mark.parametrize(
    "change, words",
    [
        ({"max_position_embeddings": 8}, "expected at most 8"),
        ({"type_vocab_size": 1}, "two token types"),
    ],
)
def test_a_further_teacher_without_room_is_refused(inputs, tmp_path, capsys, change, words):
    further = tmp_path / "further"
    sizes = ModelConfig(**{**read_model(_teacher(inputs, 1)).config.model_dump(), **change})
    tokenizer = read_run(config_files.load(_config(inputs, tmp_path / "run")), ()).tokenizer
    params = make_classifier(sizes, 2)[1](jax.random.key(0))
    head = Head("SequenceClassification", "single_label_classification", ("neg", "pos"))
    save_model(further, params, sizes, tokenizer, head=head)
    (tmp_path / "pairs.tsv").write_text("text\tother\tlabel\n" + "a\tb\tneg\na\tb\tpos\n" * 9)
    pairs = str(tmp_path / "pairs.tsv")
    file = write_config(
        tmp_path / "further.yaml",
        inputs,
        tmp_path / "run",
        task={"train": pairs, "dev": pairs, "text_pair": "other"},
        student=STUDENT,
        finetune=STAGE,
        prediction=STAGE,
        distillation={"further_teachers": [{"path": str(further)}]},
    )
    assert cli.main(["run", file]) == 2
    told = capsys.readouterr().err
    assert "further_teachers.0: prediction" in told and words in told
    assert not (tmp_path / "run").exists()


def test_a_further_teacher_is_looked_at_before_anything_is_trained(inputs, tmp_path, capsys):
    """Though the teacher itself is yet to be made: one without a head, one near chance."""
    file = write_config(
        tmp_path / "run.yaml",
        inputs,
        tmp_path / "run",
        student=STUDENT,
        finetune=STAGE,
        prediction=STAGE,
        distillation={"further_teachers": [{"path": str(inputs / "teacher")}]},
    )
    assert cli.main(["run", file]) == 2
    assert "further_teachers.0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_size_joins_one_that_is_made_in_the_run(inputs, tmp_path):
    """Finetune and prediction in one run; the further teacher is the other's student."""
    small = _run(inputs, tmp_path / "small", stage={"num_steps": 60, "eval_every": 20})
    file = write_config(
        tmp_path / "run.yaml",
        inputs,
        tmp_path / "run",
        student=STUDENT,
        finetune={**STAGE, "num_steps": 40, "eval_every": 20},
        prediction=STAGE,
        distillation={"further_teachers": [{"path": str(small / "hf")}], "teacher_margin": 0},
    )
    assert cli.main(["run", file]) == 0
    assert len(_files(tmp_path / "run")) == 2


def _teacher_flops(file):
    run = read_run(config_files.load(file), ())
    return estimate.estimate_costs(run, run.plans["prediction"]).flops["teacher"]


def test_costs_count_the_pass_once(inputs, tmp_path):
    """Three epochs read what one pass made; a further teacher has its own."""
    stage = {"num_steps": None, "num_epochs": 3.0}
    further = [{"path": _teacher(inputs, 1)}]
    once, every, two = (
        _teacher_flops(_config(inputs, tmp_path / name, stage=stage, **changes))
        for name, changes in (
            ("once", {}),
            ("every", {"keep_logits": False}),
            ("two", {"further_teachers": further}),
        )
    )
    assert every == 3 * once and two == 2 * once
