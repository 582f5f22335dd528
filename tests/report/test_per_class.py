"""The table of scores per class: which models and numbers it shows, and when it is shown."""

import pytest
from report_page import Page, make_model, make_results, render

from tinybert_jax.report.per_class import per_class_section


def make_classes(f1, names=("PER", "<LOC>")):
    return [
        {"name": name, "precision": f1 + 0.05, "recall": f1 - 0.05, "f1": f1, "support": 1200 + i}
        for i, name in enumerate(names)
    ]


def make_scored_results(**more):
    title = {"per_class_title": "Scores per entity kind"}
    models = [
        make_model("teacher", 0.9, 1.0, per_class=make_classes(0.91), **title),
        make_model("student", 0.8, 8.0, per_class=make_classes(0.82), **title),
        make_model("baseline", 0.7, 8.0, per_class=make_classes(0.73), **title),
    ]
    return make_results(models=models, **more)


def cells_of(results):
    """The title, and the table as rows of cell texts."""
    title, markup = per_class_section(results)
    Page(markup)  # the tags are closed in order
    rows = markup.replace("<br>", " ").split("<tr>")[1:]
    return title, [[Page(f"<td>{cell}").text for cell in row_cells(row)] for row in rows]


def row_cells(row):
    """The markup of the cells, up to and with their closing tags."""
    cells = row.split("</tr>")[0].replace("</th>", "</td>").split("</td>")[:-1]
    return [cell[cell.index(">") + 1 :] + "</td>" for cell in cells]


def test_the_table_has_f1_of_all_models_and_precision_and_recall_of_the_student():
    title, rows = cells_of(make_scored_results())
    assert title == "Scores per entity kind"
    assert rows == [
        [
            *("Class", "Support", "Teacher F1", "Student F1", "Baseline F1"),
            *("Student precision", "Student recall"),
        ],
        ["PER", "1,200", "0.910", "0.820", "0.730", "0.870", "0.770"],
        ["<LOC>", "1,201", "0.910", "0.820", "0.730", "0.870", "0.770"],
    ]


def test_the_table_replaces_the_confusion_matrix(tmp_path):
    page = render(tmp_path, make_scored_results())
    assert "Scores per entity kind" in page.text and page.count("classes") == 1
    assert "onfusion matrix" not in page.text and page.count("heat") == 0
    page = render(tmp_path, make_results())
    assert "Confusion matrix of the student" in page.text and page.count("classes") == 0


def test_of_several_students_the_best_and_its_baseline_are_shown():
    results = make_scored_results()
    for model in results["models"][1:]:
        model["name"] = "small"
    results["models"] += [
        make_model("student", 0.85, 4.0, name="large", per_class=make_classes(0.86)),
        make_model("baseline", 0.65, 4.0, name="large", per_class=make_classes(0.66)),
    ]
    assert cells_of(results)[1][1][2:5] == ["0.910", "0.860", "0.660"]
    assert "The student is large, the best of the run." in per_class_section(results)[1]
    assert "The student is" not in per_class_section(make_scored_results())[1]


def test_without_a_student_precision_and_recall_are_those_of_the_first_model():
    results = make_scored_results()
    del results["models"][1:]
    assert cells_of(results)[1][:2] == [
        ["Class", "Support", "Teacher F1", "Teacher precision", "Teacher recall"],
        ["PER", "1,200", "0.910", "0.960", "0.860"],
    ]


def test_a_class_that_only_one_model_scores_is_shown():
    results = make_scored_results()
    results["models"][0]["per_class"] = make_classes(0.5, names=("ORG",))
    rows = cells_of(results)[1]
    assert [row[0] for row in rows[1:]] == ["PER", "<LOC>", "ORG"]
    assert rows[1][2] == "–"
    assert rows[3] == ["ORG", "–", "0.500", "–", "–", "–", "–"]


@pytest.mark.parametrize(
    "per_class", [None, 3, [], "PER", [3], [{}], [{"f1": 0.5}], {"name": "PER"}]
)
def test_models_without_readable_classes_have_no_table(per_class):
    results = make_results(models=[make_model("student", 0.8, 1.0, per_class=per_class)])
    assert per_class_section(results) is None


def test_missing_scores_and_a_missing_title_are_filled_in():
    classes = [{"name": 7, "f1": float("nan"), "support": "many"}, {"name": "PER", "f1": 1.7}]
    title, rows = cells_of(make_results(models=[make_model("student", 1, 1.0, per_class=classes)]))
    assert title == "Scores per class"
    assert rows[1:] == [["7", "–", "–", "–", "–"], ["PER", "–", "1.700", "–", "–"]]


def test_the_title_and_the_names_are_escaped(tmp_path):
    evil = "<script>alert('x')</script>\"&"
    results = make_scored_results()
    results["models"][1]["per_class_title"] = evil
    results["models"][1]["per_class"][0]["name"] = evil
    page = render(tmp_path, results)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) == 2
