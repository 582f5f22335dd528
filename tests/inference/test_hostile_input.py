"""`tinybert predict` and `evaluate` on hostile text and weights: JSON alone, or a message."""

import json
import re

import numpy as np
import pytest
from bad_world import LABELS, TEXTS, change
from safetensors.numpy import load_file

from tinybert_jax import cli
from tinybert_jax.huggingface import weights
from tinybert_jax.huggingface.hub import load_tokenizer

HOSTILE = "\x1b]0;owned\x07\x1b[2J </script>\u202e\x9b31m \u2028 tea"
MARKED = '</script>\u3000tea, "quoted"'  # no control character: a label may have it
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]")


def _json_lines(text):
    """The lines, parsed by a strict reader: no NaN, no character that steers a terminal."""

    def refuse(constant):
        raise AssertionError(constant)

    assert not CONTROL.search(text)
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _labelled(world, name):
    names = {"0": name, "1": "pos"}
    ids = {name: int(place) for place, name in names.items()}
    return world.model("classifier", id2label=names, label2id=ids)


def _run(world, *argv):
    """(status, standard output, standard error)."""
    world.capfd.readouterr()
    status = cli.main([str(word) for word in argv])
    return status, *world.capfd.readouterr()


@pytest.fixture
def overflowing(world, monkeypatch):
    """A model that computes no finite number for a text with the word toast.

    Its weights are larger than a folder may have.
    """
    monkeypatch.setattr(weights, "LARGEST_WEIGHT", np.inf)
    folder = world.model("classifier")
    table = load_file(folder / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    ids = load_tokenizer(str(folder))("toast", add_special_tokens=False)["input_ids"]
    fine = load_tokenizer(str(folder))("a fine film", add_special_tokens=False)["input_ids"]
    table[sorted(set(ids) - set(fine))] = np.finfo(np.float32).max
    change(folder, "bert.embeddings.word_embeddings.weight", table)
    return folder


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_outputs_that_are_not_finite_are_null_and_named(world, overflowing):
    texts = ["a fine film", "tea and toast", " ", "a fine film"]
    sentences = [word for text in texts for word in ("-t", text)]
    status, out, _ = _run(world, "predict", overflowing, *sentences)
    rows = _json_lines(out)
    assert status == 0 and [row["row"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["label"] == "neg" and rows[3] == {**rows[0], "row": 4}
    assert rows[1] == {
        "row": 2,
        "text": "tea and toast",
        **{"label": None, "probability": None},
        "problem": "the model's outputs are not finite",
    }
    assert rows[2]["problem"] == "no text"
    num_bad = sum("toast" in text for text in TEXTS)
    first = next(n for n, text in enumerate(TEXTS, 1) if "toast" in text)
    status, out, message = _run(world, "evaluate", overflowing, world.dev)
    assert status == 2 and out == ""
    assert f"for {num_bad} of {len(TEXTS)} rows, the first row {first}; " in message
    assert message.startswith(f"tinybert: {overflowing}: expected finite outputs, got NaN or inf")


def test_a_label_that_steers_a_terminal_is_refused(world):
    model = _labelled(world, HOSTILE)
    message = world.fails("predict", str(model), "-t", "tea", naming=("\\x1b]0;owned",))
    assert not CONTROL.search(message)


def test_hostile_text_and_labels_come_out_escaped_and_the_same(world):
    model = _labelled(world, MARKED)
    texts = [HOSTILE, "nul \x00 in it", "a \\ud800 in words", "e\u0301 中文 \U0001f600"]
    data = world.file("a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    status, out, _ = _run(world, "predict", model, data)
    assert status == 0
    rows = _json_lines(out)
    assert [row["text"] for row in rows] == texts
    assert {row["label"] for row in rows} == {MARKED}
    assert "中文" in out  # letters stay as they are
    output = world.folder / "out.jsonl"
    assert _run(world, "predict", model, data, "-o", output)[1] == ""
    assert output.read_text(encoding="utf-8") == out
    labels = [{"neg": MARKED}.get(label, label) for label in LABELS]
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
    data = world.file("dev.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    status, out, _ = _run(world, "evaluate", model, data)
    assert status == 0 and _json_lines(out.replace("\n", ""))[0]["accuracy"] == 0.5
    data = world.file("dev.jsonl", json.dumps({"text": "tea", "label": f"{HOSTILE}!"}) + "\n")
    status, out, message = _run(world, "evaluate", model, data)
    assert status == 2 and out == "" and "\\x1b]0;owned" in message
    assert not CONTROL.search(message)


@pytest.mark.parametrize(
    "line, naming",
    [
        ("[" * 100_000, "line 2: nested too deeply"),
        (json.dumps({"text": "half \ud800"}), "lone surrogates"),
        ('{"text": "tea", "n": %s}' % ("9" * 5000), "line 2: a number with too many digits"),
        ("\x00\x00", "line 2: Expecting value"),
    ],
)
def test_a_hostile_line_is_refused_with_its_number(world, line, naming):
    data = world.file("a.jsonl", json.dumps({"text": "tea"}) + "\n" + line + "\n")
    for command in ("predict", "evaluate"):
        message = world.fails(
            command, str(world.models / "classifier"), data, naming=("a.jsonl: expected", naming)
        )
        assert message.count("\n") == 1 and not CONTROL.search(message)


def test_a_sentence_that_is_not_utf8_is_refused(world):
    world.fails(
        *("predict", str(world.models / "classifier"), "-t", "tea", "-t", "t\udcffa"),
        naming=("text 2: expected UTF-8, got 't\\udcffa'",),
    )
