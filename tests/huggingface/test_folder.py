"""What we write: transformers loads it, and it is there whole or not at all."""

import itertools
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
from reference import (
    LABELS,
    NAMES,
    SIZES,
    our_config,
    our_params,
    random_bert,
    write_vocab,
)
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
)

from tinybert_jax.huggingface.folder import read_model, save_model, start_params
from tinybert_jax.huggingface.head import Head
from tinybert_jax.huggingface.hub import load_tokenizer
from tinybert_jax.huggingface.tensors import Tensors
from tinybert_jax.models.heads import (
    make_classifier,
    make_encoder,
    make_masked_lm,
    make_token_classifier,
)
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.params import flatten, unflatten
from tinybert_jax.settings.sizes import ModelConfig

CONFIG = ModelConfig(**SIZES)
HEAD = Head("SequenceClassification", "single_label_classification", NAMES)
HEADS = {
    BertForSequenceClassification: HEAD,
    BertForTokenClassification: Head("TokenClassification", None, NAMES),
}


@pytest.fixture(scope="module")
def params():
    model = random_bert(BertForSequenceClassification, **LABELS)
    return our_params(model, make_classifier(CONFIG, 3)[1])


# What we write, transformers loads.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_vocab(tmp_path_factory.mktemp("vocab")))


@pytest.mark.parametrize(
    "kind, auto, unexpected",
    [
        (BertModel, AutoModel, set()),
        (BertForSequenceClassification, AutoModelForSequenceClassification, set()),
        (BertForTokenClassification, AutoModelForTokenClassification, set()),
        # As in BERT's own folders: the encoder's pooler is kept, which this class has no use for.
        (
            BertForMaskedLM,
            AutoModelForMaskedLM,
            {"bert.pooler.dense.weight", "bert.pooler.dense.bias"},
        ),
    ],
)
def test_transformers_loads_what_we_write(kind, auto, unexpected, tokenizer, tmp_path):
    head = HEADS.get(kind)
    model = random_bert(kind, **(LABELS if head else {}))
    make = {
        BertModel: make_encoder,
        BertForMaskedLM: make_masked_lm,
        BertForSequenceClassification: lambda config: make_classifier(config, len(NAMES)),
        BertForTokenClassification: lambda config: make_token_classifier(config, len(NAMES)),
    }[kind]
    apply, init = make(our_config(model))
    params = our_params(model, init)
    folder = save_model(tmp_path / "a" / "ours", params, our_config(model), tokenizer, head=head)
    assert read_model(folder).head == head
    jax.tree.map(np.testing.assert_array_equal, start_params(folder, init, whole=True), params)
    loaded, info = auto.from_pretrained(
        str(folder), output_loading_info=True, attn_implementation="eager"
    )
    assert type(loaded) is kind
    assert info["unexpected_keys"] == unexpected
    assert not any(info[name] for name in ("missing_keys", "mismatched_keys", "error_msgs"))

    fields = tokenizer(["a quick dog!", "no"], ["why?", "nobody knows"], padding=True)
    ids, types, mask = (
        jnp.asarray(fields[n]) for n in ("input_ids", "token_type_ids", "attention_mask")
    )
    output = jax.jit(apply)(params, Text(ids, types), mask.astype(bool))
    ours = getattr(output, "logits", getattr(output, "pooled", output))
    with torch.no_grad():
        theirs = loaded.eval()(**{name: torch.tensor(value) for name, value in fields.items()})
    theirs = theirs.pooler_output if kind is BertModel else theirs.logits
    has_logits_of_tokens = kind in (BertForMaskedLM, BertForTokenClassification)
    real = np.asarray(mask, bool)[..., None] if has_logits_of_tokens else True
    assert np.abs(np.where(real, np.asarray(ours) - theirs.numpy(), 0)).max() <= 1e-4
    if head:
        assert loaded.config.id2label == dict(enumerate(NAMES))
        assert loaded.config.label2id == LABELS["label2id"]
        assert loaded.config.problem_type == head.problem_type
    for kind_of_tokenizer in (AutoTokenizer, BertTokenizer):
        theirs = kind_of_tokenizer.from_pretrained(str(folder))
        assert isinstance(theirs, BertTokenizer)
        assert (
            theirs(["a quick dog!"], ["Why?"])["input_ids"]
            == tokenizer(["a quick dog!"], ["Why?"])["input_ids"]
        )


def test_a_head_without_names_gets_one_name_an_output(tokenizer, tmp_path):
    _, init = make_classifier(CONFIG, 4)
    params = init(jax.random.key(0))
    unnamed = HEAD._replace(label_names=())
    folder = save_model(tmp_path / "unnamed", params, CONFIG, tokenizer, head=unnamed)
    loaded = AutoModelForSequenceClassification.from_pretrained(str(folder))
    assert loaded.config.num_labels == 4 and loaded.classifier.out_features == 4
    with pytest.raises(ValueError, match="expected 4, one per output of the head, got .*'bad'"):
        save_model(tmp_path / "wrong", params, CONFIG, tokenizer, head=HEAD)


