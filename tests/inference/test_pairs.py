"""Pairs of texts on the command line, and models of pairs that get single texts."""

import functools
import json
from pathlib import Path

import jax
import pytest
from tiny_inputs import TEACHER, TEXTS, write_inputs

import tinybert_jax
from tinybert_jax import cli
from tinybert_jax.huggingface.folder import read_model, save_model, write_json
from tinybert_jax.huggingface.head import Head
from tinybert_jax.huggingface.hub import load_tokenizer
from tinybert_jax.huggingface.sentence_folder import SentenceFolder, sentence_files
from tinybert_jax.inference.predict import predict
from tinybert_jax.models.heads import make_classifier, make_encoder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(a model of pairs, one whose folder does not say)."""
    folder = tmp_path_factory.mktemp("models")
    _, config, tokenizer = write_inputs(folder, **TEACHER)
    params = make_classifier(config, 2)[1](jax.random.key(0))
    params["classifier"] = jax.tree.map(lambda leaf: 30 * leaf, params["classifier"])
    found = []
    for name in ("pairs", "any"):
        kind = ("SequenceClassification", "single_label_classification", ("neg", "pos"))
        head = Head(*kind, reads_pairs=name == "pairs")
        save_model(folder / name, params, config, tokenizer, head=head)
        assert read_model(folder / name).head == head
        found.append(str(folder / name))
    return found


def test_pairs_on_the_command_line_are_those_of_a_file(models, tmp_path, capsys):
    file = tmp_path / "rows.tsv"
    file.write_text(f"one\ttwo\n{TEXTS[0]}\t{TEXTS[1]}\n{TEXTS[2]}\t{TEXTS[3]}\n")
    for model in models:
        assert cli.main(["predict", model, str(file), "--text", "one", "--text-pair", "two"]) == 0
        expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        pairs = ["-t", TEXTS[0], "-t", TEXTS[2], "--text-pair", TEXTS[1], "--text-pair", TEXTS[3]]
        assert cli.main(["predict", model, *pairs]) == 0
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected
    answer = tinybert_jax.pipeline("text-classification", model)
    assert answer(TEXTS[0], TEXTS[1])[0]["label"] == expected[0]["label"]


def test_a_search_is_ranked_again_by_a_model_that_reads_both_texts(models, tmp_path, capsys):
    source = read_model(models[0])
    tokenizer, key = load_tokenizer(models[0]), jax.random.key(1)
    params = make_classifier(source.config, 1)[1](key)
    head = Head("SequenceClassification", "regression", ("LABEL_0",), reads_pairs=True)
    save_model(tmp_path / "numbers", params, source.config, tokenizer, head=head)
    files = sentence_files(SentenceFolder("mean", True, 16), source.config.hidden_size, 16)
    more = {name: functools.partial(write_json, tree=tree) for name, tree in files.items()}
    encoder = make_encoder(source.config)[1](key)
    save_model(tmp_path / "vectors", encoder, source.config, tokenizer, extra=more)
    (tmp_path / "faq.txt").write_text("\n".join(TEXTS[:4]))
    words = ["search", str(tmp_path / "vectors"), str(tmp_path / "faq.txt"), "-q", "tea and film"]
    assert cli.main([*words, "-k", "4"]) == 0
    cosines = {r["row"]: r["score"] for r in json.loads(capsys.readouterr().out)["results"]}
    assert cli.main([*words, "-k", "3", "--rerank", str(tmp_path / "numbers")]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    answer = tinybert_jax.pipeline("text-classification", tmp_path / "numbers")
    numbers = [answer("tea and film", text)["score"] for text in TEXTS[:4]]
    order = sorted(range(4), key=lambda place: -numbers[place])[:3]
    assert [r["row"] for r in results] == [place + 1 for place in order]
    for result in results:
        assert result["cosine"] == cosines[result["row"]]
        assert result["score"] == pytest.approx(numbers[result["row"] - 1], abs=1e-5)
    assert cli.main([*words, "--rerank", models[0]]) == 2
    assert "expected a regression of pairs" in capsys.readouterr().err


def test_a_model_of_pairs_refuses_single_texts(models, tmp_path, capsys):
    file = tmp_path / "rows.tsv"
    file.write_text("text\tlabel\ntea and toast\tpos\n")
    told = "expected pairs of texts, as the model was trained on"
    for words in (["predict", "-t", "tea"], ["predict", str(file)], ["evaluate", str(file)]):
        command, *rest = words
        assert cli.main([command, models[0], *rest]) == 2
        error = capsys.readouterr().err
        assert told in error and "--text-pair" in error
    with pytest.raises(ValueError, match=told):
        tinybert_jax.pipeline("text-classification", models[0])("tea")
    assert "label" in predict(models[1], ["tea"])[0]


def test_numbers_of_texts_have_to_agree(models, tmp_path, capsys):
    assert cli.main(["predict", models[1], "-t", "a", "-t", "b", "--text-pair", "c"]) == 2
    assert "expected a second text for each of 2, got 1" in capsys.readouterr().err
    file = tmp_path / "rows.tsv"
    file.write_text("text\ta\tb\ntea\tx\ty\n")
    assert cli.main(["predict", models[1], str(file), "--text-pair", "a", "--text-pair", "b"]) == 2
    assert "--text-pair: expected one column" in capsys.readouterr().err


def test_a_mark_that_is_no_boolean_is_refused(models):
    file = Path(models[0]) / "config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"tinybert_pairs": "yes"}))
    with pytest.raises(ValueError, match="expected true or false as tinybert_pairs, got 'yes'"):
        read_model(models[0])
    file.write_text(before)
