"""The recipe by_rows: what it fills in, what it leaves, and what it says."""

from pathlib import Path

import pytest
import yaml

from tinybert_jax.config import by_rows
from tinybert_jax.config import load as config_files
from tinybert_jax.config.by_rows import Facts, fill
from tinybert_jax.config.load import ConfigError
from tinybert_jax.performance import host
from tinybert_jax.recipes.by_rows import _fast_dtype
from tinybert_jax.settings.layer_maps import make_layer_pairs

TASK = {"train": "rows.tsv", "dev_share": 0.1}
TREE = {"run_dir": "out", "recipe": "by_rows", "teacher": {"path": "bert"}, "task": TASK}
SIZES = {"hidden_size": 384, "num_layers": 6, "num_heads": 12}


def _facts(num_labelled, num_unlabelled=0, **sizes):
    return Facts(num_labelled, num_unlabelled, **{**SIZES, **sizes})


def _load(tmp_path, facts, *overrides, **tree):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**TREE, **tree}, sort_keys=False))
    lines = []
    config = config_files.load(path, overrides, lambda draft: facts, lines.append)
    return config, lines


@pytest.mark.parametrize("num_labelled", [200, 800, 1000, 3000, 10_000, 150_000, 1_000_000])
def test_steps_fall_slowly_with_the_rows_and_never_below_what_a_stage_needs(tmp_path, num_labelled):
    config, _ = _load(tmp_path, _facts(num_labelled))
    rows = num_labelled * (1 - (config.task.select_share or 0))
    for stage in config.stages:
        section = getattr(config, stage.name)
        steps = section.num_epochs * rows / section.global_batch_size
        assert steps >= 150 and section.num_epochs == int(section.num_epochs)
        assert section.num_epochs <= 30 and (rows > 150_000) == (section.num_epochs == 1)
        assert section.global_batch_size == (16 if rows < 3000 else 32)
    assert (config.task.select_share is None) == (num_labelled < 2000)


def test_few_rows_are_evaluated_once_and_many_five_times(tmp_path):
    for num_labelled, times in ((300, 0), (5000, 5)):
        config, _ = _load(tmp_path, _facts(num_labelled))
        for section in (config.finetune, config.prediction, config.baseline):
            rows = num_labelled * (1 - (config.task.select_share or 0))
            steps = section.num_epochs * rows / section.global_batch_size
            assert steps // section.eval_every == times


def test_rates_follow_from_what_the_models_start_from(tmp_path):
    def settings(*overrides):
        config, lines = _load(tmp_path, _facts(3000), "student.hidden_size=192", *overrides)
        prediction = config.prediction
        assert config.finetune.head_init == "linear_probe" and config.baseline.head_init == "random"
        probe = prediction.head_init == "linear_probe"
        assert probe == any("prediction" in line and "linear probe" in line for line in lines)
        return probe, prediction.learning_rate, config.intermediate.learning_rate

    random = "student.init=random"
    assert settings() == (True, 5e-5, 1e-3)
    assert settings("prediction.head_init=random") == (False, 2e-4, 1e-3)
    assert settings(random) == (True, 3e-4, 5e-4)
    assert settings(random, "prediction.head_init=random") == (False, 3e-4, 5e-4)
    config, _ = _load(tmp_path, _facts(3000))
    assert config.prediction.dropout is None and config.intermediate.dropout == 0
    assert {getattr(config, stage.name).trained_words for stage in config.stages} == {"used"}


@pytest.mark.parametrize("setting", ["prediction=[{term: label}]", "keep_logits=false"])
def test_a_prediction_that_keeps_no_logits_starts_from_a_random_head(tmp_path, setting):
    config, _ = _load(tmp_path, _facts(3000), f"distillation.{setting}")
    assert config.prediction.head_init == "random" and config.prediction.learning_rate == 2e-4
    given = f"distillation.{setting}", "prediction.head_init=linear_probe"
    with pytest.raises(ConfigError, match="set prediction.head_init: random, or give"):
        _load(tmp_path, _facts(3000), *given)


def test_the_student_follows_the_teacher(tmp_path):
    config, lines = _load(tmp_path, _facts(3000))
    assert (config.student.hidden_size, config.student.num_hidden_layers) == (384, 3)
    assert config.student.init == "teacher_layers" and config.student.num_attention_heads == 12
    assert any("the teacher's layers, which are as wide" in line for line in lines)
    config, lines = _load(tmp_path, _facts(3000), "student.hidden_size=192")
    assert config.student.init == "teacher_reduced" and config.student.intermediate_size == 768
    assert any("3 layers × 192; it starts from the teacher's layers in" in line for line in lines)
    config, _ = _load(tmp_path, _facts(3000, hidden_size=768, num_layers=12))
    assert (config.student.hidden_size, config.student.num_hidden_layers) == (312, 4)
    assert config.finetune.learning_rate == 3e-5