def test_settings_of_answers_are_kept_in_the_folder(params, tokenizer, tmp_path):
    head = HEAD._replace(problem_type="multi_label_classification", settings={"threshold": 0.25})
    folder = save_model(tmp_path / "m", params, CONFIG, tokenizer, head=head)
    assert read_model(folder).head == head
    loaded = AutoModelForSequenceClassification.from_pretrained(str(folder))
    assert loaded.config.problem_type == "multi_label_classification"


# Saving is all or nothing.


class TornTokenizer:
    """Writes half of its files and breaks, as on a full disk."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{")
        raise OSError("No space left on device")


def fail_by_tokenizer(folder, params, tokenizer):
    with pytest.raises(OSError, match="No space"):
        save_model(folder, params, CONFIG, TornTokenizer(), head=HEAD)


def fail_by_extra_file(folder, params, tokenizer):
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_model(folder, params, CONFIG, tokenizer, head=HEAD, extra={"more.bin": write})


def fail_by_nan(folder, params, tokenizer):
    flat = {path: np.array(leaf) for path, leaf in flatten(params).items()}
    flat["encoder/pooler/bias"][3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        save_model(folder, unflatten(flat), CONFIG, tokenizer, head=HEAD)


def fail_by_other_sizes(folder, params, tokenizer):
    """The config of another model: the folder would not load."""
    shallow = CONFIG.model_copy(update={"num_hidden_layers": 2})
    with pytest.raises(ValueError, match="differ when read back"):
        save_model(folder, params, shallow, tokenizer, head=HEAD)


@pytest.mark.parametrize(
    "fail", [fail_by_tokenizer, fail_by_extra_file, fail_by_nan, fail_by_other_sizes]
)
def test_a_failing_save_leaves_the_earlier_folder(params, tokenizer, tmp_path, fail):
    folder = save_model(tmp_path / "model", params, CONFIG, tokenizer, head=HEAD)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fail(folder, params, tokenizer)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_look_at_a_folder_reads_no_tensor(params, tokenizer, tmp_path, monkeypatch):
    folder = save_model(tmp_path / "new", params, CONFIG, tokenizer, head=HEAD)
    read = []
    whole = Tensors.__getitem__
    monkeypatch.setattr(Tensors, "__getitem__", lambda self, n: read.append(n) or whole(self, n))
    model = read_model(folder)
    assert (model.config, model.head) == (CONFIG, HEAD) and "classifier.weight" in model.tensors
    assert len(set(read)) <= 1, "the checker of types looks at one value of a mapping"
    assert model.tensors["classifier.weight"].shape == model.tensors.shape("classifier.weight")
    assert read[-1] == "classifier.weight"


def test_a_reader_sees_one_save_while_others_replace_it(params, tokenizer, tmp_path):
    """Weights and label names of one save belong together, whenever the reader comes."""
    saves = []
    for number, names in enumerate((("a", "b", "c"), ("c", "b", "a"))):
        flat = {path: np.full_like(leaf, number) for path, leaf in flatten(params).items()}
        saves.append((unflatten(flat), HEAD._replace(label_names=names)))
    folder, is_over = tmp_path / "model", threading.Event()

    def save(number: int) -> None:
        save_model(folder, saves[number][0], CONFIG, tokenizer, head=saves[number][1])

    save(0)
    early = read_model(folder)

    def replace() -> None:
        for number in itertools.cycle((1, 0)):
            save(number)
            if is_over.is_set():
                return

    saver = threading.Thread(target=replace)
    saver.start()
    seen = set()
    try:
        for turn in range(5000):
            if turn >= 60 and len(seen) == 2:
                break
            try:
                model = read_model(folder)
            except (ValueError, FileNotFoundError):  # in the moment of the replacement
                continue
            number = int(model.tensors["classifier.bias"][0])
            assert model.label_names == saves[number][1].label_names
            seen.add(number)
    finally:
        is_over.set()
        saver.join()
    assert seen == {0, 1}
    assert not early.tensors["classifier.bias"].any(), "the save that it opened"


def test_truncation_leaves_no_more_than_the_positions(params, tokenizer, tmp_path):
    folder = save_model(tmp_path / "m", params, CONFIG, tokenizer, head=HEAD)
    saved = AutoTokenizer.from_pretrained(folder)
    ids = saved("word " * 1000, truncation=True)["input_ids"]
    assert len(ids) == CONFIG.max_position_embeddings


def test_a_save_replaces_an_earlier_one_whole(params, tokenizer, tmp_path):
    folder = save_model(tmp_path / "model", params, CONFIG, tokenizer, head=HEAD)
    save_model(folder, params["encoder"], CONFIG, tokenizer)
    assert "classifier.weight" not in load_file(folder / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # who reads one reads all


def test_a_save_destroys_no_foreign_file(params, tokenizer, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.txt.*would be lost"):
        save_model(tmp_path / "home", params, CONFIG, tokenizer, head=HEAD)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(ValueError, match="file is a file"):
            save_model(path, params, CONFIG, tokenizer, head=HEAD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "home"]
