"""The report: sentences, tables and curves, without network access, whatever file is missing."""

import json
import math
import re

import pytest
from report_page import Page, eval_rows, make_model, make_results, render, train_rows

from tinybert_jax.report.charts import MAX_DRAWN_POINTS
from tinybert_jax.report.confusion import cut_names
from tinybert_jax.report.headline import headline
from tinybert_jax.report.page import write_report
from tinybert_jax.report.pareto import pareto_front
from tinybert_jax.report.score_table import choice_note
from tinybert_jax.report.tables import compare, format_si, metric_name


def test_the_page_shows_the_numbers_of_the_run(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 17\n")
    (tmp_path / "env.json").write_text('{"jax": "0.10.2", "git_commit": "abc123"}')
    page = render(tmp_path, make_results(), train_rows() + eval_rows())
    assert (
        "The student keeps 97.8 % of its teacher’s accuracy with 8.0× fewer encoder parameters "
        "and runs 2.8× faster." in page.text
    )
    assert "baseline-model, reaches 0.861: distillation adds 2.4 points." in page.text
    for expected in (
        *("0.905", "0.885", "0.861", "97.8 %", "95.1 %", "−0.020"),
        *("22.7 M", "10.6 M", "1.33 M", "21.0 M", "90.9 MB", "12.3 ms", "8.0× fewer"),
        *("Measured on 872 examples", "which flatters it", "380", "407", "88.8 %"),
        *("1 min 40 s", "50.1 s", "66.7 %", "2 min 30 s in total"),
        *("12.0 k", "12.5 %", "31.0 %", "best accuracy 0.880 at step 20"),
        *("tinybert run configs/quickstart.yaml", "seed: 17", "0.10.2", "abc123"),
    ):
        assert expected in page.text, expected


def test_a_single_evaluation_is_not_called_the_best(tmp_path):
    page = render(tmp_path, make_results(), train_rows() + eval_rows()[:1])
    assert "Evaluation" in page.text and "best accuracy" not in page.text


def test_the_environment_is_told_in_words_and_leaves_out_what_says_nothing(tmp_path):
    now = {"started": "2026-11-30T13:43", "jax": "0.10.2", "num_devices": 1, "git_commit": "none"}
    now |= {"program_cache": None}
    earlier = [now | {"started": "2026-11-29T08:00", "jax": "0.9.0"}, {"started": "2026-11-30T12"}]
    (tmp_path / "env.json").write_text(json.dumps(now | {"earlier": earlier}))
    page = render(tmp_path, make_results())
    assert "started before2026-11-29T08:00 (jax 0.9.0); 2026-11-30T12" in page.text
    assert "devices1" in page.text
    for word in ("{", "earlier", "program_cache", "git_commit", "None"):
        assert word not in page.text
    (tmp_path / "env.json").write_text(json.dumps(now | {"earlier": []}))
    assert "started before" not in render(tmp_path, make_results()).text


def test_the_page_loads_nothing_from_outside(tmp_path):
    page = render(tmp_path, make_results(), train_rows())
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|@import|url\(", source)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "object"})
    links = [a.get("href") or a.get("src") for _, a in page.tags if "href" in a or "src" in a]
    assert all(link.startswith(("#", "data:")) for link in links)
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert all(link[1:] in ids for link in links if link.startswith("#"))


def test_all_names_are_escaped(tmp_path):
    evil = "<script>alert('x')</script>\"&"
    results = make_results(name=evil, metric=evil, label_names=[evil, "b"], commands=[evil])
    results["seconds"] = {evil: 3.0}
    for model in results["models"]:
        model |= {"name": evil, "metrics": {evil: 0.9}}
        model["latency_ms"] |= {"batch": evil}
    results["models"].append(make_model(evil, 0.5, 1.0))
    rows = [row | {f"loss/{evil}": 1.0} for row in train_rows(evil)]
    rows += [row | {evil: 0.5} for row in eval_rows(evil)]
    (tmp_path / "config.yaml").write_text(evil)
    (tmp_path / "env.json").write_text(json.dumps({evil: evil}))
    page = render(tmp_path, results, rows)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.text.count(evil) > 10


def test_curves_have_a_point_per_logged_step(tmp_path):
    page = render(tmp_path, make_results(), train_rows(num_steps=40))
    curves = [a for tag, a in page.tags if tag == "polyline"]
    # Total, two terms, throughput, learning rate, gradient norm.
    assert [len(a["points"].split()) for a in curves] == [40] * 6


def test_long_runs_are_thinned_and_smoothed(tmp_path):
    page = render(tmp_path, make_results(), train_rows(num_steps=20_000))
    curves = [a for tag, a in page.tags if tag == "polyline"]
    assert all(len(a["points"].split()) <= MAX_DRAWN_POINTS for a in curves)
    assert page.count("mean") == 5  # the learning rate is exact and stays as it is


def test_of_a_step_logged_twice_the_later_line_is_drawn(tmp_path):
    repeated = [row | {"stage": "distill"} for row in train_rows()[20:30]]
    page = render(tmp_path, make_results(), train_rows() + repeated)
    curves = [a for tag, a in page.tags if tag == "polyline"]
    assert {len(a["points"].split()) for a in curves} == {40}


def test_unreadable_lines_and_values_that_are_not_finite_become_notes(tmp_path):
    rows = train_rows()
    rows[5]["loss"] = math.nan
    rows[6]["grad_norm"] = math.inf
    page = render(tmp_path, make_results(), rows, lines=['{"kind": "train", "st', "[1, 2]"])
    assert "2 unreadable lines of metrics.jsonl were skipped" in page.text
    assert "2 values that are not finite were left out" in page.text


def test_missing_files_and_fields_become_notes(tmp_path):
    page = render(tmp_path, {})
    for note in ("No curves", "No confusion matrix", "No times", "No command", "lists no models"):
        assert note in page.text
    assert "No environment" in page.text and "No configuration" in page.text


@pytest.mark.parametrize(
    "results",
    [
        {"models": [{}], "metric": None},
        {"models": [{"role": "student", "metrics": [1], "latency_ms": 3, "confusion": [[1]]}]},
        {"models": [make_model("student", 0.5, 1.0, confusion=[[1, 2], [3]])], "seconds": []},
        {"models": [make_model("teacher", 0.5, 1.0, metrics={"accuracy": "high"}, name=3)]},
        {"models": 3, "name": None, "label_names": 4, "seconds": {"a": None, "b": "x"}},
        make_results(share_kept=None, label_names=["too", "many", "names"]),
    ],
)
def test_malformed_results_never_crash_the_report(tmp_path, results):
    page = render(tmp_path, results, train_rows())
    assert "Comparison" in page.text and "Training" in page.text and "nan" not in page.text


def test_a_matrix_that_is_not_square_is_not_drawn(tmp_path):
    models = [make_model("student", 0.5, 1.0, confusion=[[1, 2], [3]])]
    page = render(tmp_path, make_results(models=models))
    assert "No confusion matrix" in page.text and page.count("heat") == 0


def test_a_folder_without_readable_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a run folder with results.json"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"models": [')
    with pytest.raises(ValueError, match="expected a JSON object"):
        write_report(tmp_path)


def test_translations_stand_side_by_side_in_place_of_a_matrix(tmp_path):
    results = make_results(metric="bleu")
    del results["label_names"]
    for model, made in zip(results["models"], ("ein <Hund>", "der Hund", "Hund"), strict=True):
        model["metrics"] = {"bleu": 38.066, "chrf": 60.0}
        rows = [{"source": "a dog", "reference": "Ein Hund", "translation": made}]
        model["translations"] = rows
    page = render(tmp_path, results, train_rows())
    for expected in (
        "Translations",
        "a dog",
        "Ein Hund",
        "ein <Hund>",
        "der Hund",
        "BLEU",
        "38.07",
    ):
        assert expected in page.text, expected
    assert "matrix" not in page.text and "adds 0.0 points" in page.text


def test_regression_run_without_teacher(tmp_path):
    student = make_model("student", 0.9, 1.0, confusion=None)
    student["metrics"] = {"mse": 0.4, "pearson": 0.87}
    results = make_results(metric="pearson", models=[student], share_kept=None)
    page = render(tmp_path, results)
    assert "The student reaches 0.870 Pearson correlation." in page.text
    assert "Share of the teacher’s score" not in page.text
    assert "No confusion matrix" in page.text


@pytest.mark.parametrize("num_labels, is_matrix", [(20, True), (21, False)])
def test_more_than_20_classes_become_a_list_of_confused_pairs(tmp_path, num_labels, is_matrix):
    counts = [[30 if i == j else 0 for j in range(num_labels)] for i in range(num_labels)]
    counts[3][7] = 10
    names = [f"intent {i}" for i in range(num_labels)]
    models = [make_model("student", 0.9, 1.0, confusion=counts)]
    page = render(tmp_path, make_results(models=models, label_names=names))
    assert page.count("hit") == (num_labels + 1 if is_matrix else 0)
    if not is_matrix:
        assert "intent 3intent 71025.0 %" in page.text


@pytest.mark.parametrize(
    "measured, env, expected",
    [
        (None, None, "Latency (batch 1, 32 tokens)"),
        (None, "cpu", "Latency (CPU, batch 1, 32 tokens)"),
        ("cpu", "NVIDIA H200", "Latency (CPU, batch 1, 32 tokens)"),
        ("NVIDIA H200", "cpu", "Latency (NVIDIA H200, batch 1, 32 tokens)"),
        (None, "TPU v5 lite", "Latency (TPU v5 lite, batch 1, 32 tokens)"),
    ],
)
def test_latency_names_the_device_of_the_results_or_else_of_the_environment(
    tmp_path, measured, env, expected
):
    results = make_results_of_three_students()
    for model in results["models"]:
        model["latency_ms"] |= {"device": measured} if measured else {}
    if env:
        (tmp_path / "env.json").write_text(json.dumps({"device": env}))
    page = render(tmp_path, results)
    assert expected in page.text
    assert f"Accuracy against {expected.replace('Latency', 'latency in ms')}" in page.text
    assert ("CPU" in page.text) == ("CPU" in expected)


def test_latencies_of_different_devices_are_not_compared(tmp_path):
    results = make_results()
    results["models"][0]["latency_ms"]["device"] = "NVIDIA H200"
    (tmp_path / "env.json").write_text('{"device": "cpu"}')
    page = render(tmp_path, results)
    assert "Latency (conditions differ)" in page.text
    assert "faster" not in page.text


def text_of(markup):
    return Page(markup).text


def test_headline_of_a_larger_slower_or_equal_student():
    teacher = make_model("teacher", 0.8, 1.0)
    slower = make_model("student", 0.82, 0.5)
    results = {"metric": "accuracy", "models": [teacher, slower]}
    assert text_of(headline(results)) == (
        "The student reaches 102.5 % of its teacher’s accuracy "
        "with 2.0× more encoder parameters and runs 1.4× slower."
    )
    same = make_model("student", 0.8, 1.0, latency_ms={"batch": 8, "seq_len": 32, "median": 1.0})
    results = {"metric": "accuracy", "models": [teacher, same]}
    # The sizes are equal and the latencies have different batch sizes: nothing to compare.
    assert text_of(headline(results)) == "The student keeps 100.0 % of its teacher’s accuracy."


def test_headline_of_a_student_above_its_teacher_by_no_more_than_chance():
    models = [make_model("teacher", 0.8, 1.0), make_model("student", 0.82, 1.0)]
    results = {"metric": "accuracy", "models": models}
    for low, expected in ((-0.01, "is level with its teacher at 0.820"), (0.01, "reaches 102.5 %")):
        compared = {"teacher": {"difference": 0.02, "interval": [low, 0.05]}}
        sentence = text_of(headline(results | {"comparisons": {models[1]["name"]: compared}}))
        assert sentence.startswith(f"The student {expected}"), sentence


def test_headline_takes_the_share_from_results_without_a_listed_teacher():
    models = [make_model("student", 0.8, 1.0)]
    results = {"metric": "accuracy", "models": models, "share_kept": 0.991}
    assert text_of(headline(results)) == "The student keeps 99.1 % of its teacher’s accuracy."


def test_headline_gives_no_share_where_lower_is_better():
    models = [
        make_model(r, 0.9, s, metrics={"mse": m})
        for r, s, m in (("teacher", 1, 0.2), ("student", 8, 0.4))
    ]
    sentence = text_of(headline({"metric": "mse", "models": models}))
    assert sentence.startswith("The student reaches 0.400 mean squared error")


def test_compare_and_si_format_ratios_and_sizes():
    assert compare(8e6, 1e6, "fewer", "more") == "8.0×\u00a0fewer"
    assert compare(1e6, 8e6, "fewer", "more") == "8.0×\u00a0more"
    assert compare(100.0, 98.0, "faster", "slower") == "same"
    assert compare(None, 1.0, "fewer", "more") == compare(0.0, 1.0, "fewer", "more") == ""
    written = [format_si(v) for v in (22_713_986.0, 999_999.0, 870.0, 3.14159, 0.0581, 0.0, 2e-7)]
    assert [w.replace("\u00a0", " ") for w in written] == [
        *("22.7 M", "1.00 M", "870", "3.14", "0.0581", "0.00", "2.00e-07"),
    ]
    assert format_si(90_856_704.0, "B") == "90.9\u00a0MB"


def make_results_of_three_students():
    models = [make_model("teacher", 0.905, 1.0)]
    for role, gain in (("student", 0.02), ("baseline", 0.0)):
        models += [
            make_model(role, 0.86 + gain, 8.0, name="small"),
            make_model(role, 0.87 + gain, 2.0, name="<large>"),
            make_model(role, 0.85 + gain, 4.0, name="middle"),
        ]
    kept = {m["name"]: m["metrics"]["accuracy"] / 0.905 for m in models if m["role"] == "student"}
    return make_results(models=models, share_kept=kept)


def test_losses_of_several_students_have_a_separate_figure(tmp_path):
    names = [f"loss/{name}" for name in ("small", "<large>", "middle")]
    rows = [row | dict.fromkeys(names, row["loss"]) for row in train_rows()]
    page = render(tmp_path, make_results_of_three_students(), rows)
    assert "Loss, mean over students" in page.text and "Loss per student" in page.text
    keys = [a["class"] for tag, a in page.tags if tag == "i" and "key c" in a.get("class", "")]
    assert all(key.split()[1] in [f"c{i}" for i in range(7)] for key in keys)
    assert len(keys) == len([k for k in rows[0] if k.startswith("loss")])


def test_several_students_have_a_column_each_and_a_plot_of_score_and_cost(tmp_path):
    page = render(tmp_path, make_results_of_three_students())
    assert (
        "The best of 3 students, <large>, keeps 98.3 % of its teacher’s accuracy with 2.0× fewer "
        "encoder parameters" in page.text
    )
    assert "The baseline, <large>, reaches 0.870: distillation adds 2.0 points." in page.text
    for share in ("97.2 %", "98.3 %", "96.1 %", "95.0 %"):  # three students, a baseline
        assert share in page.text
    columns = [a for tag, a in page.tags if tag == "th" and a.get("scope") == "col"]
    assert len([a for a in columns if a.get("class") == "student"]) == 3
    dots = [a for tag, a in page.tags if tag == "circle"]
    assert len(dots) == 2 * 7
    # From the small student over the large student to the teacher; the middle student is beaten.
    fronts = [a["d"] for tag, a in page.tags if a.get("class") == "front"]
    assert [front.count("H") for front in fronts] == [2, 2]
    assert "Accuracy against latency in ms (batch 1, 32 tokens)" in page.text
    for model in (results := make_results_of_three_students())["models"]:
        model["latency_ms"]["batch"] = len(model["name"])
    page = render(tmp_path, results)
    assert page.count("front") == 1, "latencies under different conditions cannot be compared"


def test_one_student_has_no_plot_of_score_and_cost(tmp_path):
    assert render(tmp_path, make_results()).count("front") == 0


def test_sizes_are_named_and_stand_beside_the_space_on_disk(tmp_path):
    page = render(tmp_path, make_results())
    assert "Encoder parameters, without embeddings, drawn to scale:10.6 M to 1.33 M" in page.text
    assert "On disk: 90.9 MB to 90.9 MB" in page.text


@pytest.mark.parametrize(
    "labels, metrics, name",
    [
        (["negative", "positive"], ("f1", "matthews"), "F1 of positive"),
        (["a", "b", "c"], ("f1", "matthews"), "macro F1"),
        (["PER", "ORG", "LOC"], ("f1", "precision"), "F1"),
        (None, ("f1", "exact_match"), "F1"),
    ],
)
def test_the_name_of_f1_says_which_one_it_is(labels, metrics, name):
    models = [make_model("student", 0.8, 1.0, metrics=dict.fromkeys(metrics, 0.8))]
    results = {"metric": "f1", "models": models, "label_names": labels}
    assert metric_name("f1", results) == name
    assert f"reaches 0.800 {name}." in text_of(headline(results))


LONG = (
    "balance_not_updated_after_bank_transfer",
    "balance_not_updated_after_cheque_or_cash_deposit",
)


@pytest.mark.parametrize(
    "names",
    [
        (*LONG, "atm_support"),
        [f"the same long beginning {i} and the same long end" for i in range(20)],
        [f"{i}, a long name with the same end" for i in range(9)],
    ],
)
def test_cut_names_of_columns_stay_distinct(names):
    short = cut_names(names)
    assert len(set(short)) == len(names) and all(len(name) <= 20 for name in short)
    assert "atm_support" not in names or short == [
        *("balance_n…k_transfer", "balance_n…sh_deposit", "atm_support")
    ]


def test_columns_of_the_matrix_can_be_told_apart(tmp_path):
    names = [*LONG, *(f"team {i}" for i in range(6))]
    counts = [[3] * 8 for _ in names]
    models = [make_model("student", 0.9, 1.0, confusion=counts)]
    page = render(tmp_path, make_results(models=models, label_names=names))
    heads = [a["title"] for tag, a in page.tags if tag == "th" and "title" in a]
    assert heads == names
    assert "balance_n…k_transfer" in page.text and LONG[1] in page.text


def test_long_labels_of_differing_texts_break_and_leave_room_for_the_text(tmp_path):
    row = {"text": "Where is it?", "label": LONG[0], "teacher": LONG[0], "student": LONG[1]}
    render(tmp_path, make_results(differing={"num_texts": 1, "texts": [row]}))
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<table class="differing answers">' in source and ".answers th:first-child{" in source
    assert f"<td>{LONG[1].replace('_', '_<wbr>')}</td>" in source


def test_calibration_has_dots_of_bins_with_enough_texts_and_the_student_on_top(tmp_path):
    results = make_results()
    bins = {
        "teacher": ([0.4, 0.7, 0.9], [0.0, 1.0, 0.9], [1, 4, 85]),
        "student": ([0.99], [0.92], [90]),
        "baseline": ([0.4, 0.9], [0.5, 0.8], [5, 85]),
    }
    for model in results["models"]:
        lists = dict(zip(("confidence", "accuracy", "count"), bins[model["role"]], strict=True))
        model["calibration"] = {"error": 0.07, **lists}
    page = render(tmp_path, results)
    roles = ["teacher", "baseline", "student"]
    drawn = [a["class"] for tag, a in page.tags if tag == "polyline"]
    assert drawn == ["diagonal", *roles]
    dots = [a["class"].split()[-1] for tag, a in page.tags if tag == "circle"]
    assert dots == ["teacher", "baseline", "baseline", "student"]


def test_the_front_holds_the_points_that_no_point_beats():
    points = [(1.0, 0.5), (1.0, 0.6), (2.0, 0.6), (3.0, 0.9), (4.0, 0.8)]
    assert pareto_front(points) == [(1.0, 0.6), (3.0, 0.9)]
    assert pareto_front(points, lower_is_better=True) == [(1.0, 0.5)]
    assert pareto_front([]) == []


@pytest.mark.parametrize(
    "stages, seeds, export, told",
    [
        ({"prediction": 1}, {}, "student", "so these examples chose nothing"),
        ({"prediction": 1}, {"student": 3}, "student", "chose only which seed is exported"),
        ({"prediction": 1}, {"teacher": 3}, "student", "which flatters it"),
        ({"prediction": 1}, {}, "best", "which flatters it"),
        ({"finetune": 1, "prediction": 4}, {}, "student", "which flatters it"),
        ({}, {}, "student", "which flatters it"),
    ],
)
def test_what_the_dev_examples_have_chosen_is_told(stages, seeds, export, told):
    models = [make_model(role, 0.8, 1.0) for role in ("teacher", "student")]
    for model in models:
        if model["role"] in seeds:
            model["by_seed"] = [{"accuracy": 0.8}] * seeds[model["role"]]
    counted = {name: {"num_evals": count} for name, count in stages.items()}
    assert told in choice_note(make_results(models=models, stages=counted, export=export))
