"""`tinybert run --data` in an empty folder: from a table to a Hugging Face folder and a report."""

import csv
import json
import os
import signal
from pathlib import Path

import pytest
import tiny_inputs
import yaml

import tinybert_jax
from tinybert_jax import cli
from tinybert_jax.config import load as config_files
from tinybert_jax.huggingface.folder import read_model
from tinybert_jax.recipes import pipeline
from tinybert_jax.training.throughput import Meter

ROWS = list(zip(tiny_inputs.TEXTS, tiny_inputs.LABELS, strict=True))
# The whole recipe in a few steps.
SHORT = [
    f"{stage}.{setting}"
    for stage in ("finetune", "prediction")
    for setting in ("num_epochs=1", "max_length=16", "head_init=random", "trained_words=all")
]
SHORT += ["intermediate=null", "baseline=null", "distillation.teacher_margin=-1"]


def _write_mail(path, encoding="utf-8", word="fine"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file)
        writer.writerow(["id", "subject", "body", "folder"])
        writer.writerows([i, "Re:", f"{text} {word}", f] for i, (text, f) in enumerate(ROWS))


def _tinybert(*words):
    return cli.main(list(map(str, words)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cheap_programs):
    """A folder with a teacher, outside of the folder that the user works in."""
    folder = tmp_path_factory.mktemp("from_table")
    tiny_inputs.write_inputs(folder, **{**tiny_inputs.TEACHER, "max_position_embeddings": 128})
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """The run of a new user: one command in a folder that holds nothing but a table."""
    _write_mail(folder / "empty" / "mail.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "empty")
        options = ["--data", "mail.csv", "--text", "body", "--label", "folder"]
        assert _tinybert("run", *options, "--teacher", folder / "teacher", *SHORT) == 0
    return folder / "empty" / "runs" / "mail"


def test_one_command_ends_in_a_model_and_a_report(finished):
    assert sorted(path.name for path in finished.parent.parent.iterdir()) == ["mail.csv", "runs"]
    assert read_model(finished / "hf").label_names == ("neg", "pos")
    assert read_model(finished / "hf").head.columns == {"text": "body"}
    assert "mail" in (finished / "report.html").read_text()
    card = (finished / "hf" / "README.md").read_text()
    assert "from teacher with the text of mail.csv, by" in card
    assert "% of the rows of mail.csv, set apart by a hash of their text" in card
    results = json.loads((finished / "results.json").read_text())
    assert {model["role"] for model in results["models"]} >= {"teacher", "student"}


def test_the_run_folder_s_config_runs_again(finished, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder / "empty")
    tree = yaml.safe_load((finished / "config.yaml").read_text())
    assert "recipe" not in tree and tree["task"]["text"] == "body"
    assert _tinybert("run", "runs/mail/config.yaml") == 0
    assert "prediction: done before, kept" in capsys.readouterr().out
    options = ["--data", "mail.csv", "--text", "body", "--label", "folder"]
    again = [*options, "--teacher", str(folder / "teacher"), *SHORT]
    assert _tinybert("run", *again, "student.hidden_size=8") == 2
    assert "holds a run of another config" in capsys.readouterr().err


def test_the_command_and_the_config_file_have_one_recipe(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder / "empty")
    _write_mail(folder / "empty" / "mail.csv")
    columns = ["task.text=body", "task.label=folder", "task.name=mail", "name=mail"]
    monkeypatch.setenv("TEACHER", str(folder / "teacher"))
    monkeypatch.setenv("TEXT", "mail.csv")
    own_text = config_files.__file__.replace("tinybert_jax/config/load.py", "configs/own-text.yaml")
    assert _tinybert("run", own_text, *columns, "run_dir=runs/mail", "--print-config") == 0
    of_file = capsys.readouterr()
    options = ["--data", "mail.csv", "--teacher", str(folder / "teacher")]
    assert _tinybert("run", *options, "--print-config") == 0
    of_command = capsys.readouterr()
    assert of_command.out == of_file.out
    first, *choices = of_command.err.splitlines()
    assert first.startswith("task: classification, text in column 'body', one of 2 labels in ")
    assert choices == of_file.err.splitlines() and all(c.startswith("recipe: ") for c in choices)


def test_news_and_a_file_of_two_columns(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    news = [{"title": "news", "text": text, "topics": [label]} for text, label in ROWS]
    (tmp_path / "news.jsonl").write_text("".join(json.dumps(row) + "\n" for row in news))
    (tmp_path / "sms.tsv").write_text("".join(f"{label}\t{text}\n" for text, label in ROWS))
    teacher = ["--teacher", folder / "teacher", "--print-config"]
    assert _tinybert("run", "num_seeds=2", "--data", "news.jsonl", *teacher) == 0
    told = capsys.readouterr()
    assert "task: multi_label, text in column 'text', lists of labels" in told.err
    assert "of 18 rows" in told.err and "num_seeds: 2" in told.out
    assert _tinybert("run", *teacher, "--data", "sms.tsv") == 0
    assert "text in column '1', one of 2 labels in column '0' (counted" in capsys.readouterr().err
    lists = ["a|b", "b|c", "a", "c", "b", "a|b|c"] * 3
    rows = [{"text": text, "tags": own} for (text, _), own in zip(ROWS, lists, strict=False)]
    (tmp_path / "tags.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--text", "text", "--label", "tags", "--task", "multi_label"]
    assert _tinybert("run", *teacher, "--data", "tags.jsonl", *options) == 0
    assert "separator: '|'" in capsys.readouterr().out
    names = ["news.jsonl", "sms.tsv", "tags.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_mistakes_are_told_before_anything_is_written(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _write_mail(tmp_path / "mail.csv")
    _write_mail(tmp_path / "old mail.csv", "latin-1", "caf\u00e9")
    teacher = ("--teacher", folder / "teacher")
    for words, message in (
        (("--data", "old mail.csv", *teacher), "fix: if it is LATIN1: iconv -f LATIN1 -t UTF-8 "),
        (("--data", "mail.csv"), "--teacher: expected a BERT folder or hub id; got none"),
        (("--data", "mail.csv", *teacher, "--text", "bdy"), "did you mean 'body'?"),
        (("--data", "mail.csv", *teacher, "--task", "regresion"), "did you mean 'regression'?"),
        (("--data", "mail.csv", *teacher, "--text", "id", "task.text=body"), "['text'] once"),
        (("--data", "mail.csv", *teacher, "task.textt=body"), "task.textt: unknown key"),
        (("--data", "mail.csv", *teacher, "task=3"), "settings of the task as task.key=value"),
        (("--data", "mails.csv", *teacher), "mails.csv: expected a file or folder; got nothing"),
        (("--text", "body"), "expected a config, or --data with a table, got --text alone"),
        ((), "expected a config, or --data with a table, got neither"),
        (("mail.csv",), "got a table; to train on it, tinybert run --data mail.csv"),
        (("a.yaml", "--data", "mail.csv"), "got a.yaml and --data mail.csv; give one of them"),
    ):
        assert _tinybert("run", *words) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mail.csv", "old mail.csv"]


def test_the_same_from_python(finished, folder, monkeypatch, tmp_path, capsys):
    """`distill` goes on with the run of the same settings, which is done."""
    monkeypatch.chdir(folder / "empty")
    before = {path: path.read_bytes() for path in (finished / "models").rglob("*.safetensors")}
    settings = {name: yaml.safe_load(own) for name, _, own in (s.partition("=") for s in SHORT)}
    options = {"text": "body", "label": "folder", "settings": settings}
    result = tinybert_jax.distill("mail.csv", folder / "teacher", **options)
    assert "finetune: done before" in capsys.readouterr().out
    assert (result.folder.resolve(), result.report.is_file()) == (finished, True)
    assert {path: path.read_bytes() for path in before} == before
    assert {name.split()[0] for name in result.scores} == {"teacher", "student", "linear"}
    student = next(own for name, own in result.scores.items() if name.startswith("student"))
    assert f"{student:.4f}" in repr(result)
    result.save_pretrained(tmp_path / "copy")
    assert tinybert_jax.pipeline("text-classification", tmp_path / "copy")("a sea") == (
        result.pipeline()("a sea")
    )
    with pytest.raises(ValueError, match="expected a new folder"):
        result.save_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match="holds a run of another config"):
        tinybert_jax.distill("mail.csv", folder / "teacher", "1l-8d", **options)
    with pytest.raises(ValueError, match=r"for name, got PosixPath.*str\(path\)"):
        tinybert_jax.distill("mail.csv", folder / "teacher", settings={"name": tmp_path})
    with pytest.raises(ValueError, match="'😀'"):  # told as it was given
        tinybert_jax.distill("mail.csv", folder / "teacher", settings={"task.kind": "😀"})
    for wrong in ("1l-16", "3x384"):
        with pytest.raises(ValueError, match=f"as '3l-384d', .*bert-tiny.*, got '{wrong}'"):
            tinybert_jax.distill("mail.csv", folder / "teacher", wrong, **options)


@pytest.fixture
def heard():
    """SIGINT raises KeyboardInterrupt, as in Python without a runner that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_in_python_saves_and_the_same_call_goes_on(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder / "empty")
    _write_mail(folder / "empty" / "mail.csv")
    settings = {name: yaml.safe_load(own) for name, _, own in (s.partition("=") for s in SHORT)}
    options = {"text": "body", "label": "folder", "run_dir": "stopped", "settings": settings}
    record, calls = Meter.record, []

    def interrupted(self, *arguments, **named):
        calls.append(0)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return record(self, *arguments, **named)

    monkeypatch.setattr(Meter, "record", interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        tinybert_jax.distill("mail.csv", folder / "teacher", **options)
    assert raised.value.__suppress_context__ and len(raised.traceback) < 8
    told = capfd.readouterr().err
    assert "stopped by SIGINT after step" in told and "Ctrl-C again stops at once" in told
    assert "everything until then is saved. To go on, call again: tinybert_jax.distill" in told
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    scores = pipeline.collect_results
    monkeypatch.setattr(
        pipeline, "collect_results", lambda *a: os.kill(os.getpid(), signal.SIGINT) or scores(*a)
    )
    with pytest.raises(KeyboardInterrupt):  # no step is awaited, as none runs
        tinybert_jax.distill("mail.csv", folder / "teacher", **options)
    told = capfd.readouterr()
    assert "finetune: resumes at step" in told.out
    assert "interrupted after its last stage; to go on from what is saved, call again" in told.err
    assert not Path("stopped", "results.json").exists()
    monkeypatch.setattr(pipeline, "collect_results", scores)
    assert tinybert_jax.distill("mail.csv", folder / "teacher", **options).report.is_file()
