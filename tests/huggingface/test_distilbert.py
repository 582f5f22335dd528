"""DistilBERT folders: read, written, rewritten, and the families of a run mixed."""

import json

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
from reference import (
    LABELS,
    NAMES,
    assert_same_bits,
    change_config,
    old_norms,
    our_config,
    random_distilbert,
    write_bert,
    write_vocab,
)
from tiny_inputs import STUDENT, TEACHER, TEXTS, write_config, write_inputs
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
    DistilBertTokenizer,
)

from tinybert_jax import (
    TinyBertForMaskedLM,
    TinyBertForSequenceClassification,
    TinyBertForTokenClassification,
    TinyBertModel,
    cli,
)
from tinybert_jax.huggingface.folder import load_params, read_model, save_model, start_params
from tinybert_jax.models.heads import make_classifier, make_encoder, make_masked_lm
from tinybert_jax.settings.sizes import ModelConfig

KINDS = {
    DistilBertModel: TinyBertModel,
    DistilBertForMaskedLM: TinyBertForMaskedLM,
    DistilBertForSequenceClassification: TinyBertForSequenceClassification,
    DistilBertForTokenClassification: TinyBertForTokenClassification,
}


def write(folder, kind):
    """(folder, model) as transformers writes it, with DistilBERT's tokenizer."""
    options = LABELS if "Classification" in kind.__name__ else {}
    model = random_distilbert(kind, **options)
    write_bert(folder, model)
    write_vocab(folder / "words")
    DistilBertTokenizer.from_pretrained(str(folder / "words")).save_pretrained(str(folder))
    (folder / "words" / "vocab.txt").unlink()
    (folder / "words").rmdir()
    return folder, model


def weights(folder):
    """Under the names of a model with a head."""
    prefix = "distilbert."
    return {
        f"{prefix}{name}" if name.startswith(("embeddings.", "transformer.")) else name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, tmp_path, capsys):
    """Equal outputs; bits and sizes come back, and transformers loads them without a warning."""
    folder, model = write(tmp_path / "theirs", kind)
    ours = KINDS[kind].from_pretrained(folder)
    assert capsys.readouterr().out == ""  # nothing starts fresh, nothing is unused
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fields = tokenizer(["a quick dog!", "no"], ["why?", "no b c d"], padding=True)
    assert "token_type_ids" not in fields
    with torch.no_grad():
        expected = model(**{name: torch.tensor(value) for name, value in fields.items()})
    outputs, name = ours(**fields), "last_hidden_state" if kind is DistilBertModel else "logits"
    mask = np.array(fields["attention_mask"], bool)[..., None]
    real = True if kind is DistilBertForSequenceClassification else mask
    difference = np.asarray(outputs[name]) - expected[name].numpy()
    assert np.where(real, np.abs(difference), 0).max() <= 2e-5
    assert kind is not DistilBertModel or outputs.pooler_output is None

    saved = ours.save_pretrained(tmp_path / "ours")
    assert_same_bits(weights(saved), weights(folder))
    loaded, info = kind.from_pretrained(str(saved), output_loading_info=True)
    assert not any(info.values()), info
    theirs, again = model.config.to_dict(), loaded.config.to_dict()
    different = {field for field in theirs if theirs[field] != again.get(field)}
    assert different <= {"architectures", "dtype", "problem_type", "_name_or_path"}, different
    assert again["architectures"] == [kind.__name__] and again["seq_classif_dropout"] == 0.25
    assert type(AutoTokenizer.from_pretrained(saved)) is DistilBertTokenizer


