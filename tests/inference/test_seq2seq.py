"""`TinyBertForConditionalGeneration` and `tinybert translate` against `EncoderDecoderModel`."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from reference import change_config, random_bert, random_encoder_decoder, write_bert
from transformers import BertForMaskedLM, BertTokenizer, EncoderDecoderModel

from tinybert_jax import TinyBertForConditionalGeneration, cli

NEW = 8
LINES = ["a quick dog!", "", "no", "why not?  yes", "is it € ?", "abcdef " * 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, torch waits for its threads on a busy machine
    one_layer = {"num_hidden_layers": 1}
    model = random_encoder_decoder(vocab_size=61, encoder=one_layer, **one_layer)
    yield write_bert(tmp_path_factory.mktemp("hf") / "model", model)
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def model(folder):
    return TinyBertForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return BertTokenizer.from_pretrained(str(folder))


def _expected(folder, tokenizer, lines, **options):
    theirs = EncoderDecoderModel.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = tokenizer(lines, padding=True, truncation=True, max_length=24, return_tensors="pt")
    del inputs["token_type_ids"]
    ids = theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)
    return inputs, ids, tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_outputs_and_tokens_equal_those_of_transformers(folder, model, tokenizer, tmp_path):
    inputs, ids, _ = _expected(folder, tokenizer, LINES[:3:2])
    found = model.generate(**inputs, max_new_tokens=NEW)
    np.testing.assert_array_equal(found, ids.numpy()[:, : found.shape[1]])
    assert (ids.numpy()[:, found.shape[1] :] == 0).all()
    theirs = EncoderDecoderModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(**inputs, decoder_input_ids=ids[:, :4]).logits
    outputs = model(**inputs, decoder_input_ids=ids[:, :4])
    np.testing.assert_allclose(outputs.logits, expected.numpy(), atol=2e-5)
    again = TinyBertForConditionalGeneration.from_pretrained(model.save_pretrained(tmp_path / "a"))
    assert again.config == model.config


def test_translate_keeps_the_order_of_lines(folder, tokenizer, tmp_path, capsys):
    source, output = tmp_path / "lines.en", tmp_path / "lines.de"
    source.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    options = ["--num-beams", "2", "--max-new-tokens", str(NEW), "--max-length", "24"]
    references = tmp_path / "right.de"
    references.write_text("a b\n\n\nc d\ne\nf\n")
    command = ["translate", str(folder), str(source), "-o", str(output), *options]
    assert cli.main([*command, "--reference", str(references)]) == 0
    got = output.read_text(encoding="utf-8").split("\n")
    filled = [line for line in LINES if line]
    _, _, expected = _expected(folder, tokenizer, filled, num_beams=2)
    expected = [" ".join(text.split()) for text in expected]
    expected.insert(1, "")
    assert len(set(expected)) > 3 and got == [*expected, ""]
    shown = capsys.readouterr()
    assert shown.out == ""
    counts = "1 blank, and stay so, 1 cut at the model's length, 1 with characters that the"
    assert f"of 6 lines: {counts}" in shown.err
    assert "not scored, without a reference: 2\nBLEU " in shown.err
    assert "\nchrF2 " in shown.err and "tok:13a" in shown.err
    assert cli.main(["translate", str(folder), "-t", LINES[0], *options]) == 0
    assert capsys.readouterr().out == expected[0] + "\n"


def test_wrong_use_is_refused(folder, model, tmp_path, capsys):
    (tmp_path / "two").write_text("a\nb\n")
    references = ["-t", "a", "--reference", str(tmp_path / "two")]
    for arguments, message in (
        ([str(folder)], "expected a file or --text, got neither"),
        (
            [str(folder), "-t", "a", "--num-beams", "31"],
            "num_beams: expected a number from 1",
        ),
        ([str(folder), "-t", "a", "--max-new-tokens", "25"], "max_new_tokens: expected a number"),
        ([str(folder), "-t", "a", "--max-length", "3"], "max_length: expected at least 4"),
        ([str(folder), "-t", "a", "-o", str(tmp_path)], "--output: expected a file"),
        ([str(folder), *references], "expected a line for each of the 1 sources, got 2"),
        ([str(folder), *references, "--tokenize", "ja"], "--tokenize: expected one of 13a"),
        ([str(folder), "-t", "\udcff"], "text 1: expected UTF-8"),
    ):
        assert cli.main(["translate", *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="top_p: expected a number above 0"):
        model.generate([[2, 7, 3]], do_sample=True, top_p=0.0)
    with pytest.raises(ValueError, match="do_sample: expected num_beams 1"):
        model.generate([[2, 7, 3]], do_sample=True, num_beams=2)
    with pytest.raises(ValueError, match="decoder_input_ids: expected numbers from 0 to 60"):
        model([[2, 7, 3]], decoder_input_ids=[[99]])


def test_models_start_from_an_encoder_or_from_sizes(tmp_path, model):
    encoder = write_bert(tmp_path / "encoder", random_bert(BertForMaskedLM, num_hidden_layers=2))
    start = TinyBertForConditionalGeneration.from_encoder_decoder_pretrained
    warm = start(encoder, decoder_layers=(2,))
    sizes = warm.config.encoder, warm.config.decoder
    assert [own.num_hidden_layers for own in sizes] == [2, 1]
    assert (warm.config.decoder_start_token_id, warm.config.eos_token_id) == (2, 3)
    cold = TinyBertForConditionalGeneration.from_sizes(*sizes, warm.tokenizers.source)
    assert cold.config == warm.config
    saved = cold.save_pretrained(tmp_path / "cold")
    _, report = EncoderDecoderModel.from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    change_config(encoder, vocab_size=60)
    with pytest.raises(ValueError, match="got the id 60 in 61 pieces"):
        start(encoder)
