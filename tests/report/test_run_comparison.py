"""`tinybert report`: one run again, and several on one page."""

import json

import numpy as np
import pytest
from report_page import Page, eval_rows, make_model, make_results, train_rows

from tinybert_jax import cli
from tinybert_jax.metrics.intervals import interval
from tinybert_jax.report.run_comparison import comparison_page
from tinybert_jax.report.settings_table import differences
from tinybert_jax.report.several_runs import short_names


def _resamples(seed, dev="rows", shift=0.0):
    draws = np.random.default_rng(seed).normal(0.88 + shift, 0.01, 100)
    values = [round(float(value), 6) for value in draws]
    return {
        "metric": "accuracy",
        "dev": dev,
        "models": [{"role": "student", "name": "student-model", "values": values}],
    }


def _write_run(folder, *, resamples=None, config="seed: 0\n", accuracy=0.885, rows=None, **more):
    folder.mkdir(parents=True)
    student = make_model("student", accuracy, 8.0, intervals={"accuracy": [0.86, 0.905]})
    models = [make_model("teacher", 0.905, 1.0), student]
    results = make_results(models=models, **more)
    (folder / "results.json").write_text(json.dumps(results))
    lines = train_rows() + eval_rows() if rows is None else rows
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "config.yaml").write_text(config)
    if resamples:
        (folder / "resamples.json").write_text(json.dumps(resamples))
    return folder


def test_the_interval_is_that_of_the_paired_differences(tmp_path):
    one = _resamples(0)
    two = _resamples(0, shift=0.02)
    two["models"][0]["values"][3] = None  # a resample without a score
    runs = [
        _write_run(tmp_path / "a", resamples=one),
        _write_run(tmp_path / "b", resamples=two, accuracy=0.905),
    ]
    drawn = [np.array(own["models"][0]["values"], float) for own in (one, two)]
    low, high = interval(drawn[1] - drawn[0])
    text = Page(comparison_page(runs)).text
    assert "b has the highest accuracy: 0.905." in text
    shown = f"[{low:+.3f}, {high:+.3f}]".replace("-", "−")
    assert f"+0.020 {shown}" in text and "does not hold 0" in text
    assert "0.885 [0.860, 0.905]" in text


@pytest.mark.parametrize(
    "second, reason",
    [
        (None, "a run has no resamples.json"),
        (_resamples(1, dev="other rows"), "the dev rows are not the same"),
    ],
)
def test_rows_that_are_not_the_same_are_not_paired(tmp_path, second, reason):
    first = _write_run(tmp_path / "a", resamples=_resamples(0))
    text = Page(comparison_page([first, _write_run(tmp_path / "b", resamples=second)])).text
    assert f"No interval for b: {reason}" in text and "hold 0." not in text


def test_only_settings_that_differ_are_shown(tmp_path):
    common = "name: {0}\nrun_dir: runs/{0}\nprediction: {{learning_rate: {1}, dropout: 0.1}}\n"
    runs = [
        _write_run(tmp_path / "a", config=common.format("a", 0.001) + "baseline: null\n"),
        _write_run(tmp_path / "b", config=common.format("b", 0.002) + "baseline: {dropout: 0}\n"),
    ]
    text = Page(comparison_page(runs)).text
    assert "prediction.learning_rate0.0010.002" in text and "baseline–given" in text
    assert "run_dir" not in text and "prediction.dropout" not in text


def test_terms_are_compared_one_by_one():
    trees = [{"terms": [{"term": "hidden", "weight": w}, {"term": "logits"}]} for w in (1, 2)]
    assert list(differences(trees)) == [("terms.0.weight", ["1", "2"])]
    longer = {"terms": [*trees[0]["terms"], {"term": "label"}]}
    assert [path for path, _ in differences([trees[0], longer])] == ["terms"]


def test_curves_of_the_runs_share_a_chart(tmp_path):
    more = [{**row, "stage": "baseline"} for row in train_rows()]
    runs = [
        _write_run(tmp_path / "a"),
        _write_run(tmp_path / "b", rows=train_rows() + eval_rows() + more),
    ]
    page = Page(comparison_page(runs))
    curves = [a["class"] for tag, a in page.tags if tag == "polyline"]
    assert curves == ["curve c0", "curve c1"] * 2 + ["curve c1"]
    assert "Only b has this stage." in page.text


def test_many_runs_can_be_told_apart(tmp_path):
    runs = [_write_run(tmp_path / f"run-{number}") for number in range(9)]
    page = Page(comparison_page(runs))
    classes = [a["class"] for tag, a in page.tags if tag == "polyline"]
    assert len(set(classes)) == 9


