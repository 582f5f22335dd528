"""Advice: each line in a run that deserves it, and none in one that does not."""

import copy

import pytest
from report_page import make_results, render

from tinybert_jax.report.advice import advice
from tinybert_jax.report.console import console_summary


def _results():
    """A run about which there is nothing to say."""
    results = make_results()
    for model in results["models"]:
        score = model["metrics"]["accuracy"]
        model["intervals"] = {"accuracy": [score - 0.02, score + 0.02]}
    return results | {
        "comparisons": {
            "student-model": {
                "teacher": {"difference": -0.02, "interval": [-0.03, -0.01]},
                "baseline": {"difference": 0.024, "interval": [0.01, 0.04]},
                "linear": {"difference": 0.1, "interval": [0.08, 0.12]},
                "gap_closed": {"value": 0.545, "interval": [0.2, 0.8]},
            }
        },
        "stages": {
            name: {
                "num_epochs": 3.0,
                "num_steps": None,
                "step": 600,
                "best_step": 600,
                "score": 0.905,
                "tail_score": 0.9,
                "last_loss": 0.2,
            }
            for name in ("finetune", "prediction")
        },
    }


def test_a_run_without_reason_has_no_advice(tmp_path):
    assert advice(_results()) == []
    assert advice(make_results()) == []  # of a version that stored no comparisons
    assert "What to do next" not in render(tmp_path, _results()).text


def _change(results, path, value):
    *path, last = path.split("/")
    for key in path:
        results = results[key]
    results[last] = value


STAGE, COMPARED = "stages/{}", "comparisons/student-model/{}"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"stages/finetune/last_loss": 0.6},
            ("hardly learnt", "ended at 0.60", "guessing has 0.69", "finetune.num_epochs=6"),
        ),
        (
            {"stages/finetune/tail_score": 0.85},
            ("the teacher was still learning", "0.850 to 0.905", "finetune.num_epochs=6"),
        ),
        (
            {"stages/prediction/tail_score": 0.85},
            ("the student was still learning", "600 steps", "prediction.num_epochs=6"),
        ),
        (
            {
                "stages/finetune/tail_score": 0.85,
                "stages/finetune/num_epochs": None,
                "stages/finetune/num_steps": 600,
            },
            ("still learning", "finetune.num_steps=1200"),
        ),
        (
            {
                "comparisons/student-model/baseline": {
                    "difference": -0.168,
                    "interval": [-0.2, -0.14],
                }
            },
            ("lower than the same student", "-16.8 points [-20.0, -14.0]", "export=best"),
        ),
        (
            {
                "comparisons/student-model/baseline": {
                    "difference": 0.01,
                    "interval": [-0.01, 0.03],
                }
            },
            ("not clearly higher than", "+1.0 points [-1.0, +3.0]"),
        ),
        (
            {
                "comparisons/student-model/linear": {
                    "difference": -0.01,
                    "interval": [-0.03, 0.01],
                }
            },
            ("not clearly higher than TF-IDF", "-1.0 points [-3.0, +1.0]"),
        ),
        (
            {
                "comparisons/student-model/linear": {
                    "difference": -0.39,
                    "interval": [-0.43, -0.35],
                }
            },
            ("TF-IDF with a linear model scores higher", "39.0 points [+35.0, +43.0]"),
        ),
    ],
)
def test_each_line_in_the_run_that_deserves_it(changes, told):
    results = copy.deepcopy(_results())
    for path, value in changes.items():
        _change(results, path, value)
    (line,) = advice(results)
    assert all(words in line for words in told), line


def test_builtin_text_has_a_line_of_its_own_in_place_of_all_others():
    results = _results() | {"dev_examples": 100, "data": {"builtin": True}}
    results["models"][1]["intervals"]["accuracy"] = [0.82, 0.94]
    (line,) = advice(results)
    assert line.startswith("built-in text shows that the pipeline works, not what distillation")


def test_seeds_that_all_give_the_same_are_told():
    results = _results()
    results["models"][1]["by_seed"] = [{"accuracy": 0.885}, {"accuracy": 0.885}]
    results["models"][1]["deviation"] = {"accuracy": 0.0}
    assert advice(results) == []  # scores on a few rows may be equal by chance
    results["models"][1]["has_equal_seeds"] = True
    (line,) = advice(results)
    assert "the 2 seeds of student-model gave the same weights" in line and "num_seeds=1" in line


def test_few_rows_tell_how_many_are_wanted():
    results = _results()
    results["dev_examples"] = 100
    results["models"][1]["intervals"]["accuracy"] = [0.82, 0.94]
    results["train_examples"] = 9000
    (line,) = advice(results)
    assert "100 dev rows" in line and "± 6.0 points" in line and "900 rows: raise task.dev" in line
    results["train_examples"] = 900  # of which they would leave next to none
    assert "900 rows: give task.dev a larger file" in advice(results)[0]


