"""Model cards: the hub's own reader takes their metadata, and names in them stay names."""

import json

import huggingface_hub
import pytest
from report_page import make_model, make_results

from tinybert_jax.report.card import Origin, card_metadata, model_card

CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "num_hidden_layers": 3,
    "hidden_size": 192,
    "max_position_embeddings": 512,
}
ORIGIN = Origin(
    stage="prediction",
    member="",
    data="news",
    teacher="owner/bert",
    teacher_card={"license": "apache-2.0", "language": "en"},
    is_hub_teacher=True,
    is_embedder=False,
)


def _results(**more):
    models = [
        make_model("teacher", 0.93, 1, stage="finetune", intervals={"accuracy": [0.91, 0.95]}),
        {**make_model("student", 0.91, 7, stage="prediction"), "name": "small"},
        {**make_model("baseline", 0.85, 7, stage="baseline"), "name": "small"},
    ]
    for model in models:
        model["latency_ms"]["device"] = "cpu"
    return make_results(models=models, dev_examples=872, seconds={"finetune": 9.0}, **more)


def _read(card, tmp_path):
    """The card as the hub's client reads it; its metadata have a schema there."""
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    read = huggingface_hub.ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    return read.data, read.text


def test_the_hub_reads_scores_license_and_base_model(tmp_path):
    data, text = _read(model_card(_results(), CONFIG, ORIGIN), tmp_path)
    assert (data.license, data.language, data.base_model) == ("apache-2.0", "en", "owner/bert")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    accuracy, f1 = data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.91)
    assert (accuracy.dataset_name, f1.metric_value) == ("news", 0.9)
    assert "| its teacher | 0.9300 [0.9100, 0.9500] | 0.9200 | 10.6" in text
    assert "| the same model without a teacher | 0.8500 | 0.8400 |" in text
    assert "distilled from owner/bert with the text of news" in text and "distillation" in data.tags
    origin = ORIGIN._replace(teacher="", is_hub_teacher=False)
    assert "a teacher that was trained in the same run" in model_card(_results(), CONFIG, origin)


def test_the_card_says_how_to_use_the_model_and_what_it_was_made_of(tmp_path):
    results = _results(max_length={"finetune": 64, "prediction": 96})
    data, text = _read(model_card(results, CONFIG, ORIGIN), tmp_path)
    for expected in (
        "Exported after the stage `prediction`.",
        "# FOLDER: this folder, or its name on the hub as owner/name\nfrom transformers",
        "# FOLDER: this folder, or its name on the hub as owner/name\ntinybert predict FOLDER",
        'model("A text.", truncation=True, max_length=512)',
        "trained on texts of at most 96 tokens. Both calls above read up to 512 tokens of a text "
        "and cut the rest.",
        "## Licence\n\nAs that of the teacher, apache-2.0; check that it fits your data.",
        "22.7 M parameters, 1.52 M without embeddings",
        "| model | accuracy | F1 | encoder parameters, without embeddings | on disk | latency |",
        "1.52 M | 90.9 MB |",
    ):
        assert expected in text.replace("\u00a0", " "), expected
    card = model_card(_results(), CONFIG, ORIGIN._replace(teacher_card={}))
    assert "truncation=True, max_length=512" in card and "None is named: add `license`" in card


def test_the_card_of_an_update_speaks_of_the_earlier_model():
    card = model_card(_results(), CONFIG, ORIGIN._replace(stage="update"))
    assert "Errors and biases of the earlier model and of the training data carry over." in card
    assert "As that of the earlier model, apache-2.0" in card
    assert "of the teacher" not in card
    alone = model_card(_results(), CONFIG, ORIGIN._replace(stage="baseline"))
    assert "Errors and biases of the training data carry over." in alone


@pytest.mark.parametrize(
    "data, told",
    [
        (
            {"train": "news.csv", "dev_share": 0.1},
            "These are about 10 % of the rows of news.csv, set apart by a hash of their text; no "
            "stage of this run trains on them. ",
        ),
        (
            {"train": "new.csv", "old": "old.csv", "dev_share": 0.25},
            "These are about 25 % of the rows of new.csv and old.csv, set apart by a hash of their "
            "text; no stage of this run trains on them, but the earlier model may have been "
            "trained on some. ",
        ),
        ({"train": "a.tsv", "dev": "dev.tsv"}, "These are rows of their own, of dev.tsv."),
        (
            {"train": "owner/set", "dev": "owner/set", "dev_split": "test"},
            "of owner/set, split test.",
        ),
        ({"builtin": True}, "They are of the built-in text."),
    ],
)
def test_the_card_says_where_the_dev_rows_are_from(data, told):
    card = model_card(_results(data=data), CONFIG, ORIGIN)
    assert told in card
    assert ("with the text of news.csv" in card) == (data.get("train") == "news.csv")


