"""prepare: what changed, is in the way or cannot be read is refused by name."""

import fcntl
import json
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.prepare_world import World, count_entries, make_text, read_jsonl, unfinish
from tinybert_jax import cli
from tinybert_jax.config import load as config_files
from tinybert_jax.config.data import PrepareConfig
from tinybert_jax.tokens.store import open_store, partial_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture(params=["finished", "unfinished"])
def begun(world, request):
    """A world with a store, whole or stopped on the way."""
    output = world.prepare()
    if request.param == "unfinished":
        unfinish(output)
    return world


def test_what_changed_is_refused_by_name(begun):
    text, path = begun.text.read_text(), str(begun.text)
    begun.text.write_text(text.replace("a", "b", 1))
    begun.refused(f"{path}: expected the source", "got a changed one", "name another output")
    begun.text.write_text(text)
    more = begun.folder / "more.txt"
    more.write_text("more\n")
    both = [path, str(more)]
    begun.refused(f"{more}: expected the source", "got a new one", sources=both)
    begun.refused(f"{path}: expected the source", "got none", sources=[str(more)])
    begun.refused("width: expected 32", "got 48", width=48)
    vocab = (begun.folder / "vocab" / "vocab.txt").read_text()
    (begun.folder / "vocab" / "vocab.txt").write_text(vocab.replace("!", "$"))
    begun.refused("vocab: expected the tokenizer", tokenizer=str(begun.folder / "vocab"))
    begun.prepare()


def test_an_output_that_is_something_else_is_refused(world):
    (world.folder / "store").mkdir()
    world.refused("store: expected a new folder or a store; got something else")


def test_an_output_among_the_sources_is_refused(world):
    inside = world.folder / "text" / "store"
    inside.parent.mkdir()
    world.text.rename(inside.parent / "text.txt")
    world.refused("outside of", sources=[str(inside.parent)], output=str(inside))
    world.prepare(sources=[str(inside.parent)])


def test_a_source_that_changes_while_it_is_read_is_refused(world):
    world.text.write_text(make_text(1500))
    output = world.folder / "store"
    process = subprocess.Popen(
        world.command(output), cwd=ROOT, stderr=subprocess.PIPE, text=True, bufsize=0
    )
    while count_entries(output) < 2:
        assert process.poll() is None
        time.sleep(0.002)
    with world.text.open("a") as file:
        file.write("\n\nmore\n")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2 and not output.exists()
    assert f"{world.text}: expected text that stays as it is" in told


def test_an_output_in_use_is_refused(world):
    partial = partial_of(world.folder / "store")
    partial.mkdir()
    with (partial / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="output: .*store.partial is in use by another"):
            world.prepare()


def test_bad_records_are_listed_and_stop_past_a_share(world):
    lines = [json.dumps({"text": f"sentence {n}."}) for n in range(200)]
    lines[50], lines[120] = "{", '{"txt": 1}'
    path = world.folder / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    settings = {"sources": [str(path)], "chunk_bytes": 600}
    world.refused(
        "store.partial/bad_records.jsonl: expected at most 0.50% of the records to be bad",
        "got 2, the first: ",
        '"place": "line 51"',
        max_bad_share=0.005,
        **settings,
    )
    store = open_store(world.prepare(max_bad_share=0.01, **settings), verify=True)
    listed = read_jsonl(store.folder / "bad_records.jsonl")
    assert [(bad["source"], bad["place"]) for bad in listed] == [
        (str(path), "line 51"),
        (str(path), "line 121"),
    ]
    assert store.manifest["num_bad_records"] == 2 and store.manifest["num_records"] == 200
    path.write_text("{\n" * 3000)
    world.refused("bad_records.jsonl", output=str(world.folder / "worse"), **settings)
    entries = count_entries(world.folder / "worse")
    assert 0 < entries < 10  # it did not read on to the end


def test_no_text_and_no_pairs_are_refused(world):
    world.text.write_text("\n\n")
    world.refused("sources: expected text; got none")
    world.text.write_text("One sentence.\nAnother one.\n")
    world.refused(
        "mode: pairs: expected pairs of texts", mode="pairs", output=str(world.folder / "alone")
    )


# Settings


def test_settings_are_read_and_mistakes_named(world, capsys):
    command = ["data", "prepare", str(world.config), "width=64", "--print-config"]
    assert cli.main(command) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["width"] == 64 and PrepareConfig(**shown).chunk_bytes == 8000
    with pytest.raises(config_files.ConfigError, match="documents: unknown key"):  # a mode's name
        config_files.load_as(PrepareConfig, world.config, ["documents=1"])
    with pytest.raises(config_files.ConfigError, match="widht: unknown key; did you mean 'width'"):
        config_files.load_as(PrepareConfig, world.config, ["widht=64"])


def test_a_failed_start_binds_nothing(world):
    """Nothing was done yet, so what was wrong can be mended in the same command."""
    path = world.folder / "a.csv"
    path.write_text("id,body\n1,a text\n2,another\n")
    settings = {"sources": [str(path)], "width": 16}
    world.refused("expected a column 'text'", "'body'", **settings)
    store = open_store(world.prepare(**settings, text="body"), verify=True)
    assert store.num_rows > 0


def test_empty_files_are_passed_over(world):
    """Also as the first of a list."""
    empty = world.folder / "empty.txt"
    empty.touch()
    store = open_store(world.prepare(sources=[str(empty), str(world.text)]), verify=True)
    alone = open_store(world.prepare(output=str(world.folder / "alone")), verify=True)
    assert store.manifest["num_tokens"] == alone.manifest["num_tokens"]
    world.refused("expected text", sources=[str(empty)], output=str(world.folder / "none"))
