"""Multi-label classification: reading, the loss against PyTorch, thresholds, and a whole run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_inputs import STUDENT, TEACHER, TEXTS, write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.batches.batch import Plan, make_batch
from tinybert_jax.config.tasks import MultiLabelTask
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import Reading, read_task
from tinybert_jax.data.wordpiece import train_wordpiece
from tinybert_jax.inference.predict import predict
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.objectives.supervised import make_supervised
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.tasks.multi_label import MULTI_LABEL
from tinybert_jax.tasks.task import Scored

READ = MULTI_LABEL.read
NAMES = ("art", "drink", "sea")
# Of each of the texts of tiny_inputs; the last text has no label.
LABELS = [["art", "sea"], ["art"], ["drink"], []] * 6


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str) -> str:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return str(tmp_path / name)

    return write


def _jsonl(labels=LABELS, texts=TEXTS):
    rows = zip(texts, labels, strict=False)
    return "".join(json.dumps({"text": text, "labels": own}) + "\n" for text, own in rows)


def _read(path, *, is_labelled=True, **settings):
    section = MultiLabelTask(train=path, dev=path, **settings)
    return READ(path, section, Reading(is_labelled=is_labelled))


def _indicators(labels=LABELS):
    return np.array([[name in own for name in NAMES] for own in labels], np.int32)


def _fails(path, *parts, **settings):
    """Reads, and checks that the one error holds all parts and the three words of every error."""
    with pytest.raises(ValueError) as caught:
        _read(path, **settings)
    for part in (": expected ", "; got ", "; fix: ", *parts):
        assert part in str(caught.value)


# Reading


def test_lists_separated_texts_and_columns_give_the_same_labels(write):
    rows = list(zip(TEXTS, LABELS, strict=True))
    tsv = "".join(f"{text}\t{' ; '.join(own)}\n" for text, own in rows)
    csv = "".join(f'"{text}","{",".join(own)}"\n' for text, own in rows)
    columns = "".join(
        "\t".join([text, *(str(int(name in own)) for name in NAMES)]) + "\n" for text, own in rows
    )
    for examples in (
        _read(write("a.jsonl", _jsonl())),
        _read(write("a.tsv", "text\tlabels\n" + tsv), separator=";"),
        _read(write("a.csv", "text,labels\n" + csv)),
        _read(write("b.tsv", "text\tart\tdrink\tsea\n" + columns), label_columns=NAMES),
    ):
        assert examples.text == TEXTS and examples.label_names == NAMES
        np.testing.assert_array_equal(examples.labels, _indicators())


def test_settings_name_labels_and_their_order(write):
    path = write("a.jsonl", _jsonl())
    assert _read(path, labels=["sea", "art", "drink", "war"]).label_names[::3] == ("sea", "war")
    merged = _read(path, labels={"art": "town", "drink": "town", "sea": "sea"})
    assert merged.label_names == ("town", "sea")
    assert merged.labels[:4].tolist() == [[1, 1], [1, 0], [1, 0], [0, 0]]


def test_columns_have_the_order_of_a_models_labels(write):
    path = write("a.tsv", "text\tart\tsea\na film\t1\t0\n")
    section = MultiLabelTask(train=path, dev=path, label_columns=["art", "sea"])
    examples = READ(path, section, Reading(label_names=("sea", "art"), is_dev=True))
    assert examples.label_names == ("sea", "art") and examples.labels.tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="label_columns for the labels 'sea'; got 'art', 'sea'"):
        READ(path, section, Reading(label_names=("sea",), is_dev=True))


def test_labels_that_are_wrong(write):
    def fails(second, *parts, **settings):
        _fails(write("a.jsonl", _jsonl([["art"], second])), "(line 2: ", *parts, **settings)

    fails(3, "a list of labels in column 'labels'", '["sports", "money"]')
    fails(None, "a list of labels")
    fails([["art"]], "a list of labels")
    fails(["art", ""], "without an empty one", "an empty list")
    fails(["art", None], "without an empty one")
    fails(["art", " art"], "each once", "leave the repeated labels out")
    fails(
        ["art", "tea"],
        "'art', 'sea'",
        "'tea'",
        "or complete `labels`",
        labels=["art", "sea"],
    )
    fails("art,,sea", "without an empty one")
    _fails(write("b.jsonl", _jsonl([[], []])), "labels in column 'labels'", "none", "add them")
    table = write("a.tsv", "text\tart\na film\t1\na sea\tyes\n")
    _fails(table, "0 or 1 in label column 'art'", "(line 3: 'yes')", label_columns=["art"])
    with pytest.raises(ValueError, match="label_columns name the labels already"):
        _read(table, label_columns=["art"], labels=["art"])


def test_dev_has_no_labels_that_train_lacks(write):
    train = write("train.jsonl", _jsonl())
    dev = write("dev.jsonl", _jsonl([["art"], ["war", "sea"]]))
    with pytest.raises(ValueError, match="some of the labels .*'sea'.*line 2: 'war'.*fix: "):
        read_task(MultiLabelTask(train=train, dev=dev), READ)
    data = read_task(MultiLabelTask(train=dev, dev=write("a.jsonl", _jsonl([["sea"]]))), READ)
    assert data.dev.label_names == data.train.label_names == ("art", "sea", "war")
    assert data.dev.labels.tolist() == [[0, 1, 0]]


def test_a_share_of_train_becomes_dev_with_its_labels(write):
    texts = [f"{text} {place}" for place, text in enumerate(TEXTS)]
    path = write("a.jsonl", _jsonl(texts=texts))
    data = read_task(MultiLabelTask(train=path, dev_share=0.25), READ)
    assert (len(data.train.text), len(data.dev.text)) == (18, 6)
    for side in (data.train, data.dev):
        places = [texts.index(text) for text in side.text]
        np.testing.assert_array_equal(side.labels, _indicators()[places])


def test_unlabelled_text_needs_no_labels(write):
    path = write("a.jsonl", '{"text": "a film"}\n')
    assert _read(path, is_labelled=False) == Examples(["a film"], None, None, None)
    settings = {"dev_share": 0.25, "max_train_rows": 4, "unlabelled": "rest"}
    data = read_task(MultiLabelTask(train=write("b.jsonl", _jsonl()), **settings), READ)
    assert data.unlabelled is not None and len(data.distilled.text) > len(data.train.text) == 4


# The loss


def test_the_loss_is_that_of_torch():
    """Means over texts and labels; the filler row of the batch counts for nothing."""
    torch = pytest.importorskip("torch")
    tokenizer = train_wordpiece(TEXTS, vocab_size=60)
    sizes = ModelConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=16, **TEACHER
    )
    apply, init = make_classifier(sizes, len(NAMES))
    params = jax.jit(init)(jax.random.key(0))
    params["classifier"] = jax.tree.map(lambda leaf: 50 * leaf + 0.3, params["classifier"])
    examples = Examples(TEXTS, None, _indicators(), NAMES)
    rows = MULTI_LABEL.encode(tokenizer, examples, 16)
    batch = make_batch(rows, Plan(np.array([2, 0, 3, -1]), 16), tokenizer.pad_token_id)
    objective = make_supervised(apply, form=MULTI_LABEL.form)

    @jax.jit
    def loss_and_logits(params, batch):
        batch, counts = objective.prepare(batch, jax.random.key(1), jnp.float32(0))
        loss, _ = objective.loss(params, batch, counts, None, ())
        return loss, apply(params, batch.inputs, batch.attention_mask).logits

    loss, logits = loss_and_logits(params, batch)
    gold = torch.tensor(_indicators()[[2, 0, 3]], dtype=torch.float32)
    expected = torch.nn.BCEWithLogitsLoss()(torch.tensor(np.asarray(logits)[:3]), gold)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


# Answers


def _scored(probabilities, labels=((1, 0), (1, 1), (0, 0))):
    """Three texts with labels art and sea, and a model of these probabilities."""
    examples = Examples(["a", "b", "c"], None, np.array(labels, np.int32), ("art", "sea"))
    probabilities = np.array(probabilities)
    logits = np.log(probabilities / (1 - probabilities)).astype(np.float32)
    return Scored(logits, rows=None, examples=examples)  # type: ignore[arg-type]


def test_the_tuned_threshold_decides_answers_and_scores():
    scored = _scored([[0.4, 0.1], [0.35, 0.3], [0.2, 0.2]])
    settings = MULTI_LABEL.best_settings(scored)
    assert settings == pytest.approx({"threshold": 0.25})
    told = [answer["labels"] for answer in MULTI_LABEL.answers(scored, settings)]
    assert told == [["art"], ["art", "sea"], []]
    assert [answer["labels"] for answer in MULTI_LABEL.answers(scored, {})] == [[], [], []]
    (first, *_) = MULTI_LABEL.answers(scored, settings)
    assert first["probabilities"] == pytest.approx({"art": 0.4, "sea": 0.1})
    assert MULTI_LABEL.measure(scored, settings)["f1_micro"] == 1
    assert MULTI_LABEL.measure(scored, {})["f1_micro"] == 0
    details = MULTI_LABEL.details(scored, settings)
    assert [(row["name"], row["f1"], row["support"]) for row in details["per_class"]] == [
        ("art", 1, 2),
        ("sea", 1, 1),
    ]


def test_a_model_that_learnt_nothing_scores_the_floor():
    """Constant probabilities and a tuned threshold: the commonest labels, as many as score best."""
    scored = _scored([[0.5, 0.4]] * 3, labels=[(1, 1), (1, 1), (1, 0)])
    assert MULTI_LABEL.floor(scored.examples) == pytest.approx(2 * 5 / (5 + 6))
    best = MULTI_LABEL.measure(scored, MULTI_LABEL.best_settings(scored))
    assert MULTI_LABEL.floor(scored.examples) == pytest.approx(best["f1_micro"])


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


@pytest.fixture(scope="module")
def run(tmp_path_factory, cheap_programs):
    """The folder of a run with a teacher from two seeds and students of two sizes."""
    folder = tmp_path_factory.mktemp("run")
    write_inputs(folder, **TEACHER)
    (folder / "rows.jsonl").write_text(_jsonl())
    rows = str(folder / "rows.jsonl")
    config = write_config(
        folder / "config.yaml",
        folder,
        folder / "out",
        task={"kind": "multi_label", "train": rows, "dev": rows},
        students={"one": {**STUDENT, "hidden_size": 16}, "small": STUDENT},
        finetune={**JUDGED, "num_steps": 120, "eval_every": 60, "num_seeds": 2, "batching": "pack"},
        prediction={**JUDGED, "batching": "bucket"},
        distillation={"keep_logits": True},
    )
    assert cli.main(["run", config]) == 0
    return folder


def test_a_run_tells_the_scores_of_each_label(run):
    results = json.loads((run / "out" / "results.json").read_text())
    assert results["metric"] == "f1_micro" and results["label_names"] == list(NAMES)
    roles = [model["role"] for model in results["models"]]
    assert roles == ["teacher", "student", "student", "linear"]
    teacher = results["models"][0]
    assert teacher["metrics"]["f1_micro"] > 0.9 and len(teacher["by_seed"]) == 2
    for model in results["models"]:
        assert [row["name"] for row in model["per_class"]] == list(NAMES)
        assert [row["support"] for row in model["per_class"]] == [12, 6, 6]
    assert list((run / "out" / "teacher_logits").rglob("*.safetensors"))
    assert "Scores per label" in (run / "out" / "report.html").read_text()


def test_commands_use_the_threshold_of_the_folder(run, tmp_path, capsys):
    model = run / "out" / "models" / "finetune"
    raw = json.loads((model / "config.json").read_text())
    threshold = raw["tinybert_answers"]["threshold"]
    assert raw["tinybert_task"] == "multi_label"
    results = json.loads((run / "out" / "results.json").read_text())
    assert results["models"][0]["settings"]["threshold"] == pytest.approx(threshold, abs=1e-5)
    capsys.readouterr()
    assert cli.main(["evaluate", str(model), str(run / "rows.jsonl")]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores.pop("num_examples") == len(TEXTS)
    assert scores == pytest.approx(results["models"][0]["metrics"])
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    lines = [f"{row['text']}\t{'; '.join(row['labels'])}" for row in rows]
    (tmp_path / "rows.tsv").write_text("\n".join(["text\tlabels", *lines]))
    argv = ["evaluate", str(model), str(tmp_path / "rows.tsv"), "task.separator=;"]
    assert cli.main(argv) == 0
    assert json.loads(capsys.readouterr().out) == {**scores, "num_examples": len(TEXTS)}
    assert cli.main(["predict", str(model), str(run / "rows.jsonl")]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for answer in answers:
        sure = answer["probabilities"]
        assert answer["labels"] == [name for name in NAMES if sure[name] >= threshold]
    assert cli.main(["predict", str(model), "-t", TEXTS[0], "-t", " "]) == 0
    first, blank = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == TEXTS[0] and first["labels"] == answers[0]["labels"]
    assert blank == {"row": 2, "text": " ", "problem": "no text"}


def test_transformers_reads_the_same_model(run):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    for name in ("one", "small"):
        folder = str(run / "out" / "hf" / name)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        assert model.config.problem_type == "multi_label_classification"
        assert model.config.id2label == dict(enumerate(NAMES))
        inputs = AutoTokenizer.from_pretrained(folder)(TEXTS[:4], padding=True, return_tensors="pt")
        with torch.no_grad():
            theirs = torch.sigmoid(model(**inputs).logits).numpy()
        ours = [[row["probabilities"][n] for n in NAMES] for row in predict(folder, TEXTS[:4])]
        np.testing.assert_allclose(_logits(np.array(ours)), _logits(theirs), atol=1e-4)


def _logits(probabilities):
    return np.log(probabilities / (1 - probabilities))


def test_a_label_that_a_resample_lacks_keeps_its_f1():
    labels = np.eye(20, dtype=np.int32)
    found = np.stack([labels, labels], axis=1)
    names = [f"label {n}" for n in range(20)]
    scores = MULTI_LABEL.resampled(found, names)
    assert set(scores["f1_macro"]) == {1.0} == set(scores["f1_micro"])
    assert MULTI_LABEL.metrics(found[1:], names)["f1_macro"] == pytest.approx(0.95)
