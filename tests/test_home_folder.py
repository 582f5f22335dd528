"""Paths that begin with ~ are read and written in the home folder, wherever a user gives a path."""

import numpy as np
import pytest
from tiny_inputs import TEACHER, write_inputs

from tests.prepare_world import World
from tinybert_jax import cli
from tinybert_jax.config.tasks import MultiLabelTask
from tinybert_jax.data.conll import read_tagged
from tinybert_jax.data.corpus import read_corpus
from tinybert_jax.data.records import find_sources
from tinybert_jax.data.splits import Reading
from tinybert_jax.data.tables import read_labelled
from tinybert_jax.huggingface.hub import find_folder, load_tokenizer
from tinybert_jax.tasks.multi_label import MULTI_LABEL
from tinybert_jax.tokens.store import open_store


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_tables_and_tagged_text(home):
    (home / "rows.tsv").write_text("text\tlabel\na film\tpos\n")
    (home / "rows.conll").write_text("Ada B-PER\n")
    examples = read_labelled("~/rows.tsv", text="text", label="label")
    assert examples.text == ["a film"]
    section = MultiLabelTask(train="~/rows.tsv", dev_share=0.5, label="label")
    assert MULTI_LABEL.read("~/rows.tsv", section, Reading()).text == ["a film"]
    assert read_tagged("~/rows.conll").words == [["Ada"]]


def test_corpora_and_sources(home):
    (home / "text").mkdir()
    for name in ("a.txt", "b.txt"):
        (home / "text" / name).write_text(name)
    (home / "text" / "c.jsonl.gz").write_text("")
    for paths in (["~/text/a.txt", "~/text/b.txt"], ["~/text/*.txt"]):
        assert read_corpus(paths) == ["a.txt", "b.txt"]
        assert [s.path for s in find_sources(paths)] == [
            str(home / "text" / name) for name in ("a.txt", "b.txt")
        ]
    with pytest.raises(ValueError, match="text files that are not compressed"):
        read_corpus(["~/text"])


def test_models_and_tokenizers(home):
    write_inputs(home, **TEACHER)
    assert find_folder("~/teacher") == home / "teacher"
    assert len(load_tokenizer("~/teacher")) > 5


def test_stores(home, capsys):
    world = World(home)
    (home / "text").mkdir()
    (home / "text" / "a.txt").write_text("a")
    folder = world.prepare(output="~/store", sources=["~/text.txt"], tokenizer="~/tokenizer")
    assert folder == home / "store"
    assert len(open_store("~/store", verify=True).gather(np.arange(1)).ids) == 1
    assert cli.main(["data", "inspect", "~/store"]) == 0
    with pytest.raises(ValueError, match="expected a folder outside of"):
        world.prepare(output="~/text/store", sources=["~/text"])


def test_an_unknown_user_is_a_missing_path():
    for read in (find_folder, open_store, lambda path: read_corpus([path])):
        with pytest.raises(ValueError, match="~no-such-user/x"):
            read("~no-such-user/x")


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("convert model ~/out", ["target"]),
        ("predict model ~/rows.tsv --output=~/out", ["data", "output"]),
        ("data vocab ~/text.txt --output=~/out", ["output"]),
        ("data extend model ~/text.txt -o ~/out", ["output"]),
    ],
)
def test_output_paths_of_commands(home, command, names):
    arguments = cli._parse(command.split())
    for name in names:
        assert getattr(arguments, name).startswith(str(home))