def test_runs_of_several_metrics_are_not_ranked(tmp_path):
    model = make_model("student", 0.9, 1.0, metrics={"pearson": 0.9})
    other = _write_run(tmp_path / "b")
    (other / "results.json").write_text(
        json.dumps(make_results(metric="pearson", models=[model], share_kept=None))
    )
    text = Page(comparison_page([_write_run(tmp_path / "a"), other])).text
    assert "no score in common" in text and "no common scale" in text


@pytest.mark.parametrize(
    "labels, is_common",
    [(["ham", "spam"], False), (["negative", "positive"], True), (["a", "b", "c"], False)],
)
def test_f1_of_other_classes_has_no_common_scale(tmp_path, labels, is_common):
    runs = [
        _write_run(tmp_path / name, label_names=own, metric="f1", resamples=_resamples(0))
        for name, own in (("a", ["negative", "positive"]), ("b", labels))
    ]
    for run in runs:  # matthews: the scores are those of classes
        results = json.loads((run / "results.json").read_text())
        for model in results["models"]:
            model["metrics"]["matthews"] = 0.7
        (run / "results.json").write_text(json.dumps(results))
    text = Page(comparison_page(runs)).text
    assert ("no common scale" in text) == ("no score in common" in text) == (not is_common)
    assert ("F1 of positive on the dev set" in text) == is_common
    assert ("+0.000" in text) == is_common


def test_equal_scores_are_called_so(tmp_path):
    runs = [_write_run(tmp_path / name, resamples=_resamples(0)) for name in "ab"]
    assert "b has the same." in Page(comparison_page(runs)).text


def test_names_and_settings_are_escaped(tmp_path):
    evil = "<script>x</script>"
    runs = [
        _write_run(tmp_path / f"{evil.replace('/', '')}{i}", config=f"a: '{evil}{i}'", name=evil)
        for i in (1, 2)
    ]
    source = comparison_page(runs)
    assert "<script" not in source and Page(source).text.count("<script>") > 4


@pytest.mark.parametrize(
    "results",
    [
        {},
        {"models": [{}], "metric": 3},
        {"models": 3, "seconds": [], "dev_examples": []},
        {"metric": "f1", "models": [{"role": "linear", "metrics": {"f1": 0.5}}]},
        {"metric": "accuracy", "models": [{"role": "student", "metrics": {"accuracy": 1e300}}]},
    ],
)
def test_malformed_files_never_crash_the_page(tmp_path, results):
    first, second = (_write_run(tmp_path / name, resamples=_resamples(0)) for name in "ab")
    (second / "results.json").write_text(json.dumps(results))
    (second / "config.yaml").write_text("a: [")
    (second / "metrics.jsonl").write_text("[1]\n{")
    for content in ('{"models": [3, {"role": "student"}]}', "[", '{"models": {"a": 1}}'):
        (second / "resamples.json").write_text(content)
        for runs in ([first, second], [second, first]):
            text = Page(comparison_page(runs)).text
            assert "Scores" in text and "nan" not in text


def test_names_are_as_long_as_they_have_to_be(tmp_path):
    assert short_names([tmp_path / "x/run", tmp_path / "y/run"]) == ["x/run", "y/run"]
    with pytest.raises(ValueError, match="expected each run once"):
        short_names([tmp_path, tmp_path / "."])


# The command


def test_the_command_writes_the_pages(tmp_path, monkeypatch, capsys):
    one, two = _write_run(tmp_path / "a"), _write_run(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(one)]) == 0
    again = (one / "report.html").read_text()
    assert "keeps" in Page(again).text
    assert cli.main(["report", str(one), "-o", "here.html"]) == 0
    assert (tmp_path / "here.html").read_text() == again
    assert cli.main(["report", str(one), str(two)]) == 0
    assert "2 runs" in Page((tmp_path / "comparison.html").read_text()).text
    assert capsys.readouterr().out.split()[-1] == "comparison.html"


@pytest.mark.parametrize("output", ["page.txt", "nowhere/page.html", "folder.html"])
def test_a_wrong_output_is_refused(tmp_path, monkeypatch, capsys, output):
    run = _write_run(tmp_path / "a")
    (tmp_path / "folder.html").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(run), "-o", output]) == 2
    assert "expected a .html file in a folder that exists" in capsys.readouterr().err


def test_a_folder_that_is_no_finished_run_is_refused(tmp_path, capsys):
    run = _write_run(tmp_path / "a")
    assert cli.main(["report", str(run), str(tmp_path)]) == 2
    assert "expected a run folder with results.json" in capsys.readouterr().err
