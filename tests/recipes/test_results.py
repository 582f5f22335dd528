"""results.json of a run whose checkpoints are chosen on rows of train: every figure again."""

import json

import numpy as np
import pytest
from tiny_inputs import STAGE, STUDENT, TEACHER, write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.config.tasks import ClassificationTask
from tinybert_jax.data.splits import read_task
from tinybert_jax.inference.predict import evaluate_file, predict
from tinybert_jax.metrics.intervals import interval
from tinybert_jax.tasks.classification import CLASSIFICATION

pytestmark = pytest.mark.usefixtures("cheap_programs")

JUDGED = {**STAGE, "global_batch_size": 16, "eval_every": 10}
WORDS = {"pos": ["fine", "jam"], "neg": ["dull", "sea"]}


def _write_rows(file, num_rows, seed):
    """Texts of one word of a class and a number of others; a tenth have the other label."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        label, other = ("pos", "neg") if rng.random() < 0.5 else ("neg", "pos")
        words = [*rng.choice(["tea", "toast", "film", "and", "with"], 5), rng.choice(WORDS[label])]
        rows.append(
            f"{' '.join(rng.permutation(words))}\t{other if rng.random() < 0.1 else label}\n"
        )
    file.write_text("text\tlabel\n" + "".join(rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory, cheap_programs):
    """A student that hardly moves, and a baseline that learns: export=best takes the baseline."""
    folder = tmp_path_factory.mktemp("run")
    write_inputs(folder, **TEACHER)
    _write_rows(folder / "train.tsv", 240, 0)
    _write_rows(folder / "dev.tsv", 80, 1)
    config = write_config(
        folder / "run.yaml",
        folder,
        folder / "out",
        task={
            "train": str(folder / "train.tsv"),
            "dev": str(folder / "dev.tsv"),
            "select_share": 0.25,
        },
        student=STUDENT,
        num_seeds=2,
        export="best",
        finetune={**JUDGED, "num_seeds": 2, "num_steps": 60},
        prediction={**JUDGED, "num_steps": 10, "learning_rate": 1e-9},
        baseline={**JUDGED, "num_steps": 150, "learning_rate": 3e-2, "dropout": 0.0},
    )
    assert cli.main(["run", config]) == 0
    return folder


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run / "out" / "results.json").read_text())


def _model(results, role):
    return next(model for model in results["models"] if model["role"] == role)


def test_scores_are_of_dev_and_the_best_seed_is_of_the_rows_that_choose(run, results):
    section = ClassificationTask(
        train=str(run / "train.tsv"), dev=str(run / "dev.tsv"), select_share=0.25
    )
    data = read_task(section, CLASSIFICATION.read)
    assert results["select_examples"] == len(data.select.text) and results["dev_examples"] == 80
    lines = zip(data.select.text, data.select.labels, strict=True)
    (run / "select.tsv").write_text(
        "text\tlabel\n" + "".join(f"{text}\t{data.label_names[i]}\n" for text, i in lines)
    )
    models = run / "out" / "models"
    for role, stage, seeds in (
        ("teacher", "finetune", ("-seed-0", "-seed-1")),
        ("student", "prediction", ("", "-seed-1")),
        ("baseline", "baseline", ("", "-seed-1")),
    ):
        folders = [str(models / f"{stage}{seed}") for seed in seeds]
        model = _model(results, role)
        for folder, own in zip(folders, model["by_seed"], strict=True):
            found = evaluate_file(folder, str(run / "dev.tsv"))
            assert {name: found[name] for name in own} == pytest.approx(own)
        chosen = [evaluate_file(f, str(run / "select.tsv"))["accuracy"] for f in folders]
        assert model["best_seed"] == int(np.argmax(chosen))
        assert model["selection_score"] == pytest.approx(max(chosen))
    rows = [json.loads(line) for line in (run / "out" / "metrics.jsonl").read_text().splitlines()]
    evals = [row for row in rows if row["kind"] == "eval" and row["stage"] == "baseline"]
    scores, learnt = [row["accuracy"] for row in evals], results["stages"]["baseline"]
    assert learnt["score"] == scores[-1] and learnt["num_evals"] == len(evals) == 15
    assert learnt["tail_score"] == scores[11]  # of step 120 of 150
    assert learnt["best_step"] == 10 * (1 + int(np.argmax(scores)))


def test_results_say_where_the_rows_are_from_and_how_long_they_were(results):
    assert results["data"] == {"train": "train.tsv", "dev": "dev.tsv"}
    assert results["max_length"]["prediction"] == JUDGED["max_length"]


def test_intervals_and_comparisons_are_those_of_the_scores(results):
    metric = results["metric"]
    values = {}
    for model in results["models"]:
        low, high = model["intervals"][metric]
        values[model["role"]] = model["metrics"][metric]
        assert 0 <= low <= values[model["role"]] <= high <= 1 and high - low < 0.35
    (compared,) = results["comparisons"].values()
    for other in ("teacher", "baseline", "linear"):
        difference = values["student"] - values[other]
        assert compared[other]["difference"] == pytest.approx(difference)
        low, high = compared[other]["interval"]
        assert low <= difference <= high
    assert values["linear"] > 0.8 and values["baseline"] > values["student"]


def test_kept_resamples_give_the_intervals_again(run, results):
    """So the difference of models of two runs on the same rows has the interval of one run."""
    kept = json.loads((run / "out" / "resamples.json").read_text())
    drawn = {model["role"]: np.array(model["values"]) for model in kept["models"]}
    for model in results["models"]:
        expected = model["intervals"][kept["metric"]]
        assert interval(drawn[model["role"]]) == pytest.approx(expected)
    (compared,) = results["comparisons"].values()
    expected = compared["teacher"]["interval"]
    assert interval(drawn["student"] - drawn["teacher"]) == pytest.approx(expected)
    inputs = json.loads((run / "out" / "inputs.json").read_text())
    assert kept["dev"] == inputs["data"]["task.dev"] and "resamples" not in results


def test_the_better_model_is_exported_and_the_advice_says_why(run, results):
    seed = ("", "-seed-1")[_model(results, "baseline")["best_seed"]]
    exported, baseline = (
        (run / "out" / name / "model.safetensors").read_bytes()
        for name in ("hf", f"models/baseline{seed}")
    )
    assert exported == baseline
    assert any("the same student without a teacher" in line for line in results["advice"])
    assert not any(_model(results, role)["has_equal_seeds"] for role in ("teacher", "baseline"))
    assert _model(results, "student")["start"] == "random" and not results["unlabelled_examples"]
    assert results["train_examples"] == 180 and "builtin" not in results["data"]
    page = (run / "out" / "report.html").read_text()
    assert "What to do next" in page and "without a teacher, which reaches" in page


def test_texts_that_differ_are_those_whose_answers_differ(run, results):
    held = results["differing"]
    answers = []
    for role, stage in (("teacher", "finetune"), ("student", "prediction")):
        seed = _model(results, role)["best_seed"]
        ends = ("-seed-0", "-seed-1") if role == "teacher" else ("", "-seed-1")
        folder = run / "out" / "models" / f"{stage}{ends[seed]}"
        answers.append(predict(str(folder), str(run / "dev.tsv")))
    lines = [line.split("\t") for line in (run / "dev.tsv").read_text().splitlines()[1:]]
    differing = [
        {"text": text, "label": label, "teacher": one["label"], "student": two["label"]}
        for (text, label), one, two in zip(lines, *answers, strict=True)
        if one["label"] != two["label"]
    ]
    assert held["num_texts"] == len(differing) > 0
    assert held["num_teacher_right"] == sum(row["teacher"] == row["label"] for row in differing)
    assert all(row in differing for row in held["texts"])
    first = held["texts"][0]
    assert first["teacher"] == first["label"] != first["student"]