@pytest.mark.parametrize(
    "architecture, is_embedder, task, call",
    [
        ("BertForTokenClassification", False, "token-classification", "tinybert predict FOLDER"),
        ("DistilBertForQuestionAnswering", False, "question-answering", "tinybert ask FOLDER"),
        ("BertForMaskedLM", False, "fill-mask", "TinyBertForMaskedLM"),
        ("BertForPreTraining", False, "fill-mask", "TinyBertForMaskedLM"),
        ("DistilBertModel", False, "feature-extraction", "TinyBertModel"),
        ("BertModel", True, "sentence-similarity", "SentenceTransformer"),
    ],
)
def test_every_kind_of_model(architecture, is_embedder, task, call, tmp_path):
    family = {"model_type": "distilbert", "n_layers": 3, "dim": 192}
    config = {**CONFIG, **(family if "Distil" in architecture else {})}
    config["architectures"] = [architecture]
    data, text = _read(
        model_card(_results(), config, ORIGIN._replace(is_embedder=is_embedder)), tmp_path
    )
    assert data.pipeline_tag == task
    assert call in text and "3 layers, 192 wide" in text


@pytest.mark.parametrize(
    "architecture, call, told",
    [
        (
            "BertForQuestionAnswering",
            'truncation="only_second", max_length=512',
            "trained in windows of 96 tokens. The first call above cuts question and text at 512 "
            "tokens, the second reads a longer text in windows of 512.",
        ),
        (
            "BertForTokenClassification",
            'model("A text.")',
            "trained on texts of at most 96 tokens. Texts of more than 512 tokens do not fit: "
            "split them.",
        ),
    ],
)
def test_the_card_says_what_happens_to_long_texts(architecture, call, told):
    results = _results(max_length={"prediction": 96})
    card = model_card(results, {**CONFIG, "architectures": [architecture]}, ORIGIN)
    assert call in card and told in card


def test_a_translation_is_cut_at_the_positions_of_the_encoder():
    sides = {
        side: {"num_hidden_layers": 2, "hidden_size": 64, "max_position_embeddings": length}
        for side, length in (("encoder", 256), ("decoder", 128))
    }
    names = {"architectures": ["EncoderDecoderModel"], "model_type": "encoder-decoder"}
    card = model_card(_results(), {**names, **sides}, ORIGIN)
    assert "truncation=True, max_length=256, return_tensors" in card
    assert "Both calls above read up to 256 tokens of a text and cut the rest." in card


def test_data_without_a_name_are_not_named():
    card = model_card(_results(), CONFIG, ORIGIN._replace(data=""))
    assert "distilled from owner/bert, by" in card and "with the text of" not in card


def test_a_pretrained_model_has_the_scores_of_heldout_text(tmp_path):
    results = make_results(models=[], heldout={"perplexity": 12.5}, seconds={"pretrain": 5.0})
    config = {**CONFIG, "architectures": ["BertForMaskedLM"]}
    origin = ORIGIN._replace(stage="pretrain", teacher="", data="", is_hub_teacher=False)
    data, text = _read(model_card(results, config, origin), tmp_path)
    assert data.eval_results is None and "base_model" not in data.to_dict()
    assert "perplexity 12.5" in text and "from random weights" in text


def test_names_stay_names(tmp_path):
    """Neither Markdown nor YAML reads what stands in the names of runs, labels and data."""
    evil = "a: b\n---\nlicense: mit <script>|`x`[y](z)"
    results = _results(label_names=["<b>", "c|d"]) | {"name": evil}
    origin = ORIGIN._replace(data=evil, teacher=evil, is_hub_teacher=False, teacher_card={})
    data, text = _read(model_card(results, CONFIG, origin), tmp_path)
    assert "license" not in data.to_dict()
    assert data.model_name == evil and data.eval_results[0].dataset_name == evil
    for mark in ("<script>", "<b>", "c|d", "`x`", "[y]"):
        assert mark not in text
    assert json.dumps(evil) not in text


@pytest.mark.parametrize(
    "text, found",
    [
        (
            "---\nlicense: mit\nlanguage: en\n---\nlicense: other",
            {"license": "mit", "language": "en"},
        ),
        (
            "---\nlanguage:\n- de\nlicense: 'cc-by-4.0'\n---",
            {"license": "cc-by-4.0", "language": "de"},
        ),
        ("---\nlicense: [a, b]\n---", {}),
        ("license: mit", {}),
        ("", {}),
    ],
)
def test_what_a_teacher_s_card_names(text, found):
    assert card_metadata(text) == found
