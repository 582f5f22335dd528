"""`tinybert_jax.pipeline` beside transformers' own, on random models."""

import numpy as np
import pytest

import tinybert_jax
from tinybert_jax.data.wordpiece import train_wordpiece
from tinybert_jax.inference.predict import embed, predict

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = ["a fine film with a sea", "tea", "toast and jam and tea"]


def _save(folder, head, **config):
    """A random model for `head` with a tokenizer, as transformers writes it."""
    tokenizer = train_wordpiece(TEXTS, vocab_size=60)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 1, "max_position_embeddings": 32, "vocab_size": len(tokenizer)}
    config = transformers.BertConfig(**sizes, initializer_range=0.5, **config)
    getattr(transformers, f"Bert{head}")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _rounded(found):
    """The same lists and dicts, with scores of four digits."""
    if isinstance(found, list):
        return [_rounded(own) for own in found]
    return {**found, "score": round(found["score"], 4)}


def test_classification_gives_the_labels_and_scores_of_transformers(tmp_path):
    labels = {0: "neg", 1: "pos", 2: "tea"}
    names = {"id2label": labels, "label2id": {own: number for number, own in labels.items()}}
    folder = _save(tmp_path, "ForSequenceClassification", **names)
    ours = tinybert_jax.pipeline("text-classification", folder)
    theirs = transformers.pipeline("text-classification", model=str(folder), device="cpu")
    for options in ({}, {"top_k": None}, {"top_k": 1}, {"top_k": 2}, {"top_k": 9}):
        for texts in (TEXTS[0], TEXTS[:1], TEXTS):
            assert _rounded(ours(texts, **options)) == _rounded(theirs(texts, **options))
    alias = tinybert_jax.pipeline("sentiment-analysis", folder)
    assert alias(TEXTS) == ours(TEXTS)
    pair = ours("tea", "toast")
    assert pair == ours(["tea"], ["toast"]) and pair != ours("tea")
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="top_k: expected 1 or more, or None"):
            ours("tea", top_k=wrong)
    for texts, pairs, told in (
        (["tea", " "], None, "a blank one in place 2"),
        ([], None, "got none"),
        (["tea", "jam"], ["tea"], "expected 2 second texts, got 1"),
        (None, None, "got neither"),
    ):
        with pytest.raises(ValueError, match=told):
            ours(texts, pairs)


def test_texts_that_are_cut_warn_once(tmp_path):
    folder = _save(tmp_path, "ForSequenceClassification", num_labels=3)
    ours = tinybert_jax.pipeline("text-classification", folder)
    ours("tea")
    with pytest.warns(UserWarning, match="1 of 2 texts has more than 32 tokens: the rest is not"):
        ours(["tea", "tea " * 40])
    ours("tea " * 40)


def test_answers_are_parts_of_the_context(tmp_path):
    folder = _save(tmp_path, "ForQuestionAnswering")
    ours = tinybert_jax.pipeline("question-answering", folder)
    found = ours(question=["a film", "tea"], context=TEXTS[2])
    assert len(found) == 2 and set(found[0]) == {"answer", "score", "start", "end"}
    for own in found:
        assert TEXTS[2][own["start"] : own["end"]] == own["answer"]
    assert ours(question="tea", context=TEXTS[2])["answer"] == found[1]["answer"]
    with pytest.raises(ValueError, match="expected question=… and context=…"):
        ours("tea")


def test_entities_have_the_keys_of_transformers(tmp_path):
    names = {"id2label": {0: "O", 1: "B-FOOD"}, "label2id": {"O": 0, "B-FOOD": 1}}
    folder = _save(tmp_path, "ForTokenClassification", **names)
    found = tinybert_jax.pipeline("token-classification", folder)(TEXTS)
    predicted = [row["entities"] for row in predict(str(folder), TEXTS)]
    assert any(predicted) and list(map(len, found)) == list(map(len, predicted))
    for text, entities in zip(TEXTS, found, strict=True):
        for own in entities:
            assert set(own) == {"entity_group", "score", "word", "start", "end"}
            assert text[own["start"] : own["end"]] == own["word"]


def test_vectors_and_models_of_another_task(tmp_path):
    folder = _save(tmp_path / "plain", "ForSequenceClassification", num_labels=1)
    numbers = tinybert_jax.pipeline("text-classification", folder)
    assert set(numbers("tea")) == {"score"}
    with pytest.raises(ValueError, match="top_k: expected a model that .* got one of regression"):
        numbers("tea", top_k=1)
    with pytest.raises(ValueError, match="use pipeline.'text-classification'"):
        tinybert_jax.pipeline("token-classification", folder)
    with pytest.raises(ValueError, match="expected one of"):
        tinybert_jax.pipeline("sentiments", folder)
    folder = _save(tmp_path / "vectors", "Model")
    (folder / "modules.json").write_text(
        '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},'
        '{"idx": 1, "name": "1", "path": "1_Pooling", '
        '"type": "sentence_transformers.models.Pooling"}]'
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 16, "pooling_mode_mean_tokens": true}'
    )
    ours = tinybert_jax.pipeline("feature-extraction", folder)
    np.testing.assert_array_equal(ours(TEXTS), embed(str(folder), TEXTS))
    assert ours("tea").shape == (16,)
