"""Folder to folder: `tinybert convert` and `tinybert data extend`, checked with transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
from reference import (
    LABELS,
    SIZES,
    VOCAB,
    assert_same_bits,
    change_config,
    old_norms,
    random_bert,
    write_bert,
    write_vocab,
)
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
)

from tinybert_jax import cli

EYE = np.eye(SIZES["hidden_size"], dtype=np.float32)

# tinybert convert


def write_old_folder(folder: Path, model) -> dict[str, np.ndarray]:
    """As of 2019: no model_type, gamma and beta, vocab.txt alone; two shards without prefix."""
    model.save_pretrained(str(folder))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_vocab(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("model_type", "dtype", "transformers_version"):
        del config[name]
    if not isinstance(model, BertForTokenClassification):  # without a class: a head of sequences
        del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    old = {old_norms(name.removeprefix("bert.")): t for name, t in tensors.items()}
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(old)}
    for file in set(files.values()):
        save_file({n: t for n, t in old.items() if files[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize(
    "kind, options, auto",
    [
        (BertModel, {}, AutoModel),
        (BertForSequenceClassification, LABELS, AutoModelForSequenceClassification),
        (BertForSequenceClassification, {}, AutoModelForSequenceClassification),  # default names
        (BertForSequenceClassification, {"num_labels": 1}, AutoModelForSequenceClassification),
        (BertForTokenClassification, LABELS, AutoModelForTokenClassification),
        (BertForPreTraining, {}, AutoModelForPreTraining),
    ],
)
def test_convert_rewrites_an_old_folder(kind, options, auto, tmp_path, capsys):
    source, target = tmp_path / "old", tmp_path / "new"
    model = random_bert(kind, **options)
    tensors = write_old_folder(source, model)
    assert cli.main(["convert", str(source), str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)

    written = load_file(target / "model.safetensors")
    prefix = "bert." if kind is BertModel else ""
    assert_same_bits(written, {prefix + name: t for name, t in tensors.items()})
    loaded, info = auto.from_pretrained(str(target), output_loading_info=True)
    assert not any(info[name] for name in ("unexpected_keys", "missing_keys", "mismatched_keys"))
    if kind is BertForSequenceClassification:
        assert loaded.config.id2label == model.config.id2label
        is_number = options.get("num_labels") == 1
        kinds = {True: "regression", False: "single_label_classification"}
        assert loaded.config.problem_type == kinds[is_number]
    assert AutoTokenizer.from_pretrained(str(target)).get_vocab() == {
        piece: i for i, piece in enumerate(VOCAB)
    }

    before = (target / "model.safetensors").read_bytes()
    assert cli.main(["convert", str(source), str(target)]) == 2
    assert "does not exist yet" in capsys.readouterr().err
    assert (target / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "change, fields, words",
    [
        (lambda t: {**t, "adapter.weight": EYE}, {}, ["got also", "adapter.weight"]),
        (
            lambda t: {n: a for n, a in t.items() if "word_emb" not in n},
            {},
            ["got none for", "word"],
        ),
        (lambda t: {n: a for n, a in t.items() if n != "classifier.bias"}, {}, ["classifier/bias"]),
        (lambda t: t, {"intermediate_size": 71}, ["intermediate", "71", "72"]),
        (lambda t: t, {"vocab_size": 62}, ["word_embeddings", "62", "61"]),
    ],
)
def test_convert_writes_nothing_that_is_not_whole(tmp_path, capsys, change, fields, words):
    source, target = tmp_path / "source", tmp_path / "target"
    write_bert(source, random_bert(BertForSequenceClassification, **LABELS))
    tensors = load_file(source / "model.safetensors")
    save_file(change(tensors), source / "model.safetensors")
    change_config(source, **fields)
    assert cli.main(["convert", str(source), str(target)]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_convert_refuses_a_head_that_is_not_known(tmp_path, capsys):
    source = write_bert(tmp_path / "choice", random_bert(BertForMultipleChoice))
    assert cli.main(["convert", str(source), str(tmp_path / "target")]) == 2
    said = capsys.readouterr().err
    assert "BertForMultipleChoice" in said and "SequenceClassification" in said
    assert not (tmp_path / "target").exists()


# tinybert data extend


@pytest.fixture
def letters(tmp_path):
    """A masked LM whose vocabulary has letters only and room for 3 more, and text of words."""
    model = random_bert(BertForMaskedLM, vocab_size=len(VOCAB) + 3)
    folder = write_bert(tmp_path / "model", model)
    (tmp_path / "text.txt").write_text("sea wave\n" * 5 + "tide sea a\n" + "Wave wave ☂\n" * 2)
    return folder, model, tmp_path / "text.txt"


def _extend(folder, text, target, *more):
    return cli.main(["data", "extend", str(folder), str(text), "-o", str(target), *more])


def test_new_words_begin_as_the_mean_of_their_pieces(letters, tmp_path, capsys):
    folder, model, text = letters
    target = tmp_path / "more"
    assert _extend(folder, text, target) == 0
    assert "2 new words, wave, sea\n" in capsys.readouterr().out  # 9 and 6 times

    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.tokenize("Sea waves abc") == ["sea", "wave", "##s", "a", "##b", "##c"]
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate([*VOCAB, "wave", "sea"])}
    extended = AutoModelForMaskedLM.from_pretrained(target).eval()
    old, new = model.state_dict(), extended.state_dict()
    pieces = [VOCAB.index(piece) for piece in ("s", "##e", "##a")]
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        assert new[name].shape == old[name].shape  # two of the spare rows are taken
        np.testing.assert_array_equal(new[name][: len(VOCAB)], old[name][: len(VOCAB)])
        np.testing.assert_array_equal(new[name][-1], old[name][-1])
        np.testing.assert_allclose(new[name][-2], old[name][pieces].mean(0), rtol=1e-6, atol=1e-7)
    rest = [name for name in old if "word_embeddings" not in name and "predictions" not in name]
    assert len(rest) > 40 and all(torch.equal(new[name], old[name]) for name in rest)

    before = (target / "model.safetensors").read_bytes()
    assert _extend(folder, text, target) == 2
    assert "does not exist yet" in capsys.readouterr().err
    assert (target / "model.safetensors").read_bytes() == before


def test_words_are_as_many_and_as_common_as_asked(letters, tmp_path, capsys):
    folder, model, text = letters
    assert _extend(folder, text, tmp_path / "one", "--words", "1") == 0
    assert "sea" not in AutoTokenizer.from_pretrained(tmp_path / "one").get_vocab()
    assert _extend(folder, text, tmp_path / "all", "--min-count", "1") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "all")
    assert tokenizer.tokenize("tide ☂") == ["tide", "☂"]
    table = AutoModelForMaskedLM.from_pretrained(tmp_path / "all").get_input_embeddings().weight
    assert len(table) == len(VOCAB) + 4  # one more than it had
    unknown = model.get_input_embeddings().weight[VOCAB.index("[UNK]")]
    assert torch.equal(table[tokenizer.convert_tokens_to_ids("☂")], unknown)
    for more, message in (
        (["--min-count", "10"], "10 times or more in the text, found none"),
        (["--words", "0"], "--words: expected 1 or more, got 0"),
        (["--min-count", "-3"], "--min-count: expected 1 or more, got -3"),
    ):
        assert _extend(folder, text, tmp_path / "none", *more) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_added_tokens_keep_their_numbers(letters, tmp_path):
    folder, _, text = letters
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<chem>"])
    tokenizer.save_pretrained(folder)
    assert _extend(folder, text, tmp_path / "more") == 0
    extended = AutoTokenizer.from_pretrained(tmp_path / "more")
    assert extended.get_vocab() == {w: i for i, w in enumerate([*VOCAB, "<chem>", "wave", "sea"])}
    assert extended.tokenize("sea <chem>") == ["sea", "<chem>"]


def test_a_vocabulary_with_a_gap_is_refused(letters, tmp_path, capsys):
    folder, _, text = letters
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join([*VOCAB[:10], VOCAB[5], *VOCAB[11:]]) + "\n")
    assert _extend(folder, text, tmp_path / "more") == 2
    assert "to have the ids from 0 on" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_cased_words_keep_their_capitals(letters, tmp_path):
    folder, _, text = letters
    pieces = [piece.upper() if piece == "w" else piece for piece in VOCAB]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    BertTokenizer.from_pretrained(folder, do_lower_case=False).save_pretrained(folder)
    assert _extend(folder, text, tmp_path / "more", "--min-count", "2") == 0
    known = AutoTokenizer.from_pretrained(tmp_path / "more").get_vocab()
    assert {"Wave", "wave", "sea"} <= known.keys()


def test_what_is_no_word_piece_is_refused(letters, tmp_path, capsys):
    folder, _, text = letters
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"] = {"type": "WordLevel", "vocab": state["model"]["vocab"], "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert _extend(folder, text, tmp_path / "more") == 2
    assert "expected WordPiece, got WordLevel" in capsys.readouterr().err
