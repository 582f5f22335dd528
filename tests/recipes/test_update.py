"""`tinybert update`: a grown head, the old model where it is right, the sweep, and the gate."""

import hashlib
import html
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_inputs
import yaml

from tinybert_jax import cli
from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.stages import UpdateSection
from tinybert_jax.data.examples import Examples
from tinybert_jax.huggingface.folder import read_model, save_model, start_params
from tinybert_jax.huggingface.head import Head
from tinybert_jax.huggingface.hub import load_tokenizer
from tinybert_jax.inference.predict import predict
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.models.inputs import Text
from tinybert_jax.objectives.distillation import Context, Options, Outputs
from tinybert_jax.objectives.objective import count_units
from tinybert_jax.recipes import update
from tinybert_jax.recipes.update import (
    _between,
    _choose,
    _count,
    _grown_head,
    _Judged,
    _mean,
    _Old,
)
from tinybert_jax.terms.logits import LogitsTerm

OLD = list(zip(tiny_inputs.TEXTS, tiny_inputs.LABELS, strict=True))
NEW = [(f"{text} {n}", "tea") for n, text in enumerate(["jam", "toast and tea", "a sea"] * 8)]
SHORT = ["num_epochs=null", "num_steps=2", "max_length=16", "trained_words=all"]
SHORT = [f"update.{setting}" for setting in [*SHORT, "interpolations=[0.0,0.5]"]]
SHORT += ["compute.unroll_layers=false", "run_dir=out"]


def _write_rows(path, rows):
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cheap_programs):
    """A model with a head for two labels, its rows, and new rows with a third label."""
    folder = tmp_path_factory.mktemp("update")
    _, config, tokenizer = tiny_inputs.write_inputs(folder, **tiny_inputs.TEACHER)
    params = make_classifier(config, 2)[1](jax.random.key(3))
    head = Head("SequenceClassification", "single_label_classification", ("pos", "neg"))
    save_model(folder / "model", params, config, tokenizer, head=head)
    _write_rows(folder / "new.tsv", [*NEW, *OLD[:4]])
    _write_rows(folder / "old.tsv", OLD)
    return folder