def test_bleu_is_in_points_already():
    results = _results() | {"metric": "bleu", "dev_examples": 1000}
    results["comparisons"]["student-model"]["baseline"] = {
        "difference": -0.5,
        "interval": [-1.25, 0.25],
    }
    for model in results["models"]:
        model["metrics"] = {"bleu": 38.0}
        model["intervals"] = {"bleu": [36.5, 39.5]}
    (line,) = advice(results)
    assert "(-0.5 points [-1.2, +0.2])" in line
    results["models"][1]["intervals"]["bleu"] = [34.0, 42.0]
    assert "± 4.0 points); ± 2 points take about 4,000 rows" in advice(results)[-1]


def test_a_rise_is_held_against_the_error_of_the_rows_that_choose():
    """A fifth of the rows has more than twice the error: the same rise is not more than it."""
    results = _results()
    results["stages"]["finetune"]["tail_score"] = 0.89
    assert len(advice(results)) == 1
    assert advice(results | {"select_examples": 170}) == []
    for model in results["models"]:  # all right, in every resample
        model["intervals"]["accuracy"] = [1.0, 1.0]
    assert advice(results) == []


def test_export_best_is_not_advised_to_those_who_have_it():
    results = _results() | {"export": "best"}
    results["comparisons"]["student-model"]["baseline"] = {
        "difference": -0.1,
        "interval": [-0.2, -0.05],
    }
    (line,) = advice(results)
    assert "export=best" not in line


def test_best_before_the_end_is_not_still_learning():
    results = _results()
    results["stages"]["finetune"] |= {"tail_score": 0.85, "best_step": 500}
    assert advice(results) == []


def test_metrics_that_are_better_when_lower_have_no_advice():
    assert advice(_results() | {"metric": "mse"}) == []


def test_the_headline_says_where_a_student_is_not_ahead_of_itself(tmp_path):
    results = _results()
    results["comparisons"]["student-model"]["baseline"]["interval"] = [-0.01, 0.05]
    page = render(tmp_path, results | {"advice": advice(results)})
    assert (
        "reaches 0.885 accuracy and is not clearly ahead of the same student without" in page.text
    )
    assert "a difference of +2.4 points, 95 % interval [-1.0, +5.0]." in page.text
    assert "distillation adds" not in page.text and "keeps 97.8 % of its teacher" not in page.text
    assert "What to do next" in page.text and "not clearly higher" in page.text


def test_a_clear_loss_to_the_student_without_a_teacher_is_called_one(tmp_path):
    results = _results()
    lost = {"difference": -0.03, "interval": [-0.05, -0.01]}
    results["comparisons"]["student-model"]["baseline"] = lost
    results["models"][2]["metrics"]["accuracy"] = 0.915
    text = render(tmp_path, results).text
    assert (
        "reaches 0.885 accuracy and is behind the same student without a teacher, which reaches "
        "0.915." in text
    )
    assert "distillation costs 3.0 points, 95 % interval [-5.0, -1.0]." in text
    assert "not clearly ahead" not in text and "a difference of" not in text


def test_where_the_teacher_is_not_ahead_either_no_longer_run_is_advised():
    results = _results()
    compared = results["comparisons"]["student-model"]
    compared["baseline"]["interval"] = [-0.01, 0.05]
    for closed in ({"value": 1.3, "interval": None}, None):
        compared["gap_closed"] = closed
        (line,) = advice(results)
        assert "do not tell what distillation brings" in line and "for longer" not in line


def test_advice_gives_nothing_that_the_run_has():
    results = _results()
    results["comparisons"]["student-model"]["baseline"]["interval"] = [-0.01, 0.05]
    (line,) = advice(results)
    assert "start the student from the teacher's layers" in line and "give task.unlabelled" in line
    results["models"][1]["start"], results["unlabelled_examples"] = "teacher_layers", 6000
    (line,) = advice(results)
    assert "start the student" not in line and "give more task.unlabelled text" in line


def test_the_table_shows_intervals_and_the_gap_closed(tmp_path):
    page = render(tmp_path, _results() | {"select_examples": 100})
    for expected in ("[0.865, 0.905]", "Gap closed", "54.5 %", "chosen on 100 rows"):
        assert expected in page.text, expected


def test_bars_of_scores_and_shares_are_as_long_as_the_number(tmp_path):
    results = _results()
    results["comparisons"]["student-model"]["gap_closed"] = {"value": 1.37, "interval": [0.9, 1.8]}
    page = render(tmp_path, results)
    bars = [a for tag, a in page.tags if tag == "i" and a.get("class", "").startswith("bar ")]
    widths = [bar["style"] for bar in bars if "--" not in bar["style"]]
    scores, kept, gap = widths[:6], widths[6:9], widths[9]
    assert scores[:3] == ["width:90.5%", "width:88.5%", "width:86.1%"]
    assert kept == ["width:100.0%", "width:97.8%", "width:95.1%"]
    assert gap == "width:100.0%" and "137.0 %" in page.text