def test_token_types_other_than_zero_are_refused(tmp_path):
    folder, _ = write(tmp_path / "theirs", DistilBertModel)
    model, ids = TinyBertModel.from_pretrained(folder), np.array([[2, 5, 3]])
    plain = model(ids).last_hidden_state
    np.testing.assert_array_equal(model(ids, token_type_ids=0 * ids).last_hidden_state, plain)
    with pytest.raises(ValueError, match="0 to 0, got 1 to 1; the model has no token types"):
        model(ids, token_type_ids=ids // ids)


@pytest.mark.parametrize("kind", KINDS)
def test_convert_of_old_names(kind, tmp_path):
    """Without the prefix, with `gamma` and `beta`, with the tied decoder and the position ids."""
    folder, model = write(tmp_path / "old", kind)
    old = {old_norms(n.removeprefix("distilbert.")): t for n, t in weights(folder).items()}
    old["embeddings.position_ids"] = np.arange(24)[None]
    if kind is DistilBertForMaskedLM:
        old["vocab_projector.weight"] = old["embeddings.word_embeddings.weight"].copy()
    expected = weights(folder)
    save_file(old, folder / "model.safetensors")
    assert cli.main(["convert", str(folder), str(tmp_path / "new")]) == 0
    assert_same_bits(weights(tmp_path / "new"), expected)
    assert read_model(tmp_path / "new").config == our_config(model)


def test_a_pooler_that_would_not_be_written_is_refused(tmp_path, capsys):
    folder, _ = write(tmp_path / "mlm", DistilBertForMaskedLM)
    more = {"pre_classifier.weight": np.eye(52, dtype=np.float32)}
    more["pre_classifier.bias"] = more["pre_classifier.weight"][0].copy()
    save_file({**weights(folder), **more}, folder / "model.safetensors")
    assert cli.main(["convert", str(folder), str(tmp_path / "new")]) == 2
    assert "got also ['pre_classifier.bias'" in capsys.readouterr().err


def test_the_bias_of_the_masked_lm_is_a_weight(tmp_path, capsys):
    """By its one name: surplus where it is not used, missed where it is not there."""
    folder, model = write(tmp_path / "mlm", DistilBertForMaskedLM)
    config = our_config(model)
    bias = start_params(folder, make_masked_lm(config).init)["decoder"]["bias"]
    np.testing.assert_array_equal(bias, model.vocab_projector.bias.detach().numpy())
    capsys.readouterr()
    init = make_encoder(config).init
    abstract = jax.eval_shape(init, jax.random.key(0))
    surplus = load_params(read_model(folder), abstract, lambda: init(jax.random.key(0))).surplus
    assert "vocab_projector.bias" in surplus
    start_params(folder, init)
    assert capsys.readouterr().out == ""  # the head of pretraining is not missed
    tensors = weights(folder)
    spoilt = {"vocab_projector.bias": np.full(61, np.nan, np.float32)}
    save_file({**tensors, **spoilt}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="vocab_projector.bias: expected finite"):
        start_params(folder, make_masked_lm(config).init)
    spoilt = {"vocab_projector.weight": tensors["distilbert.embeddings.word_embeddings.weight"] + 1}
    save_file({**tensors, **spoilt}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="vocab_projector.weight to equal .*word_embeddings"):
        start_params(folder, make_masked_lm(config).init)


def test_a_bare_encoder_teaches_no_task(tmp_path, capsys):
    folder, model = write(tmp_path / "bare", DistilBertModel)
    init = make_classifier(our_config(model), 2).init
    start_params(folder, init)
    said = capsys.readouterr().out
    assert "its encoder, with a new head" in said and "no weights for encoder/pooler" in said
    with pytest.raises(ValueError, match="expected trained weights for .*classifier"):
        start_params(folder, init, whole=True)


def test_fields_that_config_json_lacks_are_those_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "distilbert"}))
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    config = read_model(tmp_path).config
    assert (config.num_hidden_layers, config.classifier_dropout) == (6, 0.2)
    change_config(tmp_path, activation="silu")
    with pytest.raises(ValueError, match="a supported DistilBert; hidden_act"):
        read_model(tmp_path)


def test_new_words(tmp_path):
    folder, model = write(tmp_path / "mlm", DistilBertForMaskedLM)
    (tmp_path / "text.txt").write_text("sea waves\n" * 6)
    target = tmp_path / "more"
    assert (
        cli.main(["data", "extend", str(folder), str(tmp_path / "text.txt"), "-o", str(target)])
        == 0
    )
    extended = DistilBertForMaskedLM.from_pretrained(target)
    number = AutoTokenizer.from_pretrained(target).convert_tokens_to_ids("sea")
    pieces = AutoTokenizer.from_pretrained(folder)("sea", add_special_tokens=False)["input_ids"]
    for name in ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.bias"):
        old, new = model.state_dict()[name], extended.state_dict()[name]
        np.testing.assert_allclose(new[number], old[pieces].mean(0), rtol=1e-6, atol=1e-7)