def _update(folder, *settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return cli.main(["update", "model", "new.tsv", "--old", "old.tsv", *SHORT, *settings])


@pytest.fixture(scope="module")
def finished(folder):
    """A run whose gate is wide."""
    assert _update(folder, "--max-regressions", "99%") == 0
    return folder / "out"


@pytest.fixture(scope="module")
def refused(folder):
    """Results and page of an update that forgets: refused, then allowed, and so again.

    The old model has every second old row right.
    """
    texts = [f"{text} {n}" for n, text in enumerate(tiny_inputs.TEXTS)]
    said = [answer["label"] for answer in predict(str(folder / "model"), texts)]
    other = {"pos": "neg", "neg": "pos"}
    rows = [
        (text, other[label] if n % 2 else label)
        for n, (text, label) in enumerate(zip(texts, said, strict=True))
    ]
    _write_rows(folder / "known.tsv", rows)
    settings = ["task.old=known.tsv", "task.dev_share=0.4", "update.interpolations=[1.0]"]
    settings += ["run_dir=refused"]
    settings += ["update.learning_rate=0.03", "update.num_steps=20", "num_seeds=1"]
    limits, statuses, has_model, out = ("40%", "99%", "40%", "99%"), [], [], folder / "refused"
    for limit in limits:
        statuses.append(_update(folder, "--max-regressions", limit, *settings))
        has_model.append((out / "hf").exists())
        if len(statuses) == 1:
            assert not [path for path in (out / "checkpoints").rglob("*") if path.is_file()]
            results = json.loads((out / "results.json").read_text())
            found = results, (out / "report.html").read_text()
    assert statuses == [3, 0, 3, 0] and has_model == [False, True, False, True]
    return found


def test_a_gate_that_refuses_leaves_a_report_and_no_model(folder, refused):
    results, page = refused
    (reason,), old = results["update"]["reasons"], results["update"]["dev"]["old"]
    assert "allowed are 40.00%" in reason and "exported" not in results
    texts = results["update"]["broken"]
    assert len(texts) == old["broken"] > 0
    assert all(row["old"] == row["label"] != row["new"] for row in texts)
    assert "it is refused." in page and f"The gate: refused, not exported: {reason}" in page
    assert all(html.escape(row["text"]) in page for row in texts)
    new, wrong = results["update"]["dev"]["new"], results["update"]["wrong"]
    assert len(wrong) == new["broken"] + new["neither"]
    assert all(row["new"] != row["label"] for row in wrong)


def test_a_run_that_another_gate_allows_is_not_trained_again(folder, finished, refused):
    results = json.loads((folder / "refused" / "results.json").read_text())
    assert results["exported"] == {"": "update"} and results["update"]["reasons"] == []
    assert read_model(finished / "hf").label_names == ("pos", "neg", "tea")
    lines = (folder / "refused" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "stage" for line in lines) == 1
    card = (folder / "refused" / "hf" / "README.md").read_text()
    assert ", updated from model with the text of new.tsv, by" in card and "## What changed" in card
    assert "\n- distillation" not in card


def test_the_folder_names_what_it_was_made_of(folder, finished):
    lineage = json.loads((finished / "hf" / "lineage.json").read_text())
    weights = (folder / "model" / "model.safetensors").read_bytes()
    files = lineage["models"]["student (model)"]
    assert files["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert lineage["stage"] == "update" and set(lineage["data"]) >= {"task.train", "task.dev"}
    config = (finished / "config.yaml").read_bytes()
    assert lineage["config.yaml"] == hashlib.sha256(config).hexdigest()
    tree = yaml.safe_load(config)
    assert tree["task"]["old"] == "old.tsv" and tree["task"]["labels"] == ["pos", "neg", "tea"]


def test_the_chosen_weights_lie_where_the_record_says(folder, finished):
    record = json.loads((finished / "models" / "update" / "update.json").read_text())
    assert [point["share"] for point in record["sweep"]] == [0.0, 0.5, 1.0]
    assert record["chosen_on"] == "select" and record["share"] in (0.0, 0.5, 1.0)
    assert set(record["dev"]) == {"old", "new", "new_labels"}
    assert 0 < record["dev"]["new_labels"]["num_examples"] <= record["dev"]["new"]["num_examples"]
    for side in record["dev"].values():
        assert side["num_examples"] == sum(side[n] for n in ("both", "fixed", "broken", "neither"))
    model = read_model(finished / "models" / "update")
    params = start_params(model.folder, make_classifier(model.config, 3)[1], whole=True)
    old = read_model(folder / "model")
    before = start_params(old.folder, make_classifier(old.config, 2)[1], whole=True)
    if record["share"] == 0:  # the old weights, and an output more
        for name in ("kernel", "bias"):
            kept = np.asarray(params["classifier"][name])[..., :2]
            np.testing.assert_array_equal(kept, np.asarray(before["classifier"][name]))
    assert load_tokenizer(model.folder).get_vocab() == load_tokenizer(old.folder).get_vocab()


@pytest.mark.parametrize(
    ("old", "words", "message"),
    [
        (
            [("a sea", "wood")] * 4,
            (),
            "old.tsv: expected labels of model: 'pos', 'neg'; got 'wood'",
        ),
        (
            OLD,
            ["task.labels=[neg,pos,tea]", "run_dir=other"],
            "task.labels: expected those of model first",
        ),
        (OLD, ["update.num_steps=3"], "holds a run of another config"),
        (OLD, ["--max-regressions", "0.1%"], "expected at least 2,995 old rows in dev for a limit"),
        (OLD, ["task.max_old_rows=1", "run_dir=other"], "1 of 1 rows of old.tsv in that part"),
        (
            OLD,
            ["task.dev=old.tsv", "task.dev_share=null"],
            "a share of old and of new rows is dev in",
        ),
        (OLD, ["task.old=null"], "expected a section update and task.old, got one of them"),
        (OLD, ["student=null"], "student.path, the folder of the old model"),
        (OLD, ["update=3"], "update: expected a section, got 3"),
    ],
)
def test_mistakes_are_told(folder, finished, capsys, old, words, message):
    _write_rows(folder / "old.tsv", old)
    try:
        assert _update(folder, *words) == 2
    finally:
        _write_rows(folder / "old.tsv", OLD)
    assert message in capsys.readouterr().err


def test_a_dry_run_tells_the_costs_and_writes_nothing(folder, capsys):
    assert _update(folder, "run_dir=dry", "--dry-run", "update.num_steps=3") == 0
    told = capsys.readouterr()
    assert "update: 3 steps" in told.out and "recipe: update: 3 steps of 16" in told.err
    assert not (folder / "dry").exists()


def test_only_classifiers_are_updated(folder, capsys):
    model = read_model(folder / "model")
    params = make_classifier(model.config, 1)[1](jax.random.key(0))
    head = Head("SequenceClassification", "regression", ())
    save_model(folder / "scores", params, model.config, load_tokenizer(folder / "model"), head=head)
    words = [str(folder / "new.tsv"), "--old", str(folder / "old.tsv")]
    assert cli.main(["update", str(folder / "scores"), *words]) == 2
    assert "expected a model for classification; got one for regression" in capsys.readouterr().err
    assert cli.main(["update", str(folder / "teacher"), *words]) == 2
    assert "expected a model with a head for a task, found none" in capsys.readouterr().err


def test_new_labels_are_fitted_beside_the_old_ones_which_stay():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 8)).astype(np.float32) * 3
    labels = np.repeat([0, 1, 2], 20).astype(np.int32)
    features = centres[labels] + rng.normal(size=(60, 8)).astype(np.float32) / 4
    kernel = (centres[:2] - centres[:2].mean(0)).T / 8
    old = _Old({"classifier": {"kernel": kernel, "bias": np.zeros(2, np.float32)}}, ("a", "b"))
    head = _grown_head(old, features, labels, 3)
    np.testing.assert_array_equal(head["kernel"][:, :2], kernel)
    logits = features @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    assert (logits.argmax(1) == labels).mean() == 1.0


