"""The code on a model card runs in transformers, for the models of every task and family."""

import json
import math

import jax
import pytest
from report_page import make_model, make_results
from tiny_inputs import TEXTS, train_wordpiece

from tinybert_jax.huggingface.folder import save_model
from tinybert_jax.huggingface.head import Head
from tinybert_jax.models.heads import (
    make_classifier,
    make_encoder,
    make_masked_lm,
    make_span_scorer,
    make_token_classifier,
)
from tinybert_jax.report.card import Origin, model_card
from tinybert_jax.settings.sizes import ModelConfig

pytest.importorskip("torch")

ORIGIN = Origin("prediction", "", "news", "", {}, False, False)
NAMES = ("neg", "pos")
SEQUENCE = "SequenceClassification"
ONE, SEVERAL = "single_label_classification", "multi_label_classification"


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize(
    ("make", "head", "check"),
    [
        (
            lambda c: make_classifier(c, 2),
            Head(SEQUENCE, ONE, NAMES),
            lambda f: f[0]["label"] in NAMES,
        ),
        (
            lambda c: make_classifier(c, 2),
            Head(SEQUENCE, SEVERAL, NAMES),
            lambda f: f[0]["label"] in NAMES,
        ),
        (
            lambda c: make_classifier(c, 1),
            Head(SEQUENCE, "regression", ("LABEL_0",)),
            lambda f: math.isfinite(f[0]["score"]),
        ),
        (
            lambda c: make_token_classifier(c, 2),
            Head("TokenClassification", None, NAMES),
            lambda f: {word["entity"] for word in f} <= {*NAMES} and len(f) > 0,
        ),
        (
            lambda c: make_span_scorer(c),
            Head("QuestionAnswering", None, ("start", "end")),
            lambda f: isinstance(f, str),
        ),
        (lambda c: make_masked_lm(c), None, lambda f: len(f[0]["token_str"]) > 0),
        (lambda c: make_encoder(c), None, lambda f: len(f[0][0]) == 16),
    ],
    ids=["one label", "several", "a number", "tags", "answers", "masked words", "states"],
)
def test_the_code_on_the_card_runs(make, head, check, family, tmp_path):
    tokenizer = train_wordpiece(TEXTS, vocab_size=60)
    other = {"model_type": family, "type_vocab_size": 0, "classifier_dropout": 0.2}
    sizes = ModelConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        max_position_embeddings=32,
        **(other if family == "distilbert" else {}),
    )
    params = make(sizes)[1](jax.random.key(0))
    folder = save_model(tmp_path / "hf", params, sizes, tokenizer, head=head)
    models = [{**make_model("student", 0.9, 1, stage="prediction"), "intervals": {}}]
    models[0]["latency_ms"]["device"] = "cpu"
    config = json.loads((folder / "config.json").read_text())
    card = model_card(make_results(models=models), config, ORIGIN)
    code = card.partition("```python\n")[2].partition("```")[0].strip()
    *lines, last = code.replace('"FOLDER"', repr(str(folder))).splitlines()
    if not last.startswith("answer = "):
        last = f"answer = {last}"
    names: dict = {}
    exec("\n".join([*lines, last]), names)
    assert check(names["answer"])
