"""Folders of encoder-decoders: the bits of transformers both ways, and folders that are refused."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from reference import (
    assert_same_bits,
    change_config,
    random_bert,
    random_encoder_decoder,
    tensors_of,
    write_bert,
)
from safetensors.numpy import load_file, save_file
from transformers import BertForMaskedLM, DistilBertConfig, EncoderDecoderModel

from tinybert_jax.huggingface.encoder_decoder import (
    Tokenizers,
    check_tables,
    load_encoder_decoder,
    load_tokenizers,
    save_encoder_decoder,
    warm_start,
)
from tinybert_jax.huggingface.folder import read_model
from tinybert_jax.huggingface.hub import load_tokenizer
from tinybert_jax.inference.seq2seq import TinyBertForConditionalGeneration
from tinybert_jax.models.params import flatten, unflatten
from tinybert_jax.models.seq2seq import make_seq2seq

WIDTHS = {"hidden_size": 40, "num_hidden_layers": 1, "vocab_size": 61}
IDS = {"decoder_start_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return random_encoder_decoder(**WIDTHS)


@pytest.fixture
def folder(model, tmp_path):
    return write_bert(tmp_path / "theirs", model)


def test_a_folder_of_transformers_comes_back_bit_for_bit(model, folder, tmp_path):
    loaded = load_encoder_decoder(folder)
    tokens = load_tokenizers(loaded.folder)
    assert tokens.source is tokens.target
    saved = save_encoder_decoder(tmp_path / "ours", loaded.params, loaded.config, tokens)
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder, saved))
    assert_same_bits(ours, theirs)
    again, report = EncoderDecoderModel.from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same_bits(tensors_of(again), tensors_of(model))
    kept = again.generation_config
    assert {name: getattr(kept, name) for name in IDS} == IDS
    source = torch.tensor([[7, 8, 9]])
    expected = model.generate(source, max_new_tokens=8)
    assert torch.equal(again.generate(source, max_new_tokens=8), expected)


def test_two_vocabularies_have_a_tokenizer_each(model, folder, tmp_path):
    loaded = load_encoder_decoder(folder)
    other = load_tokenizer(folder)
    other.add_tokens(["[NEW]"])
    tokens = Tokenizers(load_tokenizer(folder), other)
    saved = save_encoder_decoder(tmp_path / "a", loaded.params, loaded.config, tokens)
    with pytest.raises(ValueError, match="the model's decoder's table has 61 rows"):
        check_tables(load_tokenizers(saved), loaded.config, "the model")
    with pytest.raises(ValueError, match="the model's decoder's table has 61 rows"):
        TinyBertForConditionalGeneration.from_pretrained(saved)
    tokens = Tokenizers(other, load_tokenizer(folder))
    config = loaded.config.model_copy(
        update={"encoder": loaded.config.encoder.model_copy(update={"vocab_size": 62})}
    )
    flat = flatten(loaded.params)
    words = "encoder/embeddings/word/embedding"
    params = unflatten({**flat, words: np.pad(flat[words], ((0, 1), (0, 0)))})
    found = load_tokenizers(save_encoder_decoder(tmp_path / "b", params, config, tokens))
    check_tables(found, config, "the model")
    assert (len(found.source), len(found.target)) == (62, 61)


def test_a_warm_start_copies_layers_and_makes_the_cross_attention_anew(tmp_path):
    bert = random_bert(BertForMaskedLM, num_hidden_layers=2)
    encoder = write_bert(tmp_path / "encoder", bert)
    made = []

    def init(config):
        made.append(jax.jit(make_seq2seq(config).init)(jax.random.key(0)))
        return made[0]

    config, params = warm_start(encoder, encoder, init, decoder_layers=(2,), **IDS)
    assert (config.encoder.num_hidden_layers, config.decoder.num_hidden_layers) == (2, 1)
    flat, fresh = flatten(params), flatten(made[0])
    kernel = bert.bert.encoder.layer[1].attention.self.query.weight.detach().numpy().T
    np.testing.assert_array_equal(flat["decoder/layers/attention/query/kernel"][0], kernel)
    np.testing.assert_array_equal(flat["encoder/layers/attention/query/kernel"][1], kernel)
    head = bert.cls.predictions
    np.testing.assert_array_equal(flat["output/bias"], head.bias.detach().numpy())
    np.testing.assert_array_equal(
        flat["transform/kernel"], head.transform.dense.weight.detach().numpy().T
    )
    anew = {path for path in fresh if np.array_equal(flat[path], fresh[path])}
    assert anew and all("cross" in path or "pooler" in path for path in anew)
    with pytest.raises(ValueError, match="expected layers from 1 to 2"):
        warm_start(encoder, encoder, init, decoder_layers=(4,), **IDS)


def _change_decoder(folder, **fields):
    raw = json.loads((folder / "config.json").read_text())
    change_config(folder, decoder={**raw["decoder"], **fields})


def _without_ids(folder):
    (folder / "generation_config.json").unlink()
    raw = json.loads((folder / "config.json").read_text())
    del raw["decoder_start_token_id"]
    (folder / "config.json").write_text(json.dumps(raw))


def _change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CROSS = "decoder.bert.encoder.layer.0.crossattention.self.query.weight"
TABLE = "decoder.cls.predictions.decoder.weight"
WRONG = {
    "not causal": (lambda f: _change_decoder(f, is_decoder=False), "with is_decoder true"),
    "no source": (lambda f: _change_decoder(f, add_cross_attention=False), "add_cross_attention"),
    "other decoder": (
        lambda f: change_config(f, decoder=DistilBertConfig().to_dict()),
        "expected a decoder of the model_type 'bert'",
    ),
    "no start": (_without_ids, "token as decoder_start_token_id, got None"),
    "far start": (
        lambda f: (
            (f / "generation_config.json").unlink(),
            change_config(f, decoder_start_token_id=99),
        ),
        "below the decoder's vocab_size 61, got 99",
    ),
    "encoder alone": (lambda f: change_config(f, model_type="bert"), "'encoder-decoder', got"),
    "no decoder": (lambda f: change_config(f, decoder=None), "settings of the decoder, got None"),
    "no tensor": (lambda f: _change_tensors(f, lambda t: t.pop(CROSS)), "a folder without"),
    "more tensors": (
        lambda f: _change_tensors(f, lambda t: t.update(more=np.zeros(2, np.float32))),
        "with more: .'more'",
    ),
    "other output": (
        lambda f: _change_tensors(f, lambda t: t.update({TABLE: np.ones((61, 40), np.float32)})),
        "a masked-LM decoder that is not the word table",
    ),
    "other shape": (lambda f: _change_decoder(f, intermediate_size=73), "expected shape"),
    "code": (lambda f: change_config(f, auto_map={"AutoModel": "x.Y"}), "never run or opened"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_folders_are_refused(folder, case):
    spoil, message = WRONG[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_encoder_decoder(folder)


def test_commands_for_encoders_say_what_reads_an_encoder_decoder(folder):
    with pytest.raises(ValueError, match="got an encoder-decoder; use it with tinybert translate"):
        read_model(folder)