def test_given_settings_stay_and_null_leaves_a_stage_out(tmp_path):
    given = ("finetune.learning_rate=1e-3", "prediction.num_steps=7", "baseline=null")
    config, lines = _load(tmp_path, _facts(3000), *given, "task.select_share=0.3")
    assert config.finetune.learning_rate == 1e-3 and config.finetune.batching == "pack"
    assert config.prediction.num_steps == 7 and config.prediction.num_epochs is None
    assert config.baseline is None and not any(line.startswith("recipe: base") for line in lines)
    assert config.task.select_share == 0.3
    config, _ = _load(tmp_path, _facts(3000), "teacher.finetuned=tuned")
    assert config.finetune is None
    config, lines = _load(tmp_path, _facts(3000), student={"path": "mine"})
    assert config.student.path == "mine" and config.student.hidden_size is None
    assert "recipe: student: it starts from the weights of mine" in lines
    assert config.prediction.learning_rate == 5e-5  # as for layers of the teacher
    small = {"preset": "tinybert-4l-312d", "init": "teacher_embeddings"}
    _, lines = _load(tmp_path, _facts(3000), student=small)
    told = "student: tinybert-4l-312d; it starts from the teacher's embeddings"
    assert f"recipe: {told}" in lines
    config, lines = _load(tmp_path, _facts(300), "finetune.num_epochs=100", "finetune.eval_every=5")
    assert config.finetune.eval_every == 5
    assert any(line.startswith("recipe: finetune: 100 epochs of 300 rows, ab") for line in lines)


@pytest.mark.parametrize("sizes", [(768, 6, 12), (1024, 24, 16), (256, 5, 4), (384, 12, 12)])
def test_the_student_fits_any_teacher(tmp_path, sizes):
    """Heads divide its width, and the even map of layers has as many layers for each."""
    hidden_size, num_layers, num_heads = sizes
    facts = Facts(3000, 0, hidden_size, num_layers, num_heads)
    student = _load(tmp_path, facts)[0].student
    assert student.hidden_size % student.num_attention_heads == 0
    assert student.num_attention_heads == num_heads
    make_layer_pairs("uniform", student.num_hidden_layers, num_layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "bert-base"}, "teacher: expected a section, got 'bert-base'"),
        ({"task": "rows.tsv"}, "task: expected a section, got 'rows.tsv'"),
        ({"task": {**TASK, "select_share": "a"}}, "select_share"),
        ({"finetune": {"num_epochs": "many"}}, "finetune.num_epochs"),
        ({"prediction": {"global_batch_size": "big"}}, "global_batch_size"),
        ({"prediction": {"num_epochs": float("inf")}}, "prediction.num_epochs"),
        ({"prediction": {"num_epochs": float("nan")}}, "prediction.num_epochs"),
        ({"student": {"hidden_size": "wide"}}, "student.hidden_size"),
    ],
)
def test_wrong_values_are_told_as_in_any_config(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, _facts(3000), **change)


def test_answers_are_looked_for_in_wide_windows_from_a_random_head(tmp_path):
    task = {"train": "squad.json", "dev_share": 0.1, "kind": "question_answering"}
    config, _ = _load(tmp_path, _facts(3000), "finetune.max_length=256", task=task)
    assert config.finetune.max_length == 256 and config.prediction.max_length == 384
    assert config.finetune.head_init == config.prediction.head_init == "random"
    refused = "finetune.head_init=linear_probe", "baseline.class_weights=balanced"
    for setting in (*refused, "finetune.label_smoothing=0.1"):
        with pytest.raises(ConfigError, match=setting.split("=")[0]):
            _load(tmp_path, _facts(3000), setting, task=task)


def test_null_is_as_if_it_were_not_given(tmp_path):
    given = "student.hidden_size=null", "students=null", "prediction.global_batch_size=null"
    config, _ = _load(tmp_path, _facts(3000), *given)
    assert config.prediction.global_batch_size == 16
    assert config.student.hidden_size == 384


