"""The public face, used as the README shows it, against PyTorch's classes on the same folder."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from reference import SIZES, random_bert, write_bert
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
)

from tinybert_jax import (
    TinyBertForMaskedLM,
    TinyBertForSequenceClassification,
    TinyBertForTokenClassification,
    TinyBertModel,
)

NAMES = ("bad", "good", "mixed")
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
TEXTS = ["a quick dog!", "no", "why not?"]
PAIRS = ["is it?", "nobody knows", "a b c d"]
TOLERANCE = 2e-5  # tests/models/test_encoder.py says why


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = random_bert(BertForSequenceClassification, **LABELS)
    return write_bert(tmp_path_factory.mktemp("hf") / "classifier", model)


@pytest.fixture(scope="module")
def model(folder):
    return TinyBertForSequenceClassification.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return BertTokenizer.from_pretrained(str(folder))


def torch_output(kind, folder, tokenizer, **options):
    model = kind.from_pretrained(str(folder), attn_implementation="eager").eval()
    with torch.no_grad():
        return model(**tokenizer(TEXTS, PAIRS, padding=True, return_tensors="pt"), **options)


def assert_close(ours, theirs, real=True) -> None:
    difference = np.where(real, np.abs(np.asarray(ours) - theirs.numpy()), 0)
    assert difference.shape == theirs.shape
    assert difference.max() <= TOLERANCE


def as_jax(fields) -> dict:
    """What `return_tensors="jax"` gave before transformers 5, which has no JAX tensors."""
    return {name: jnp.asarray(values) for name, values in fields.items()}


@pytest.mark.parametrize("tensors", ["np", "pt", "jax", "lists"])
def test_readme_example(folder, model, tokenizer, tensors):
    return_tensors = tensors if tensors in ("np", "pt") else None
    inputs = tokenizer(TEXTS, PAIRS, padding=True, return_tensors=return_tensors)
    inputs = as_jax(inputs) if tensors == "jax" else inputs
    outputs = model(**inputs)
    assert outputs["logits"] is outputs.logits
    expected = torch_output(BertForSequenceClassification, folder, tokenizer)
    assert_close(outputs.logits, expected.logits)


def test_texts_are_tokenised(model, tokenizer):
    expected = model(**tokenizer(TEXTS, padding=True, return_tensors="np")).logits
    np.testing.assert_array_equal(model(TEXTS).logits, expected)
    np.testing.assert_array_equal(model(TEXTS[0]).logits, model([TEXTS[0]]).logits)
    long = " ".join(TEXTS * SIZES["max_position_embeddings"])
    assert np.isfinite(model(long).logits).all()
    with pytest.raises(ValueError, match="expected texts alone, got them with attention_mask"):
        model(TEXTS, attention_mask=np.ones((3, 4), int))
    bare = type(model)(model.config, model.params, model.label_names)
    with pytest.raises(ValueError, match="got text for a model without a tokenizer"):
        bare(TEXTS)


def test_a_model_tells_its_labels_and_sizes(model, folder):
    assert model.config.id2label == LABELS["id2label"]
    assert model.config.label2id == LABELS["label2id"]
    assert TinyBertModel.from_pretrained(folder).config == model.config
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert repr(model) == (
        f"TinyBertForSequenceClassification(bert; {SIZES['num_hidden_layers']} layers × "
        f"{SIZES['hidden_size']}; {SIZES['num_attention_heads']} heads; "
        f"{SIZES['vocab_size']:,} words; {SIZES['max_position_embeddings']} positions; "
        f"{count:,} parameters; labels bad, good, mixed)"
    )
    with pytest.raises(AttributeError, match="TinyBertModel gives the states of all layers"):
        _ = model(TEXTS).hidden_states


def test_the_ids_alone_are_one_unpadded_segment(folder, model, tokenizer):
    ids = tokenizer("a quick dog!", return_tensors="np")["input_ids"]
    whole = model(ids, np.ones_like(ids), np.zeros_like(ids))
    np.testing.assert_array_equal(model(ids).logits, whole.logits)
    with torch.no_grad():
        theirs = BertForSequenceClassification.from_pretrained(str(folder)).eval()(
            torch.tensor(ids)
        )
    assert_close(model(ids).logits, theirs.logits)


def test_bare_model_gives_what_distillation_reads(folder, tokenizer):
    ours = TinyBertModel.from_pretrained(folder)(
        **tokenizer(TEXTS, PAIRS, padding=True, return_tensors="np")
    )
    theirs = torch_output(BertModel, folder, tokenizer, output_hidden_states=True)
    real = np.array(tokenizer(TEXTS, PAIRS, padding=True)["attention_mask"], bool)[..., None]
    assert_close(ours.last_hidden_state, theirs.last_hidden_state, real)
    assert_close(ours.pooler_output, theirs.pooler_output)
    assert_close(ours.hidden_states, torch.stack(theirs.hidden_states), real)
    heads, layers = SIZES["num_attention_heads"], SIZES["num_hidden_layers"]
    shape = (layers, *real.shape[:2], heads, SIZES["hidden_size"] // heads)
    for name in ("attention_queries", "attention_keys", "attention_values"):
        assert getattr(ours, name).shape == shape
        assert getattr(ours, name) is ours[name]
    with pytest.raises(AttributeError, match="no output 'logits'; there are .*'pooler_output'"):
        _ = ours.logits


def test_masked_lm(tmp_path, tokenizer):
    folder = write_bert(tmp_path / "mlm", random_bert(BertForMaskedLM))
    inputs = tokenizer(TEXTS, PAIRS, padding=True, return_tensors="np")
    ours = TinyBertForMaskedLM.from_pretrained(folder)(**inputs)
    expected = torch_output(BertForMaskedLM, folder, tokenizer)
    assert_close(ours.logits, expected.logits, inputs["attention_mask"].astype(bool)[..., None])


def test_token_classifier_there_and_back(tmp_path, tokenizer):
    theirs = random_bert(BertForTokenClassification, **LABELS)
    folder = write_bert(tmp_path / "tags", theirs)
    inputs = tokenizer(TEXTS, PAIRS, padding=True, return_tensors="np")
    real = inputs["attention_mask"].astype(bool)[..., None]
    model = TinyBertForTokenClassification.from_pretrained(folder)
    logits = model(**inputs).logits
    assert_close(logits, torch_output(BertForTokenClassification, folder, tokenizer).logits, real)

    saved = model.save_pretrained(tmp_path / "saved")
    again = TinyBertForTokenClassification.from_pretrained(saved)
    assert again.label_names == NAMES
    np.testing.assert_array_equal(again(**inputs).logits, logits)
    loaded = AutoModelForTokenClassification.from_pretrained(str(saved))
    assert loaded.config.id2label == LABELS["id2label"]
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in loaded.state_dict().items())


def test_the_head_of_another_class_is_not_taken(folder, tmp_path, tokenizer, capsys):
    """Not even where it has as many labels, of the same names."""
    inputs = tokenizer(TEXTS, PAIRS, padding=True, return_tensors="np")
    model = TinyBertForTokenClassification.from_pretrained(folder)
    said = capsys.readouterr().out
    assert "with a new head in place of its own" in said
    assert model(**inputs).logits.shape == (*inputs["input_ids"].shape, len(NAMES))
    renamed = TinyBertForTokenClassification.from_pretrained(folder, label_names=("a", "b"))
    assert renamed.label_names == ("a", "b")
    saved = json.loads((renamed.save_pretrained(tmp_path / "tags") / "config.json").read_text())
    assert saved["architectures"] == ["BertForTokenClassification"]
    assert "problem_type" not in saved


def test_save_and_load_again(folder, model, tokenizer, tmp_path):
    inputs = tokenizer(TEXTS, PAIRS, padding=True, return_tensors="np")
    saved = model.save_pretrained(tmp_path / "saved")  # with the tokenizer of the folder it is from
    again = TinyBertForSequenceClassification.from_pretrained(saved)
    assert again.label_names == model.label_names == NAMES
    assert again.config == model.config
    np.testing.assert_array_equal(again(**inputs).logits, model(**inputs).logits)
    theirs = AutoModelForSequenceClassification.from_pretrained(str(saved))
    assert theirs.config.id2label == LABELS["id2label"]
    text = ["a quick dog!"]
    assert (
        BertTokenizer.from_pretrained(str(saved))(text)["input_ids"] == tokenizer(text)["input_ids"]
    )


def test_what_a_head_knows_of_its_task_is_saved_again(tmp_path, tokenizer):
    model = random_bert(BertForSequenceClassification, num_labels=2)
    model.config.problem_type = "multi_label_classification"
    folder = write_bert(tmp_path / "tuned", model)
    file = folder / "config.json"
    known = {"tinybert_answers": {"threshold": 0.2}, "tinybert_task": "multi_label"}
    file.write_text(json.dumps(json.loads(file.read_text()) | known))
    saved = TinyBertForSequenceClassification.from_pretrained(folder).save_pretrained(
        tmp_path / "saved"
    )
    config = json.loads((saved / "config.json").read_text())
    assert {name: config[name] for name in known} == known
    assert config["problem_type"] == "multi_label_classification"


def test_home_is_expanded_where_a_model_is_saved(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    assert model.save_pretrained("~/saved") == tmp_path / "home" / "saved"
    assert not (tmp_path / "~").exists()
    assert TinyBertForSequenceClassification.from_pretrained("~/saved").label_names == NAMES


def test_regression_stays_a_regression(tmp_path, tokenizer):
    """transformers leaves problem_type out of a folder with one label: it infers it in training."""
    score = random_bert(BertForSequenceClassification, num_labels=1)
    folder = write_bert(tmp_path / "score", score)
    assert "problem_type" not in json.loads((folder / "config.json").read_text())
    model = TinyBertForSequenceClassification.from_pretrained(folder)
    saved = model.save_pretrained(tmp_path / "saved")
    assert json.loads((saved / "config.json").read_text())["problem_type"] == "regression"
    ours = TinyBertForSequenceClassification.from_pretrained(saved)(
        **tokenizer(TEXTS, PAIRS, padding=True, return_tensors="np")
    )
    assert ours.logits.shape == (len(TEXTS), 1)
    assert_close(ours.logits, torch_output(BertForSequenceClassification, saved, tokenizer).logits)


def test_a_folder_without_a_head_gets_a_fresh_one_of_the_named_size(tmp_path, capsys):
    folder = write_bert(tmp_path / "bare", random_bert(BertModel))
    model = TinyBertForSequenceClassification.from_pretrained(folder, label_names=("a", "b", "c"))
    assert capsys.readouterr().out.startswith(f"{folder}: its encoder, with a new head")
    assert model([[2, 5, 3]]).logits.shape == (1, 3)
    saved = model.save_pretrained(tmp_path / "saved")
    assert TinyBertForSequenceClassification.from_pretrained(saved).label_names == ("a", "b", "c")


def test_other_label_names_than_the_head_was_trained_with_are_refused(folder):
    same = TinyBertForSequenceClassification.from_pretrained(folder, label_names=NAMES)
    assert same.label_names == NAMES
    for names in (("good", "bad", "mixed"), ("bad", "good")):
        with pytest.raises(ValueError, match=re.escape(f"{list(NAMES)}, got {list(names)}")):
            TinyBertForSequenceClassification.from_pretrained(folder, label_names=names)


def test_save_without_any_tokenizer_says_so(folder, tmp_path, tokenizer):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    model = TinyBertForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass tokenizer="):
        model.save_pretrained(tmp_path / "saved")
    assert model.save_pretrained(tmp_path / "saved", tokenizer).is_dir()


IDS = [[2, 5, 6, 3], [2, 7, 3, 0]]


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({"input_ids": [[5] * 25]}, ["at most 24 positions", "got 25", "truncation=True"]),
        ({"input_ids": [[2, 61, 3]]}, ["input_ids", "0 to 60", "2 to 61", "tokenizer"]),
        ({"input_ids": [[2, -1, 3]]}, ["input_ids", "-1 to 3"]),
        ({"input_ids": [2, 5, 3]}, ["[batch, seq]", "[3]"]),
        ({"input_ids": [[]]}, ["[batch, seq]", "[1, 0]"]),
        ({"input_ids": [[2, 5, 3], [2, 3]]}, ["one length", "padding=True"]),
        ({"input_ids": [[2.0, 5.5, 3.0]]}, ["whole numbers", "float64"]),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 1, 1]]}, ["attention_mask", "[2, 4]"]),
        # An additive mask, as inside transformers, would be read the wrong way round.
        (
            {"input_ids": IDS, "attention_mask": [[0] * 4, [-10000] * 4]},
            ["attention_mask", "0 to 1"],
        ),
        ({"input_ids": IDS, "attention_mask": np.zeros((2, 4))}, ["attention_mask", "float64"]),
        ({"input_ids": IDS, "token_type_ids": [[0, 0, 1, 2]] * 2}, ["token_type_ids", "0 to 1"]),
        ({"input_ids": IDS, "labels": [0, 1]}, ["also ['labels']"]),
    ],
)
def test_wrong_inputs_are_named(model, inputs, words):
    with pytest.raises(ValueError) as caught:
        model(**inputs)
    assert all(word in str(caught.value) for word in words), caught.value


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="expected a Hugging Face model folder"):
        TinyBertModel.from_pretrained(tmp_path / "nothing")