# Runs


STAGE = {"num_steps": 2, "global_batch_size": 8, "max_length": 16, "learning_rate": 1e-3}
HEAD_STAGE = {**STAGE, "eval_every": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """teacher/ is a BERT with its masked-LM head, distilbert/ a DistilBERT as transformers has it.

    Its tokenizer gives no token types, and the rows are pairs.
    """
    folder = tmp_path_factory.mktemp("inputs")
    _, config, tokenizer = write_inputs(folder, **TEACHER)
    rows = "".join(f"{t}\ta film\t{'pos' if i % 2 else 'neg'}\n" for i, t in enumerate(TEXTS))
    (folder / "rows.tsv").write_text("text\ttext_pair\tlabel\n" + rows)
    sizes = config.model_dump() | {"type_vocab_size": 0, "classifier_dropout": 0.2}
    distil = ModelConfig(**sizes | {"model_type": "distilbert"})
    params = make_masked_lm(distil).init(jax.random.key(1))
    save_model(folder / "distilbert", params, distil, tokenizer)
    settings = json.loads((folder / "distilbert" / "tokenizer_config.json").read_text())
    assert "token_type_ids" not in settings.pop("model_input_names")
    settings["tokenizer_class"] = "DistilBertTokenizer"
    (folder / "distilbert" / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "teacher, family, init",
    [
        ("distilbert", "distilbert", "random"),
        ("distilbert", "bert", "teacher_embeddings"),
        ("teacher", "distilbert", "teacher_embeddings"),
    ],
)
def test_a_run(teacher, family, init, inputs, tmp_path, cheap_programs):
    config = write_config(
        tmp_path / "run.yaml",
        inputs,
        tmp_path / "run",
        teacher={"path": str(inputs / teacher)},
        task={"train": str(inputs / "rows.tsv"), "dev": str(inputs / "rows.tsv")},
        student={**STUDENT, "model_type": family, "init": init},
        distillation={"teacher_margin": -1},
        finetune=HEAD_STAGE,
        intermediate=STAGE,
        prediction=HEAD_STAGE,
    )
    tree = yaml.safe_load((tmp_path / "run.yaml").read_text())
    tree["task"]["text_pair"] = "text_pair"
    del tree["corpus"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    assert cli.main(["run", config]) == 0

    folder = tmp_path / "run" / "hf"
    sizes = read_model(folder).config
    assert sizes.type_vocab_size == (2 if family == "bert" else 0)
    assert sizes.classifier_dropout == (None if family == "bert" else 0.2)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        str(folder), output_loading_info=True
    )
    assert theirs.config.model_type == family and not any(info.values()), info
    ours = TinyBertForSequenceClassification.from_pretrained(folder)
    assert ours.label_names == ("neg", "pos") != NAMES
    fields = AutoTokenizer.from_pretrained(folder)(TEXTS[:3], ["a film"] * 3, padding=True)
    assert ("token_type_ids" in fields) == (family == "bert")
    with torch.no_grad():
        expected = theirs.eval()(**{name: torch.tensor(v) for name, v in fields.items()}).logits
    np.testing.assert_allclose(ours(**fields).logits, expected, atol=2e-5)


def test_the_loss_of_pairs_is_refused(inputs, tmp_path, capsys):
    store = {
        "sources": [str(inputs / "corpus.txt")],
        "tokenizer": str(inputs / "distilbert"),
        "output": str(tmp_path / "store"),
        "mode": "pairs",
        "width": 16,
    }
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(store))
    assert cli.main(["data", "prepare", str(tmp_path / "prepare.yaml")]) == 0
    config = write_config(
        tmp_path / "run.yaml",
        inputs,
        tmp_path / "run",
        teacher={"path": str(inputs / "distilbert")},
        corpus={"stores": {str(tmp_path / "store"): 1}},
        pretrain={**STAGE, "pair_weight": 1},
    )
    assert cli.main(["run", config]) == 2
    assert "pretrain.pair_weight: expected 0" in capsys.readouterr().err
