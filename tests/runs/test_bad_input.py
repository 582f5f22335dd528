"""Whatever is wrong with data or a command: one message that helps, and no file touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bad_world import LABELS, STAGE, TEXTS, change

from tinybert_jax import cli
from tinybert_jax.config import load as config_files
from tinybert_jax.runs.preflight import open_run


def test_the_inputs_are_right_where_nothing_is_spoilt(world):
    """What follows fails for the reason it states, not because of the set-up."""
    margin = {"distillation": {"teacher_margin": 0.0}}
    for path in (world.config("finetune", "baseline"), world.distil(**margin)):
        settings = config_files.load(path)
        other = settings.model_copy(update={"run_dir": str(world.run_dir / Path(path).stem)})
        with open_run(other, other.stages) as run:
            assert run.task.data.label_names == ("neg", "pos")


# The data


def test_missing_data(world):
    path = world.config("finetune", task={"train": world.train.replace("train", "trian")})
    world.fails("run", path, naming=("trian.tsv", "nothing", "did you mean 'train.tsv'?"))


@pytest.mark.parametrize(
    "content, named",
    [
        ("", ("an empty file",)),
        ("text\tlabel\n", ("only a header",)),
        ("sentence\tlabel\nx\tneg\n", ("a column 'text'", "columns 'sentence', 'label'")),
        ("text\tlabel\nx\tneg\ny\tgood\n", ("'neg', 'pos'", "line 3: 'good'", "`labels`")),
        ("text\tlabel\nx\tneg\ny\t\n", ("a label", "line 3: none", "fill in")),
        ("text\tlabel\nx\tneg\n\tpos\n", ("text in column 'text'", "line 3: ''", "fill in")),
        ("text\tlabel\nx\tneg\ny\tz\tpos\n", ("2 columns in every row", "line 3: 3", "tabs")),
        (b"text\tlabel\nx\tneg\n\xe9\tpos\n", ("UTF-8", "line 3: 0xe9", "iconv")),
    ],
    ids=["empty", "header", "column", "label", "no_label", "no_text", "ragged", "encoding"],
)
def test_wrong_dev_set(world, content, named):
    path = world.config("finetune", task={"dev": world.file("dev.tsv", content)})
    world.fails("run", path, naming=("dev.tsv", "expected", "got", "fix", *named))


def test_broken_json_line(world):
    rows = [json.dumps({"text": t, "label": y}) for t, y in zip(TEXTS, LABELS, strict=True)]
    train = world.file("train.jsonl", "\n".join([rows[0], rows[1][:-1], *rows[2:]]))
    path = world.config("finetune", task={"train": train})
    world.fails("run", path, naming=("train.jsonl", "one JSON object on every line", "line 2"))


def test_label_out_of_range(world):
    train = world.table("ids.tsv", labels=["0", "1", "2"] * 4)
    path = world.config("finetune", task={"train": train, "labels": {0: "neg", 1: "pos"}})
    world.fails("run", path, naming=("ids.tsv", "labels '0', '1'", "line 4: '2'", "`labels`"))


def test_a_single_class(world):
    train = world.table("one.tsv", labels=["neg"] * len(TEXTS))
    path = world.config("finetune", task={"train": train})
    world.fails("run", path, naming=("one.tsv", "at least 2 labels", "['neg']"))


def test_corpus_without_words(world):
    corpus = {"files": [world.file("corpus.txt", "a\n\nb\n")]}
    path = world.config("pretrain", corpus=corpus)
    world.fails("run", path, naming=("corpus", "expected", "2 documents"))


# predict, evaluate, convert


def test_predict_wants_one_source(world):
    model = str(world.models / "classifier")
    named = ("a data file or --sentence",)
    out = ("-o", str(world.folder / "out.jsonl"))
    world.fails("predict", model, world.dev, "-t", "x", *out, naming=(*named, "both"))
    world.fails("predict", model, *out, naming=(*named, "neither"))


def test_all_missing_inputs_are_told_at_once(world):
    path = world.distil(
        teacher={"path": str(world.folder / "no-teacher")},
        task={"train": str(world.folder / "no-text.tsv")},
        general=dict(STAGE),
        corpus={"files": [str(world.folder / "no-corpus.txt")]},
        student=None,
        students={name: {"path": str(world.folder / f"no-{name}")} for name in ("one", "two")},
        tokenizer={"path": str(world.folder / "no-tokenizer")},
    )
    named = ("no-teacher", "no-text.tsv", "no-corpus.txt", "students.one", "students.two")
    message = world.fails("run", path, naming=(*named, "no-tokenizer"))
    assert message.count("\n") == 6


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_no_head(world, command):
    named = (str(world.models / "encoder"), "a head for a task", "found none", "fine-tune")
    world.fails(command, str(world.models / "encoder"), world.dev, naming=named)


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize("length, named", [("33", "at most 32"), ("0", "at least 4")])
def test_impossible_max_length(world, command, length, named):
    argv = (command, str(world.models / "classifier"), world.dev, "--max-length", length)
    world.fails(*argv, naming=("max_length", named, f"got {length}"))


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_head_of_no_known_task(world, command):
    folder = world.model("classifier", problem_type="regression")  # of two outputs
    named = (str(folder), "'regression' and 2 outputs", "single_label_classification")
    world.fails(command, str(folder), world.dev, naming=named)


def test_a_teacher_of_another_kind_of_task(world):
    """Its labels are those of the task, but it answers with any number of them."""
    folder = world.model("classifier", problem_type="multi_label_classification")
    path = world.distil(teacher={"path": str(folder)})
    named = (str(folder), "kind, classification, got", "is for multi_label", "finetune section")
    world.fails("run", path, naming=named)
    tagger = world.model("wider", architectures=["BertForTokenClassification"])
    further = {"further_teachers": [{"path": str(tagger)}], "teacher_margin": -1}
    named = ("further_teachers.0", str(tagger), "kind, classification, got", "is for tagging")
    world.fails("run", world.distil(distillation=further), naming=named)


@pytest.mark.parametrize("output, named", [("no/such/out", "a folder"), ("", "a file")])
def test_output_that_cannot_be_written(world, output, named):
    argv = ("predict", str(world.models / "classifier"), "-t", "x", "-o")
    world.fails(*argv, str(world.folder / output), naming=("--output", named))


@pytest.mark.parametrize("option", ["--text", "--label", "--text-pair"])
def test_evaluate_on_a_wrong_column(world, option):
    argv = ("evaluate", str(world.models / "classifier"), world.dev, option, "txt")
    world.fails(*argv, naming=("dev.tsv", "a column 'txt'", "columns 'text', 'label'"))


def test_evaluate_on_unknown_labels(world):
    data = world.table("data.tsv", labels=["good", "bad"] * 6)
    argv = ("evaluate", str(world.models / "classifier"), data)
    world.fails(*argv, naming=("data.tsv", "'neg', 'pos'", "line 2: 'good'"))


@pytest.mark.parametrize(
    "setting, named",
    [
        ("task.scheme=iob1", ("a classification model", "'text_pair'", "got ['scheme']")),
        ("task.text=7", ("task of classification", "text", "got 7")),
        ("task.labels=[pos,neg]", ("a classification model", "got ['labels']")),
        ("task.split=test", ("a classification model", "got ['split']")),
        ("task.label=b", ("each column once", "['label']", "remove one")),
        ("task.text=${NOT_SET}", ("command line: 1 error", "NOT_SET", "not set")),
        ("scheme=iob1", ("settings of the task", "task.scheme=iob1", "got ['scheme=iob1']")),
    ],
)
def test_evaluate_with_settings_that_the_task_lacks(world, setting, named):
    argv = ("evaluate", str(world.models / "classifier"), world.dev, "--label", "label", setting)
    world.fails(*argv, naming=named)


def test_output_over_the_data(world):
    argv = ("predict", str(world.models / "classifier"), world.dev, "-o", world.dev)
    world.fails(*argv, naming=("--output", "another file than the data", "dev.tsv"))


def test_a_blank_sentence_has_a_problem_instead_of_an_answer(world):
    """So that one blank row of many costs no answer of the others."""
    output = world.folder / "out.jsonl"
    model = str(world.models / "classifier")
    argv = ["predict", model, "-t", "tea", "-t", " ", "-t", "a film", "-o", str(output)]
    assert cli.main(argv) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["row"], row["text"]) for row in rows] == [(1, "tea"), (2, " "), (3, "a film")]
    assert rows[1] == {"row": 2, "text": " ", "problem": "no text"}
    assert rows[0]["label"] == rows[2]["label"] == "neg"

    data = world.file("blank.tsv", "text\nfine\n \n")
    assert cli.main(["predict", model, data, "-o", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [("label" in row, row.get("problem")) for row in rows] == [
        (True, None),
        (False, "no text"),
    ]


def test_convert_to_what_exists(world):
    target = world.folder / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    argv = ("convert", str(world.models / "encoder"), str(target))
    world.fails(*argv, naming=(str(target), "does not exist yet", "nothing is replaced"))


def test_convert_of_what_would_be_lost(world):
    folder = world.model("encoder")
    change(folder, "bert.adapter.weight", np.ones((2, 2), np.float32))
    argv = ("convert", str(folder), str(world.folder / "target"))
    world.fails(*argv, naming=(str(folder), "bert.adapter.weight", "nothing was written"))


# As a process


@pytest.mark.parametrize("mistake", ["config", "arguments"])
def test_exit_status_of_the_process(world, mistake):
    path = world.config("finetune", sede=1)
    argv = ["run", path] if mistake == "config" else ["run", path, "--sede"]
    before = world.content()
    done = subprocess.run(
        [sys.executable, "-m", "tinybert_jax", *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "sede" in done.stderr and "Traceback" not in done.stderr
    assert world.content() == before