GAP_REASONS = {
    "lead": "the teacher’s lead over the student without a teacher may be chance",
    "width": "its interval is wider than 200 points",
    "none": "no interval is recorded",
}


def test_a_page_of_one_model_has_no_bars_to_explain(tmp_path):
    results = _results()
    assert "A whole bar is" in render(tmp_path, results).text
    text = render(tmp_path, results | {"models": results["models"][1:2]}).text
    assert "Measured on 872" in text and "A whole bar" not in text


@pytest.mark.parametrize(
    "bounds, reason",
    [(None, "lead"), ([-5.0, 9.0], "width"), ([-0.5, 1.6], "width"), ("missing", "none")],
)
def test_a_gap_closed_that_chance_may_make_is_a_dash_with_the_reason(tmp_path, bounds, reason):
    results = _results()
    closed = results["comparisons"]["student-model"]["gap_closed"]
    closed |= {"value": 1.37, "interval": bounds}
    if bounds == "missing":
        del closed["interval"]
    page = render(tmp_path, results)
    assert "137" not in page.text
    titles = [a["title"] for tag, a in page.tags if tag == "td" and "title" in a]
    for name, words in GAP_REASONS.items():
        assert (words in titles) == (name == reason)
        assert (f"Gap closed, –: {words}." in page.text) == (name == reason)
    assert "closes" not in console_summary(results)


def test_the_console_says_how_much_of_a_clear_gap_is_closed():
    assert "keeps 97.8% of its teacher and closes 55% [20%, 80%]" in console_summary(_results())


def test_the_console_says_what_its_numbers_are():
    first = console_summary(_results()).splitlines()[0]
    assert first.startswith(
        "accuracy on 872 dev rows, with its 95% interval; parameters of the layers"
    )
    assert first.endswith("milliseconds for a text of 32 tokens")


def _updated(new):
    """Results of an update; the numbers of the new rows are (both, fixed, broken, neither)."""
    old = {"both": 200, "fixed": 7, "broken": 5, "neither": 30}
    new = dict(zip(old, new, strict=True))
    sides = {"old": old | {"broken_bound": 0.043, "mcnemar_p": 0.77}}
    sides["new"] = new | {"broken_bound": 0.15, "mcnemar_p": 0.5}
    update = {"old": "<old>", "dev": sides, "reasons": [], "broken": []}
    return make_results(update=update, models=[], share_kept={})


def test_an_update_that_learnt_nothing_is_told():
    stages = {"stages": {"update": {"num_epochs": 5.0}}}
    (line,) = advice(_updated((6, 1, 2, 9)) | stages)
    assert "7 of 18, and 8 before" in line and "update.num_epochs=10" in line
    assert len(advice(_updated((7, 0, 0, 9)))) == 1
    assert advice(_updated((6, 3, 2, 9))) == [] == advice(_updated((18, 0, 0, 0)))


def test_an_update_tells_what_was_right_before_and_after(tmp_path):
    results = _updated((6, 3, 1, 9))
    told = console_summary(results)
    assert (
        "gate: new rows of dev: of 19 the old model has 7 right and the new one 9; 3 fixed, 1 "
        "broken (at most 15.00% with 95 % confidence); McNemar p = 0.5" in told
    )
    page = render(tmp_path, results).text
    assert "has 9 of 19 new rows right, 7 before, and breaks 5 of 242 old ones." in page
    assert "242 old205207754.30%0.77" in page and "19 new793115.00%0.5" in page
    chance = "passed; what it gains on new rows may be chance (p = 0.5)"
    assert f"The gate: {chance}. Right before: by <old>; right after: by the new" in page
    assert f"gate: {chance}" in told
    limited = _updated((6, 3, 1, 9))
    limited["update"] |= {"max_regressions": 0.05}
    limited["update"]["dev"]["new"]["mcnemar_p"] = 0.01
    assert console_summary(limited).endswith("gate: passed, as at most 5.00% may be broken")


def test_a_student_that_is_no_better_than_one_answer_is_told(tmp_path):
    results = _results() | {"floor": 0.87}
    (line,) = advice(results)
    assert "not clearly higher than always giving the most frequent answer" in line
    assert "0.870: it has hardly learnt the task" in line
    page = render(tmp_path, results).text
    assert "The student reaches 0.885 accuracy, not clearly above the 0.870 of always" in page
    assert advice(_results() | {"floor": 0.86}) == []
