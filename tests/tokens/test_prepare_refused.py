"""prepare: changed inputs, unusable outputs and bad records are refused with their names."""

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
def started(world, request):
    """A world with a finished or an unfinished store."""
    output = world.prepare()
    if request.param == "unfinished":
        unfinish(output)
    return world


def test_changed_sources_settings_and_tokenizer_are_refused(started):
    text, path = started.text.read_text(), str(started.text)
    started.text.write_text(text.replace("a", "b", 1))
    started.refused(f"{path}: expected the source", "got a changed one", "name another output")
    started.text.write_text(text)
    more = started.folder / "more.txt"
    more.write_text("more\n")
    both = [path, str(more)]
    started.refused(f"{more}: expected the source", "got a new one", sources=both)
    started.refused(f"{path}: expected the source", "got none", sources=[str(more)])
    started.refused("width: expected 32", "got 48", width=48)
    vocab = (started.folder / "vocab" / "vocab.txt").read_text()
    (started.folder / "vocab" / "vocab.txt").write_text(vocab.replace("!", "$"))
    started.refused("vocab: expected the tokenizer", tokenizer=str(started.folder / "vocab"))
    started.prepare()


def test_an_output_that_is_no_store_is_refused(world):
    (world.folder / "store").mkdir()
    world.refused("store: expected a new folder or a store; got a folder without manifest.json")
    world.refused("expected a new folder or a store; got a file", output=str(world.text))


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
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2 and not output.exists()
    assert f"{world.text}: expected text that does not change while it is read" in message


def test_an_output_in_use_is_refused(world):
    partial = partial_of(world.folder / "store")
    partial.mkdir()
    with (partial / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="output: .*store.partial is in use by another"):
            world.prepare()


def test_bad_records_are_listed_and_too_many_end_the_run(world):
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
    assert 0 < entries < 10  # the run ended before it had read all text


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_bad_records_are_named_and_change_no_row_of_the_others(world, kind):
    """In one chunk, the rows of a file with bad lines are those of the good lines alone."""
    good = [f"Sentence number {n} of the text." for n in range(400)]
    write = {
        "jsonl": lambda text: json.dumps({"text": text, "n": "x"}).encode(),
        "csv": lambda text: f'"{text}",x'.encode(),
        "tsv": lambda text: f"{text}\tx".encode(),
    }[kind]
    bad = {
        "jsonl": [
            *(b'{"text": "b\xff"}', b'{"text": " "}', b'{"text": "\\ud800"}', b"\x00\x00"),
            *(b"[" * 5000, b'{"text": ' + b"9" * 5000 + b"}", b'{"text": 1}', b'{"text": "cut'),
        ],
        "csv": [b"b\xff,x", b" ,x", b"one column", b'"stray" quote,x'],
        "tsv": [b"b\xff\tx", b" \tx", b"one column"],
    }[kind]
    lines, places = [write(text) for text in good], []
    for number, line in enumerate(bad):
        places.append(number * 40 + 7)
        lines.insert(places[-1], line)
    header = [] if kind == "jsonl" else [b"text\tn" if kind == "tsv" else b"text,n"]
    stores = []
    for name, content in (("bad", lines), ("good", [write(text) for text in good])):
        path = world.folder / f"{name}.{kind}"
        path.write_bytes(b"\n".join([*header, *content]) + b"\n")
        settings = {"sources": [str(path)], "chunk_bytes": 10**6, "max_bad_share": 0.05}
        stores.append(world.prepare(output=str(world.folder / name), **settings))
    for shard in stores[1].glob("shard-*"):
        assert (stores[0] / shard.name).read_bytes() == shard.read_bytes()
    listed = read_jsonl(stores[0] / "bad_records.jsonl")
    first = 1 + len(header)
    assert [record["place"] for record in listed] == [f"line {place + first}" for place in places]
    assert all(record["reason"] for record in listed)


def test_no_text_and_no_pairs_are_refused(world):
    world.text.write_text("\n\n")
    world.refused("sources: expected text; got none")
    world.text.write_text("One sentence.\nAnother one.\n")
    world.refused(
        "mode: pairs: expected pairs of texts", mode="pairs", output=str(world.folder / "alone")
    )


# Settings


def test_settings_are_read_and_unknown_keys_named(world, capsys):
    command = ["data", "prepare", str(world.config), "width=64", "--print-config"]
    assert cli.main(command) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["width"] == 64 and PrepareConfig(**shown).chunk_bytes == 8000
    with pytest.raises(config_files.ConfigError, match="documents: unknown key"):  # a mode's name
        config_files.load_as(PrepareConfig, world.config, ["documents=1"])
    with pytest.raises(config_files.ConfigError, match="widht: unknown key; did you mean 'width'"):
        config_files.load_as(PrepareConfig, world.config, ["widht=64"])


def test_settings_may_change_while_a_store_has_no_rows(world):
    """A run that failed before the first chunk can be repeated with corrected settings."""
    path = world.folder / "a.csv"
    path.write_text("id,body\n1,a text\n2,another\n")
    settings = {"sources": [str(path)], "width": 16}
    world.refused("expected a column 'text'", "'body'", **settings)
    store = open_store(world.prepare(**settings, text="body"), verify=True)
    assert store.num_rows > 0


def test_empty_files_are_skipped(world):
    """Also as the first source."""
    empty = world.folder / "empty.txt"
    empty.touch()
    store = open_store(world.prepare(sources=[str(empty), str(world.text)]), verify=True)
    alone = open_store(world.prepare(output=str(world.folder / "alone")), verify=True)
    assert store.manifest["num_tokens"] == alone.manifest["num_tokens"]
    world.refused("expected text", sources=[str(empty)], output=str(world.folder / "none"))