def test_the_old_model_counts_where_it_is_right():
    """The term equals KL(old ‖ new)·t² over right rows alone, divided by all rows."""
    (_, term) = UpdateSection(num_steps=1, learning_rate=1e-3, old_weight=0.5).terms
    assert isinstance(term, LogitsTerm) and term.weight == 0.5 and term.needs_labels
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 6, 4)).astype(np.float32)
    labels = teacher.argmax(1)
    labels[[1, 4]] = (labels[[1, 4]] + 1) % 4
    ids = jnp.ones((6, 2), jnp.int32)
    batch = Batch(Text(ids, ids * 0), ids > 0, {"labels": jnp.asarray(labels)}, jnp.ones(6))

    @jax.jit
    def loss(batch, student, teacher):
        outputs = (Outputs(None, logits) for logits in (student, teacher))
        return term.make_loss(1, 1)(
            Context(*outputs, batch, count_units(batch), None, None, Options())
        )

    t = term.temperature

    def probabilities(logits):
        shifted = np.exp(logits / t)
        return shifted / shifted.sum(1, keepdims=True)

    p, q = probabilities(teacher), probabilities(student)
    rows = (p * np.log(p / q)).sum(1) * np.isin(np.arange(6), [1, 4], invert=True)
    got = loss(batch, jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_allclose(got, t**2 * rows.sum() / 6, rtol=1e-5)


def test_the_choice_is_no_worse_on_new_rows_and_breaks_fewest_old_ones():
    rng = np.random.default_rng(2)
    is_old = np.arange(60) < 40
    examples = Examples(["x"] * 60, None, np.zeros(60, np.int32), ("a",), is_old=is_old)

    def judged(share):
        return _Judged(rng.random(60) < share, rng.random(60).astype(np.float32), np.zeros(60))

    num_chosen = set()
    for _ in range(50):
        before = judged(0.8)
        points = [
            {"share": share, **_count(before, judged(0.7), examples)} for share in (0.0, 0.5, 1.0)
        ]
        chosen = _choose(points)
        num_chosen.add(chosen["share"])

        def right(point):
            return point["new"]["both"] + point["new"]["fixed"]

        last = points[-1]
        assert right(chosen) >= right(last) and chosen["new"]["loss"] <= last["new"]["loss"]
        good = [
            p for p in points if right(p) >= right(last) and p["new"]["loss"] <= last["new"]["loss"]
        ]
        assert chosen["old"]["broken"] == min(p["old"]["broken"] for p in good)
    assert num_chosen == {0.0, 0.5, 1.0}


def test_among_equals_the_lowest_loss_is_chosen():
    counts = {"both": 9, "fixed": 0, "broken": 0}

    def points(*losses):
        shares = np.linspace(0, 1, len(losses))
        sides = [
            {name: {**counts, "loss": x} for name, x in (("old", a), ("new", b))} for a, b in losses
        ]
        return [{"share": share, **own} for share, own in zip(shares, sides, strict=True)]

    # Lowest of the old rows is the first, of the new rows the third, of both the second.
    assert _choose(points((0.1, 0.9), (0.2, 0.4), (0.6, 0.3), (1.0, 0.9)))["share"] == 1 / 3
    assert _choose(points((0.1, 0.9), (0.2, np.nan)))["share"] == 1.0


def test_the_weights_of_several_seeds_are_averaged():
    rng = np.random.default_rng(3)
    models = [{"a": rng.normal(size=100).astype(np.float32)} for _ in range(3)]
    mean = _mean(models)["a"]
    np.testing.assert_allclose(mean, sum(model["a"] for model in models) / 3, rtol=1e-5)
    same = models[0]["a"]
    np.testing.assert_array_equal(_mean([models[0]] * 3)["a"], same)  # bit for bit
    assert _mean(models[:1]) is models[0]


def test_the_model_is_the_mean_of_its_seeds(folder, monkeypatch, capsys):
    seen = []

    def mean(models):
        seen.append((models, _mean(models)))
        return seen[0][1]

    monkeypatch.setattr(update, "_mean", mean)
    settings = ["update.interpolations=[1.0]", "update.dropout=0.3", "run_dir=seeds"]
    assert _update(folder, *settings, "--max-regressions", "99%") == 0
    ((models, expected),) = seen
    kernels = [np.asarray(model["classifier"]["kernel"]) for model in models]
    assert len(kernels) == 3 and not np.array_equal(kernels[0], kernels[1])
    assert "the weights are the mean of 3 seeds\n" in capsys.readouterr().out
    assert [path.name for path in (folder / "seeds" / "models").iterdir()] == ["update"]
    own = read_model(folder / "seeds" / "hf")
    params = start_params(own.folder, make_classifier(own.config, 3)[1], whole=True)
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_ends_of_the_way_are_the_two_models():
    start, end = {"a": np.float32([1.1, 2.2])}, {"a": np.float32([0.3, 7.7])}
    np.testing.assert_array_equal(_between(start, end, 0.0)["a"], start["a"])
    np.testing.assert_array_equal(_between(start, end, 1.0)["a"], end["a"])
    np.testing.assert_allclose(_between(start, end, 0.5)["a"], [0.7, 4.95], rtol=1e-6)