def test_each_of_several_students_is_filled_in(tmp_path):
    students = {"wide": {}, "slim": {"hidden_size": 192}, "own": {"init": "random"}}
    config, lines = _load(tmp_path, _facts(3000), students=students)
    assert config.student is None
    starts = {name: student.init for name, student in config.students.items()}
    assert starts == {"wide": "teacher_layers", "slim": "teacher_reduced", "own": "random"}
    assert [student.hidden_size for student in config.students.values()] == [384, 192, 384]
    assert any(line.startswith("recipe: students.slim: 3 layers × 192") for line in lines)
    assert config.prediction.learning_rate == 3e-4


def test_unlabelled_text_counts_for_distillation_alone(tmp_path):
    task = {**TASK, "unlabelled": "more.tsv"}
    config, _ = _load(tmp_path, _facts(500, 100_000), task=task)
    assert (config.finetune.num_epochs, config.finetune.global_batch_size) == (13, 16)
    assert config.intermediate.num_epochs == config.prediction.num_epochs == 2
    assert config.prediction.global_batch_size == 32


def test_the_filled_config_is_plain_and_loads_again_to_itself(tmp_path):
    config, lines = _load(tmp_path, _facts(300))
    again = tmp_path / "again.yaml"
    again.write_text(config_files.dump(config))
    assert "recipe" not in yaml.safe_load(again.read_text())
    assert config_files.load(again) == config
    sections = ("task", "student", "finetune", "intermediate", "prediction", "baseline")
    assert [line.split(": ")[1] for line in lines] == list(sections)


def test_wrong_recipes_and_sections_are_refused_before_anything_is_read(tmp_path):
    def measured(draft):
        raise AssertionError("read")

    path = tmp_path / "run.yaml"
    for changes, message in (
        ({"recipe": "by_row"}, "recipe: expected 'by_rows' or none, got 'by_row'"),
        ({"finetune": 3}, "finetune: expected a section, got 3"),
        ({"students": {"a": 3}}, "students.a: expected a section, got 3"),
        ({"finetune": {"learning_rat": 1}}, "finetune.learning_rat: unknown key; did you mean"),
    ):
        path.write_text(yaml.safe_dump({**TREE, **changes}))
        with pytest.raises(ConfigError, match=message):
            config_files.load(path, (), measured)


def test_fill_changes_neither_its_input_nor_what_it_need_not():
    tree = {**TREE, "prediction": {"num_steps": 5}}
    before = yaml.safe_dump(tree)
    filled, _ = fill(tree, by_rows.TYPICAL)
    assert yaml.safe_dump(tree) == before
    assert filled["teacher"] == tree["teacher"] and "recipe" not in filled


def test_the_dtype_is_the_machine_s_fastest_where_none_is_given(tmp_path):
    config, lines = _load(tmp_path, _facts(3000))
    assert config.compute.dtype == "float32" and not any("compute" in line for line in lines)
    config, lines = _load(tmp_path, _facts(3000, fast_dtype="bfloat16_products"))
    assert config.compute.dtype == "bfloat16_products"
    assert "recipe: compute: bfloat16_products, which this machine computes fastest" in lines
    config, lines = _load(tmp_path, _facts(3000, fast_dtype="bfloat16"), "compute.dtype=float32")
    assert config.compute.dtype == "float32" and not any("compute" in line for line in lines)


def test_the_machine_s_dtype_is_measured(monkeypatch):
    has_flag = "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()
    assert host.multiplies_bfloat16() == has_flag
    for has_bfloat16, dtype in ((True, "bfloat16_products"), (False, "float32")):
        monkeypatch.setattr(host, "multiplies_bfloat16", lambda found=has_bfloat16: found)
        assert _fast_dtype("cpu") == dtype


def test_stages_are_no_longer_than_the_teacher_s_positions():
    tree = {"task": {"train": "a.csv"}, "finetune": {"max_length": 32}}
    filled, _ = fill(tree, _facts(500, num_positions=64))
    assert filled["finetune"]["max_length"] == 32
    assert {filled[name]["max_length"] for name in ("prediction", "baseline")} == {64}
    filled, _ = fill(tree, _facts(500, num_positions=512))
    assert "max_length" not in filled["prediction"]


def test_an_update_keeps_what_is_given_and_tells_it():
    section, line = by_rows.fill_update(900, 384, {"num_steps": 20, "learning_rate": 2e-5})
    assert section["num_steps"] == 20 and "num_epochs" not in section
    assert line == "update: 20 steps of 16 examples each; learning rate 2e-05"
    given = {"num_epochs": None, "global_batch_size": 8}
    section, line = by_rows.fill_update(900, 384, given)
    assert section["num_epochs"] == 8 and "of 8 examples each; learning rate 0.0001" in line
