"""Tagging: reading, labels on first pieces, the loss against PyTorch, offsets, and a whole run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_inputs import STUDENT, TEACHER, TEXTS, write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.batches.batch import Plan, make_batch
from tinybert_jax.config.tasks import TaggingTask
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import Reading, read_task
from tinybert_jax.data.wordpiece import train_wordpiece
from tinybert_jax.inference.scorer import make_scorer
from tinybert_jax.models.heads import make_token_classifier
from tinybert_jax.objectives.supervised import make_supervised
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.tasks import tagging
from tinybert_jax.tasks.tagging import TAGGING
from tinybert_jax.tasks.task import Scored

READ = TAGGING.read
WORDS = [["Ada", "Lovelace", "met", "Bob"], ["Rome"], ["In", "Rome", "Rome", "."]]
# Two entities of one kind stand side by side, where the schemes differ.
SCHEMES = {
    "iob1": [["I-PER", "I-PER", "O", "I-PER"], ["I-LOC"], ["O", "I-LOC", "B-LOC", "O"]],
    "iob2": [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC"], ["O", "B-LOC", "B-LOC", "O"]],
    "bioes": [["B-PER", "E-PER", "O", "S-PER"], ["S-LOC"], ["O", "S-LOC", "S-LOC", "O"]],
}
NAMES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
GOLD = [[3, 4, 0, 3], [1], [0, 1, 1, 0]]


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str) -> str:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return str(tmp_path / name)

    return write


def _conll(tags, words=WORDS):
    return "\n".join(
        "".join(f"{word}\t{tag}\n" for word, tag in zip(*pair, strict=True))
        for pair in zip(words, tags, strict=True)
    )


def _read(path, *, is_labelled=True, **settings):
    section = TaggingTask(train=path, dev=path, **settings)
    return READ(path, section, Reading(is_labelled=is_labelled))


def _labels(examples):
    return [labels.tolist() for labels in examples.labels]


def _fails(read, *parts):
    with pytest.raises(ValueError) as caught:
        read()
    for part in (": expected ", "; got ", "; fix: ", *parts):
        assert part in str(caught.value)


# Reading


@pytest.mark.parametrize("named", [False, True], ids=["auto", "named"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_schemes_give_the_same_classes(write, scheme, named):
    settings = {"scheme": scheme} if named else {}
    rows = [{"tokens": w, "tags": t} for w, t in zip(WORDS, SCHEMES[scheme], strict=True)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for path in (write("a.conll", _conll(SCHEMES[scheme])), write("a.jsonl", lines)):
        examples = _read(path, **settings)
        assert examples.text == WORDS and examples.label_names == NAMES
        assert _labels(examples) == GOLD
    named = _read(path, labels=["PER", "LOC", "ORG"], **settings)
    assert named.label_names == ("O", *(f"{p}-{k}" for k in ("PER", "LOC", "ORG") for p in "BI"))


def test_plain_tags_are_the_classes(write):
    tags = [["NN", "NN", "VB", "NN"], ["NN"], ["IN", "NN", "NN", "."]]
    path = write("a.conll", _conll(tags))
    examples = _read(path, scheme="plain")
    assert examples.label_names == (".", "IN", "NN", "VB")
    assert _labels(examples)[0] == [2, 2, 3, 2]
    assert _read(path, scheme="plain", labels=["VB", "NN", "IN", "."]).label_names[0] == "VB"
    _fails(lambda: _read(path), "scheme plain", "line 1: 'NN'")


def test_one_entity_that_starts_with_i_is_a_mistake_in_iob2(write):
    tags = [*SCHEMES["iob2"][:2], ["O", "B-LOC", "O", "I-PER"]]
    _fails(lambda: _read(write("a.conll", _conll(tags))), "iob2 tags", "line 11: 'I-PER'")


def test_dev_has_no_kinds_that_train_lacks(write):
    train, dev = write("train.conll", _conll(SCHEMES["iob2"])), write("dev.conll", "It\tB-MISC\n")
    read = lambda **settings: read_task(TaggingTask(train=train, dev=dev, **settings), READ)  # noqa: E731
    _fails(read, "dev.conll", "one of the tags", "line 1: 'B-MISC'", "complete the list of tags")
    _fails(lambda: read(scheme="plain"), "dev.conll", "line 1: 'B-MISC'")
    write("dev.conll", _conll([["S-LOC"]], [["It"]]))
    assert _labels(read().dev) == [[1]] and read().dev.label_names == NAMES


def test_files_that_are_wrong(write):
    ragged = write("a.conll", "Ada\tNN\tB-PER\nmet\tO\nBob\tNN\tB-PER\n")
    _fails(lambda: _read(ragged), "3 columns in every row", "line 2: 2")
    empty = write("a.jsonl", '{"tokens": [], "tags": []}\n')
    _fails(lambda: _read(empty), "at least one token", "line 1", "remove these sentences")
    path = write("b.conll", _conll(SCHEMES["iob2"]))
    with pytest.raises(ValueError, match="expected no split for a file of tags, got 'dev'"):
        READ(path, TaggingTask(train=path, dev=path), Reading("dev"))


@pytest.mark.parametrize(
    "names", [("O", "I-PER", "I-LOC"), ("LABEL_0", "LABEL_1"), ("NN", "VB")], ids=lambda n: n[-1]
)
def test_classes_that_are_not_iob2_are_refused(write, names):
    path = write("a.conll", _conll(SCHEMES["iob2"]))
    with pytest.raises(ValueError, match="a.conll: expected a model whose classes are O, and B-.*"):
        READ(path, TaggingTask(train=path, dev=path), Reading(label_names=names, is_dev=True))


def test_a_share_of_train_becomes_dev_with_its_labels(write):
    words = [[*own, str(place)] for place, own in enumerate(WORDS * 8)]
    path = write("a.conll", _conll([[*own, "O"] for own in SCHEMES["bioes"] * 8], words))
    data = read_task(TaggingTask(train=path, dev_share=0.25), READ)
    assert (len(data.train.text), len(data.dev.text)) == (18, 6)
    for side in (data.train, data.dev):
        for own, labels in zip(side.text, _labels(side), strict=True):
            assert labels == [*GOLD[int(own[-1]) % 3], 0]


def test_unlabelled_text_needs_no_tags(write):
    path = write("a.conll", "Ada\nmet\n\nBob\n")
    expected = Examples([["Ada", "met"], ["Bob"]], None, None, None)
    assert _read(path, is_labelled=False) == expected


# Pieces


def _tokenizer():
    return train_wordpiece([*TEXTS, "Ada Lovelace met Bob in Rome ."], vocab_size=60)


SENTENCES = [["toastfilm", "tea", "seafilm"], ["film", "\ufe0f", "tea"], ["jam"]]
LABELS = [np.array(own, np.int32) for own in ([1, 0, 2], [2, 1, 0], [1])]
EXAMPLES = Examples(SENTENCES, None, LABELS, ("O", "B-X", "I-X"))


def _encoded(max_length=16, examples=EXAMPLES):
    tokenizer = _tokenizer()
    rows = TAGGING.encode(tokenizer, examples, max_length)
    assert rows.is_unit is not None and rows.labels is not None
    return tokenizer, rows


def _per_row(rows, values):
    return [values[a:b] for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]


def test_the_first_piece_of_each_word_is_a_unit_and_has_the_label():
    tokenizer, rows = _encoded()
    for words, gold, ids, is_unit, labels in zip(
        SENTENCES,
        LABELS,
        *(_per_row(rows, values) for values in (rows.ids, rows.is_unit, rows.labels)),
        strict=True,
    ):
        pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
        firsts = [tokenizer.tokenize(word)[:1] or ["[UNK]"] for word in words]
        assert [pieces[place] for place in np.flatnonzero(is_unit)] == [own[0] for own in firsts]
        assert labels[is_unit].tolist() == gold.tolist()
        assert (labels[~is_unit] == -1).all()
        assert pieces[0] == "[CLS]" and pieces[-1] == "[SEP]" and "##film" not in firsts
    assert sum(map(len, SENTENCES)) == rows.is_unit.sum() < len(rows.ids) - 2 * len(SENTENCES)


def test_words_that_are_cut_off_are_no_units():
    _, rows = _encoded(max_length=5)
    long, full = rows.part(0, 1), _encoded()[1].part(0, 1)
    assert len(long.ids) == 5 < len(full.ids) and rows.num_truncated == 1
    num_units = int(long.is_unit.sum())
    assert 1 <= num_units < 3
    assert long.labels[long.is_unit].tolist() == [1, 0, 2][:num_units]
    unlabelled = TAGGING.encode(_tokenizer(), EXAMPLES._replace(labels=None), 5)
    assert unlabelled.labels is None
    np.testing.assert_array_equal(unlabelled.is_unit, rows.is_unit)


def test_a_sentence_longer_than_the_positions_is_refused():
    tokenizer = _tokenizer()
    TAGGING.check_lengths(tokenizer, EXAMPLES, 16)
    with pytest.raises(ValueError, match="at most 5 pieces.*sentence 1: .*; split these sentences"):
        TAGGING.check_lengths(tokenizer, EXAMPLES, 5)


# The model


@pytest.fixture(scope="module")
def model():
    tokenizer = _tokenizer()
    sizes = ModelConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=32, **TEACHER
    )
    apply, init = make_token_classifier(sizes, 3)
    params = jax.jit(init)(jax.random.key(0))
    params["classifier"] = jax.tree.map(lambda leaf: 50 * leaf, params["classifier"])
    return apply, params


def test_packed_bucketed_and_padded_rows_have_the_same_logits(model):
    """Within 1e-5: the sums are the same but for their order."""
    apply, params = model
    tokenizer, rows = _encoded(16, Examples(SENTENCES * 3, None, LABELS * 3, EXAMPLES.label_names))
    options = {"pad_token_id": tokenizer.pad_token_id}
    padded = make_scorer(apply, buckets=(16,), **options)(params, rows, global_batch_size=2)
    assert padded.shape == (len(rows.ids), 3) and np.abs(padded).max() > 0.01
    for changes in ({"buckets": (8, 16)}, {"buckets": (32,), "packed": True}):
        logits = make_scorer(apply, **changes, **options)(params, rows, global_batch_size=2)
        np.testing.assert_allclose(logits, padded, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_loss_is_that_of_torch_on_first_pieces(model, packed):
    torch = pytest.importorskip("torch")
    apply, params = model
    tokenizer, rows = _encoded()
    order = np.array([[1, 2], [0, -1]]) if packed else np.array([1, 2, 0, -1])
    batch = make_batch(rows, Plan(order, 16), tokenizer.pad_token_id)
    objective = make_supervised(apply, form=TAGGING.form)

    @jax.jit
    def loss_of(params, batch):
        batch, counts = objective.prepare(batch, jax.random.key(1), jnp.float32(0))
        return objective.loss(params, batch, counts, None, ())[0]

    loss = loss_of(params, batch)
    score = make_scorer(apply, buckets=(16,), pad_token_id=tokenizer.pad_token_id)
    gold = torch.tensor(np.where(rows.is_unit, rows.labels, -100).astype(np.int64))
    expected = torch.nn.CrossEntropyLoss(ignore_index=-100)(torch.tensor(score(params, rows)), gold)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


# Answers


def _scored(texts, tags):
    """A model that is sure of these tags; without a tag for words that were cut off."""
    examples = Examples(texts, None, None, NAMES)
    rows = TAGGING.encode(_tokenizer(), examples, 64)
    assert rows.is_unit is not None
    is_unit, logits = np.zeros_like(rows.is_unit), np.zeros((len(rows.ids), len(NAMES)), np.float32)
    for start, firsts, own in zip(rows.offsets, _per_row(rows, rows.is_unit), tags, strict=False):
        kept = start + np.flatnonzero(firsts)[: len(own)]
        is_unit[kept] = True
        logits[kept, [NAMES.index(tag) for tag in own]] = 3.0
    return Scored(logits, rows._replace(is_unit=is_unit), examples)


SPLIT = {
    "accent": "Jose\u0301 Garc\u00eda, 5\u20ac a_b",
    "vowel signs": "\u0939\u093f\u0928\u094d\u0926\u0940 \u0939\u0948",
    "selector": "a\ufe0f ok",
    "Chinese": "\u6771\u4eacis\U00020000x",
    "signs": "don't $5 a+b \u00bd-a",
}


@pytest.mark.parametrize("text", SPLIT.values(), ids=SPLIT)
def test_a_text_is_split_where_bert_splits_it(text):
    """That is, by the tokenizers package; no accent or vowel sign becomes a word."""
    from tokenizers import normalizers, pre_tokenizers

    spaced = normalizers.BertNormalizer(lowercase=False, strip_accents=False).normalize_str(text)
    words = [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(spaced)]
    ((found, spans),) = tagging._split_all(Examples([text], None, None, None))
    assert found == words == [text[start:end] for start, end in spans]


def test_entities_have_offsets_into_the_text():
    raw = "  Ada Lovelace,met\tBob in Rome."
    words = ["Ada", "Lovelace", "met", "Bob"]
    tags = ["B-PER", "I-PER", "O", "O", "B-PER", "O", "B-LOC", "O"]
    scored = _scored([raw, words], [tags, ["B-PER", "I-PER", "O", "B-PER"]])
    found = [own["entities"] for own in TAGGING.answers(scored, {})]
    for text, entities in zip((raw, " ".join(words)), found, strict=True):
        assert all(text[own["start"] : own["end"]] == own["text"] for own in entities)
    assert [(e["label"], e["text"]) for e in found[0]] == [
        ("PER", "Ada Lovelace"),
        ("PER", "Bob"),
        ("LOC", "Rome"),
    ]
    assert [(e["text"], e["start"], e["end"]) for e in found[1]] == [
        ("Ada Lovelace", 0, 12),
        ("Bob", 17, 20),
    ]
    sure = np.exp(3) / (np.exp(3) + len(NAMES) - 1)
    assert found[0][0]["probability"] == pytest.approx(sure)


def test_words_that_were_cut_off_are_outside_of_entities():
    scored = _scored([WORDS[0]], [["B-PER", "I-PER", "O"]])
    (answer,) = TAGGING.answers(scored, {})
    assert [entity["text"] for entity in answer["entities"]] == ["Ada Lovelace"]
    gold = scored._replace(examples=scored.examples._replace(labels=[np.array(GOLD[0], np.int32)]))
    scores = TAGGING.measure(gold, {})
    assert (scores["precision"], scores["recall"]) == (1, 0.5)
    assert TAGGING.details(gold, {})["per_class"][0]["support"] == 2


# A run

STAGE = {
    "num_steps": 4,
    "global_batch_size": 8,
    "max_length": 16,
    "learning_rate": 2e-2,
    "log_every": 60,
    "save_every": 4,
}
JUDGED = {**STAGE, "eval_every": 4}
RUN_NAMES = ("O", "B-FOOD", "I-FOOD")


@pytest.fixture(scope="module")
def run(tmp_path_factory, cheap_programs):
    """The folder of a run with a teacher from two seeds and students of two sizes."""
    folder = tmp_path_factory.mktemp("run")
    write_inputs(folder, **TEACHER)
    sentences = [text.split() for text in TEXTS]
    food = {"tea": "B-FOOD", "toast": "B-FOOD", "jam": "B-FOOD"}
    tags = [[food.get(word, "O") for word in words] for words in sentences]
    (folder / "rows.conll").write_text(_conll(tags, sentences))
    rows = str(folder / "rows.conll")
    config = write_config(
        folder / "config.yaml",
        folder,
        folder / "out",
        task={"kind": "tagging", "train": rows, "dev": rows},
        students={"one": {**STUDENT, "hidden_size": 16}, "small": STUDENT},
        finetune={**JUDGED, "num_steps": 60, "eval_every": 60, "num_seeds": 2, "batching": "pack"},
        intermediate={**STAGE, "batching": "bucket"},
        prediction={**JUDGED, "batching": "pad"},
        baseline={**JUDGED, "batching": "pack"},
        distillation={"keep_logits": True},
    )
    assert cli.main(["run", config]) == 0
    return folder


def test_a_run_tells_the_scores_of_each_kind(run):
    results = json.loads((run / "out" / "results.json").read_text())
    assert results["metric"] == "f1" and results["label_names"] == list(RUN_NAMES)
    roles = [model["role"] for model in results["models"]]
    assert roles == ["teacher", "student", "student", "baseline", "baseline"]
    teacher = results["models"][0]
    assert teacher["metrics"]["f1"] > 0.9 and len(teacher["by_seed"]) == 2
    for model in results["models"]:
        assert [(row["name"], row["support"]) for row in model["per_class"]] == [("FOOD", 30)]
    assert list((run / "out" / "teacher_logits").rglob("*.safetensors"))
    assert "Scores per entity kind" in (run / "out" / "report.html").read_text()


def test_commands_answer_with_entities(run, capsys):
    model = run / "out" / "models" / "finetune"
    results = json.loads((run / "out" / "results.json").read_text())
    capsys.readouterr()
    assert cli.main(["evaluate", str(model), str(run / "rows.conll")]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores.pop("num_examples") == len(TEXTS)
    assert scores == pytest.approx(results["models"][0]["metrics"])
    assert cli.main(["predict", str(model), str(run / "rows.conll")]) == 0
    of_words = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    arguments = [part for text in TEXTS[:4] for part in ("-t", text)]
    assert cli.main(["predict", str(model), *arguments]) == 0
    of_texts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in of_words] == TEXTS
    for one, other in zip(of_words, of_texts, strict=False):
        for row in (one, other):
            for entity in row["entities"]:
                entity["probability"] = round(entity["probability"], 4)
        assert one == other
    assert [entity["text"] for entity in of_texts[2]["entities"]] == ["tea", "toast"]
    rows = [{"tokens": TEXTS[0].split()}, {"tokens": []}]
    (run / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["predict", str(model), str(run / "new.jsonl")]) == 0
    first, empty = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == TEXTS[0] and "entities" in first
    assert empty == {"row": 2, "text": "", "problem": "no text"}
    pair = ["predict", str(model), str(run / "new.jsonl"), "--text-pair", "second"]
    assert cli.main(pair) != 0
    said = capsys.readouterr().err
    assert "a tagging model can have" in said and "got ['text_pair']" in said


def test_transformers_reads_the_same_model(run):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    from tinybert_jax.huggingface.folder import read_model, start_params

    for name in ("one", "small"):
        folder = str(run / "out" / "hf" / name)
        model = AutoModelForTokenClassification.from_pretrained(folder).eval()
        assert model.config.id2label == dict(enumerate(RUN_NAMES))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer(TEXTS[:4], padding=True, return_tensors="pt")
        with torch.no_grad():
            theirs = model(**inputs).logits.numpy()
        apply, init = make_token_classifier(read_model(folder).config, len(RUN_NAMES))
        examples = Examples([text.split() for text in TEXTS[:4]], None, None, RUN_NAMES)
        rows = TAGGING.encode(tokenizer, examples, 16)
        score = make_scorer(apply, buckets=(16,), pad_token_id=tokenizer.pad_token_id)
        ours = score(start_params(folder, init, whole=True), rows)
        is_real = inputs["attention_mask"].numpy().astype(bool)
        np.testing.assert_allclose(ours, theirs[is_real], atol=1e-4)
