"""The run report: what it says, that it stands alone, and that no missing file breaks it."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from tinybert_jax.report.charts import MAX_DRAWN_POINTS
from tinybert_jax.report.page import write_report
from tinybert_jax.report.pareto import pareto_front
from tinybert_jax.report.tables import compare, headline, si

VOID = {"meta", "link", "br"}
SELF_CLOSED = {"path", "circle", "polyline", "rect"}


class Page(HTMLParser):
    """Text, attributes and the nesting of a page; fails on a tag closed out of turn."""

    def __init__(self, source: str):
        super().__init__()
        self.text, self.tags, self.open = "", [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SELF_CLOSED
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data.replace("\u00a0", " ")

    def count(self, css_class):
        return sum(css_class in (a.get("class") or "").split() for _, a in self.tags)


def make_model(role, accuracy, scale, **more):
    return {
        "role": role,
        "name": f"{role}-model",
        "num_parameters": 22_713_986,
        "num_encoder_parameters": int(10_646_784 / scale),
        "flops_per_token": 21e6 / scale,
        "bytes_on_disk": 90_856_704,
        "latency_ms": {"batch": 1, "seq_len": 32, "median": 12.3 / math.sqrt(scale)},
        "metrics": {"accuracy": accuracy, "f1": accuracy - 0.01},
        "confusion": [[380, 48], [37, 407]],
        **more,
    }


def make_results(**more):
    return {
        "name": "quickstart",
        "metric": "accuracy",
        "dev_examples": 872,
        "label_names": ["negative", "positive"],
        "models": [
            make_model("teacher", 0.905, 1.0),
            make_model("student", 0.885, 8.0),
            make_model("baseline", 0.861, 8.0),
        ],
        "share_kept": 0.885 / 0.905,
        "seconds": {"distill": 100.2, "finetune": 50.1},
        "commands": ["tinybert run configs/quickstart.yaml"],
        **more,
    }


def train_rows(stage="distill", num_steps=40):
    return [
        {
            "kind": "train",
            "stage": stage,
            "step": step,
            "time": 0.1 * step,
            "loss": 3.0 / step + 0.2,
            "loss/attention": 2.0 / step + 0.1,
            "loss/hidden": 1.0 / step + 0.1,
            "learning_rate": 5e-5 * step / num_steps,
            "grad_norm": 1.0 + 1.0 / step,
            "tokens_per_second": 12_000.0,
            "padding_share": 0.125,
            "mfu": 0.31,
        }
        for step in range(1, num_steps + 1)
    ]


def eval_rows(stage="distill"):
    return [
        {"kind": "eval", "stage": stage, "step": step, "accuracy": accuracy, "loss": 0.5}
        for step, accuracy in ((10, 0.7), (20, 0.88), (30, 0.86))
    ]


def render(run_dir, results, rows=(), lines=()):
    (run_dir / "results.json").write_text(json.dumps(results))
    if rows or lines:
        text = "\n".join([*map(json.dumps, rows), *lines])
        (run_dir / "metrics.jsonl").write_text(text)
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_headline_table_and_stage_name_the_numbers(tmp_path):
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
        *("one standard error of the student’s accuracy is 0.011", "380", "407", "88.8 %"),
        *("1 min 40 s", "50.1 s", "66.7 %", "2 min 30 s in all"),
        *("12.0 k", "12.5 %", "31.0 %", "best accuracy 0.880 at step 20"),
        *("tinybert run configs/quickstart.yaml", "seed: 17", "0.10.2", "abc123"),
    ):
        assert expected in page.text, expected


def test_page_stands_alone(tmp_path):
    page = render(tmp_path, make_results(), train_rows())
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|@import|url\(", source)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "object"})
    links = [a.get("href") or a.get("src") for _, a in page.tags if "href" in a or "src" in a]
    assert all(link.startswith(("#", "data:")) for link in links)
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert all(link[1:] in ids for link in links if link.startswith("#"))


def test_every_name_is_escaped(tmp_path):
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
    # Total, two parts, throughput, learning rate, gradient norm.
    assert [len(a["points"].split()) for a in curves] == [40] * 6


def test_long_runs_are_thinned_and_smoothed(tmp_path):
    page = render(tmp_path, make_results(), train_rows(num_steps=20_000))
    curves = [a for tag, a in page.tags if tag == "polyline"]
    assert all(len(a["points"].split()) <= MAX_DRAWN_POINTS for a in curves)
    assert page.count("mean") == 5  # the learning rate is exact and stays as it is


def test_a_resume_that_repeats_steps_keeps_the_later_line(tmp_path):
    again = [row | {"stage": "distill"} for row in train_rows()[20:30]]
    page = render(tmp_path, make_results(), train_rows() + again)
    curves = [a for tag, a in page.tags if tag == "polyline"]
    assert {len(a["points"].split()) for a in curves} == {40}


def test_damaged_and_diverged_logs_are_reported_not_fatal(tmp_path):
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
def test_odd_results_never_crash(tmp_path, results):
    page = render(tmp_path, results, train_rows())
    assert "Comparison" in page.text and "Training" in page.text and "nan" not in page.text


def test_a_matrix_that_is_not_square_is_not_drawn(tmp_path):
    models = [make_model("student", 0.5, 1.0, confusion=[[1, 2], [3]])]
    page = render(tmp_path, make_results(models=models))
    assert "No confusion matrix" in page.text and page.count("heat") == 0


def test_a_folder_without_results_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="expected a run folder with results.json"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"models": [')
    with pytest.raises(ValueError, match="expected a JSON object"):
        write_report(tmp_path)


def test_regression_run_without_teacher(tmp_path):
    student = make_model("student", 0.9, 1.0, confusion=None)
    student["metrics"] = {"mse": 0.4, "pearson": 0.87}
    results = make_results(metric="pearson", models=[student], share_kept=None)
    page = render(tmp_path, results)
    assert "The student reaches 0.870 Pearson correlation." in page.text
    assert "Share of teacher kept" not in page.text
    assert "No confusion matrix" in page.text


@pytest.mark.parametrize("num_labels, is_matrix", [(20, True), (21, False)])
def test_many_classes_become_a_list_of_confused_pairs(tmp_path, num_labels, is_matrix):
    counts = [[30 if i == j else 0 for j in range(num_labels)] for i in range(num_labels)]
    counts[3][7] = 10
    names = [f"intent {i}" for i in range(num_labels)]
    models = [make_model("student", 0.9, 1.0, confusion=counts)]
    page = render(tmp_path, make_results(models=models, label_names=names))
    assert page.count("hit") == (num_labels + 1 if is_matrix else 0)
    if not is_matrix:
        assert "intent 3intent 71025.0 %" in page.text


def text_of(markup):
    return Page(markup).text


def test_headline_says_when_the_student_is_not_better():
    teacher = make_model("teacher", 0.8, 1.0)
    slower = make_model("student", 0.82, 0.5)
    results = {"metric": "accuracy", "models": [teacher, slower]}
    assert text_of(headline(results)) == (
        "The student reaches 102.5 % of its teacher’s accuracy "
        "with 2.0× more encoder parameters and runs 1.4× slower."
    )
    same = make_model("student", 0.8, 1.0, latency_ms={"batch": 8, "seq_len": 32, "median": 1.0})
    results = {"metric": "accuracy", "models": [teacher, same]}
    # Equal size, and latencies of different batches: neither makes a claim.
    assert text_of(headline(results)) == "The student keeps 100.0 % of its teacher’s accuracy."


def test_headline_takes_the_share_of_a_teacher_that_is_not_listed():
    models = [make_model("student", 0.8, 1.0)]
    results = {"metric": "accuracy", "models": models, "share_kept": 0.991}
    assert text_of(headline(results)) == "The student keeps 99.1 % of its teacher’s accuracy."


def test_a_lower_is_better_metric_is_not_a_share():
    models = [
        make_model(r, 0.9, s, metrics={"mse": m})
        for r, s, m in (("teacher", 1, 0.2), ("student", 8, 0.4))
    ]
    said = text_of(headline({"metric": "mse", "models": models}))
    assert said.startswith("The student reaches 0.400 mean squared error")


def test_compare_and_si():
    assert compare(8e6, 1e6, "fewer", "more") == "8.0×\u00a0fewer"
    assert compare(1e6, 8e6, "fewer", "more") == "8.0×\u00a0more"
    assert compare(100.0, 98.0, "faster", "slower") == "same"
    assert compare(None, 1.0, "fewer", "more") == compare(0.0, 1.0, "fewer", "more") == ""
    written = [si(v) for v in (22_713_986.0, 999_999.0, 870.0, 3.14159, 0.0581, 0.0, 2e-7)]
    assert [w.replace("\u00a0", " ") for w in written] == [
        *("22.7 M", "1.00 M", "870", "3.14", "0.0581", "0.00", "2.00e-07"),
    ]
    assert si(90_856_704.0, "B") == "90.9\u00a0MB"


def make_family():
    models = [make_model("teacher", 0.905, 1.0)]
    for role, gain in (("student", 0.02), ("baseline", 0.0)):
        models += [
            make_model(role, 0.86 + gain, 8.0, name="small"),
            make_model(role, 0.87 + gain, 2.0, name="<large>"),
            make_model(role, 0.85 + gain, 4.0, name="middle"),
        ]
    kept = {m["name"]: m["metrics"]["accuracy"] / 0.905 for m in models if m["role"] == "student"}
    return make_results(models=models, share_kept=kept)


def test_a_family_s_own_losses_are_no_parts_of_their_mean(tmp_path):
    names = [f"loss/{name}" for name in ("small", "<large>", "middle")]
    rows = [row | dict.fromkeys(names, row["loss"]) for row in train_rows()]
    page = render(tmp_path, make_family(), rows)
    assert "Loss, mean of the students" in page.text and "Loss of each student" in page.text
    keys = [a["class"] for tag, a in page.tags if tag == "i" and "key c" in a.get("class", "")]
    assert all(key.split()[1] in [f"c{i}" for i in range(7)] for key in keys)
    assert len(keys) == len([k for k in rows[0] if k.startswith("loss")])


def test_a_family_is_a_column_a_member_and_a_plot_of_score_and_cost(tmp_path):
    page = render(tmp_path, make_family())
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
    # From the small student over the large one to the teacher; the middle one is beaten.
    fronts = [a["d"] for tag, a in page.tags if a.get("class") == "front"]
    assert [front.count("H") for front in fronts] == [2, 2]
    assert "Accuracy against CPU latency" in page.text
    for model in (results := make_family())["models"]:
        model["latency_ms"]["batch"] = len(model["name"])
    page = render(tmp_path, results)
    assert page.count("front") == 1, "latencies of other conditions do not compare"


def test_one_student_has_no_plot_of_score_and_cost(tmp_path):
    assert render(tmp_path, make_results()).count("front") == 0


def test_the_front_holds_what_nothing_beats():
    points = [(1.0, 0.5), (1.0, 0.6), (2.0, 0.6), (3.0, 0.9), (4.0, 0.8)]
    assert pareto_front(points) == [(1.0, 0.6), (3.0, 0.9)]
    assert pareto_front(points, lower_is_better=True) == [(1.0, 0.5)]
    assert pareto_front([]) == []
