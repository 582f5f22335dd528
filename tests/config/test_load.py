import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tinybert_jax import cli
from tinybert_jax.config import load as config_files
from tinybert_jax.config.by_rows import TYPICAL
from tinybert_jax.config.data import PrepareConfig
from tinybert_jax.config.load import ConfigError
from tinybert_jax.config.stages import FINETUNE

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
MINIMAL = {
    "run_dir": "r",
    "teacher": {"preset": "bert-tiny"},
    "tokenizer": {"path": "t"},
    "task": {"train": "a.tsv", "dev": "b.tsv"},
    "finetune": {"num_epochs": 1, "learning_rate": 1e-4},
}


def _written(tmp_path, **changes):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    return file


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_say_how_to_run_them(path, monkeypatch):
    for name in ("TEACHER", "TINYBERT_DATA", "TEXT", "TOKENIZER"):
        monkeypatch.setenv(name, "somewhere")
    if path.parent.name == "data":
        assert config_files.load_as(PrepareConfig, path).sources
    else:
        assert config_files.load(path).stages
    assert "# Command:" in path.read_text()
    assert "# Expected:" in path.read_text()


def test_arms_are_valid(monkeypatch, tmp_path):
    for name in ("TEACHER", "TINYBERT_DATA", "TEXT"):
        monkeypatch.setenv(name, "somewhere")
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root / "benchmarks")
    arms, cells = importlib.import_module("arms"), importlib.import_module("cells")
    monkeypatch.setattr(cells, "split", lambda *args, **options: ([("a", "b")], [("c", "d")]))
    monkeypatch.setattr(cells, "further", lambda *args: [("e", "f")])
    for comparison in yaml.safe_load((root / "benchmarks" / "arms.yaml").read_text()).values():
        further = ["seed=3"] if "config" in comparison else ["seed=3", "finetune.eval_every=7"]
        teachers, others = arms.plan(comparison, tmp_path, further)
        folders = {str(teacher.folder / "models" / "finetune") for teacher in teachers}
        for arm in (*teachers, *others):
            config = config_files.load(root / arm.config, arm.settings, lambda draft: TYPICAL)
            assert config.stages and config.seed == 3
            if len(further) > 1 and config.finetune is not None:
                assert config.finetune.eval_every == 7
            if arm in others and teachers:
                assert config.teacher.finetuned in folders


def test_dump_loads_back_to_the_same_config(tmp_path):
    first = config_files.load(_written(tmp_path), ["seed=3", "task.labels={0: no, 1: yes}"])
    again = tmp_path / "again.yaml"
    again.write_text(config_files.dump(first))
    assert config_files.load(again) == first


STORES = {
    "corpus": {"stores": {"data/a": 3, "data/b": 1}, "heldout_store": "data/c"},
    "pretrain": {"num_steps": 10, "learning_rate": 1e-4, "max_length": 16},
}


@pytest.mark.parametrize("source", ["quickstart", "stores"])
def test_a_dumped_config_with_all_its_defaults_is_valid(tmp_path, source):
    """Settings that exclude one another may be there at their defaults, as they are in a dump."""
    path = next(path for path in CONFIGS if path.stem == "quickstart")
    first = config_files.load(_written(tmp_path, **STORES) if source == "stores" else path)
    again = tmp_path / "again.yaml"
    again.write_text(config_files.dump(first))
    assert config_files.load(again) == first
    assert config_files.differences(again, first) == []


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_config_that_tells_regression_instead_of_a_kind_is_the_same(tmp_path, kind):
    """As a run folder of version 0.1 has it: it loads, and the run goes on."""
    settings = config_files.load(_written(tmp_path), [f"task.kind={kind}"])
    assert settings.task.kind == kind
    tree = yaml.safe_load(config_files.dump(settings))
    del tree["task"]["kind"]
    tree["task"]["regression"] = kind == "regression"
    older = tmp_path / "older.yaml"
    older.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert config_files.load(older) == settings
    assert config_files.differences(older, settings) == []
    other = {"classification": "regression", "regression": "classification"}[kind]
    changed = config_files.load(_written(tmp_path), [f"task.kind={other}"])
    assert f"task.kind: '{kind}' there, '{other}' here" in config_files.differences(older, changed)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{regression: 3}", "regression: expected true or false, got 3"),
        ("{regression: true, kind: classification}", "expected kind regression or no regression"),
    ],
)
def test_a_wrong_regression_is_refused(tmp_path, given, message):
    files = {"train": "a.tsv", "dev": "b.tsv"}
    override = f"task={yaml.safe_dump(files | yaml.safe_load(given), default_flow_style=True)}"
    with pytest.raises(ConfigError, match=message):
        config_files.load(_written(tmp_path), [override])


@pytest.mark.parametrize("words", ["no yes", "off on", "No Yes", "N Y"])
def test_labels_may_be_words_that_older_yaml_takes_for_booleans(tmp_path, words):
    """In a file and in an override, as names and as raw values."""
    names = words.split()
    labels = f"{{0: {names[0]}, 1: {names[1]}}}"
    file = _written(tmp_path)
    plain = file.read_text()
    file.write_text(plain.replace("task:\n", f"task:\n  labels: {labels}\n"))
    by_file = config_files.load(file)
    assert by_file.task.labels == {"0": names[0], "1": names[1]}
    file.write_text(plain)
    assert config_files.load(file, [f"task.labels={labels}"]) == by_file
    as_list = config_files.load(file, [f"task.labels=[{', '.join(names)}]"])
    assert as_list.task.labels == tuple(names)
    again = tmp_path / "again.yaml"
    again.write_text(config_files.dump(by_file))
    assert config_files.load(again) == by_file


@pytest.mark.parametrize("labels", ["[true, false]", "{true: a, false: b}", "{0: false, 1: true}"])
def test_booleans_are_no_labels(tmp_path, labels):
    with pytest.raises(ConfigError, match="expected labels that are text or numbers, got .*True"):
        config_files.load(_written(tmp_path), [f"task.labels={labels}"])


def test_a_teacher_in_float8_has_activations_that_fused_attention_takes(tmp_path):
    settings = ["compute.dtype=bfloat16", "compute.attention=triton"]
    teacher = "compute.teacher_dtype"
    given = config_files.load(_written(tmp_path), [*settings, f"{teacher}=float8_products"])
    assert given.compute.frozen_dtype == "float8_products"
    with pytest.raises(ConfigError, match="expected compute.teacher_dtype bfloat16, got int8"):
        config_files.load(_written(tmp_path), [*settings, f"{teacher}=int8_products"])


def test_booleans_are_true_and_false(tmp_path):
    for word, expected in (("true", True), ("False", False), ("TRUE", True)):
        given = config_files.load(_written(tmp_path), [f"compute.unroll_layers={word}"])
        assert given.compute.unroll_layers is expected


def test_a_run_goes_on_though_its_config_is_older_than_a_setting(tmp_path):
    settings = config_files.load(_written(tmp_path))
    tree = yaml.safe_load(config_files.dump(settings))
    del tree["compute"]["attention"]
    older = tmp_path / "older.yaml"
    older.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert config_files.differences(older, settings) == []
    changed = config_files.load(_written(tmp_path), ["compute.attention=xla"])
    assert config_files.differences(older, changed) == [
        "compute.attention: 'auto' there, 'xla' here"
    ]


def test_overrides_set_remove_and_create(tmp_path):
    file = _written(tmp_path, baseline={"num_epochs": 1, "learning_rate": 1e-3})
    loaded = config_files.load(
        file,
        [
            "finetune.learning_rate=2e-5",
            "baseline=null",
            "student.preset=bert-mini",
            "finetune.num_epochs=null",
            "finetune.num_steps=7",
        ],
    )
    assert loaded.finetune.learning_rate == 2e-5
    assert loaded.finetune.num_steps == 7
    assert loaded.stages == (FINETUNE,)
    assert loaded.student.preset == "bert-mini"


def test_variables_are_those_of_the_file_after_its_overrides(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("# ${NOT_THIS}\nteacher: {path: '${A}'}\ntask: {train: '${B}/${A}'}\n")
    assert config_files.variables(path) == ["A", "B"]
    assert config_files.variables(path, ["teacher.path=x", "task.train=['${C}']"]) == ["C"]
    assert config_files.variables(tmp_path / "none.yaml") == []


def test_overrides_may_stand_on_both_sides_of_an_option(tmp_path, capsys):
    file = str(_written(tmp_path))
    assert cli.main(["run", file, "seed=3", "--print-config", "run_dir=x", "name=y"]) == 0
    loaded = yaml.safe_load(capsys.readouterr().out)
    assert [loaded[key] for key in ("seed", "run_dir", "name")] == [3, "x", "y"]
    for argv in (["run", file, "--print-confg", "seed=3"], ["convert", "a", "b", "c"]):
        with pytest.raises(SystemExit):
            cli.main(argv)
        assert "unrecognized arguments" in capsys.readouterr().err


def test_a_reader_who_stops_early_is_no_error(tmp_path):
    command = [sys.executable, "-m", "tinybert_jax", "run", _written(tmp_path), "--print-config"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == b""


def test_all_mistakes_at_once_with_paths_and_nearest_names(tmp_path):
    file = _written(tmp_path, finetune={"lerning_rate": 1, "num_epochs": 1}, sede=1)
    with pytest.raises(ConfigError) as caught:
        config_files.load(file, ["mesh.fsdp=0"])
    message = str(caught.value)
    assert "4 errors" in message
    assert "finetune.lerning_rate: unknown key; did you mean 'learning_rate'?" in message
    assert "sede: unknown key; did you mean 'seed'?" in message
    assert "finetune.learning_rate: expected a value" in message
    assert "mesh.fsdp" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("finetune.num_steps=3", "exactly one"),
        ("finetune.gradient_accumulation_steps=5", "multiple of gradient_accumulation_steps"),
        ("finetune.length_buckets=[16]", "max_length = 128"),
        ("teacher.path=somewhere", "either path or sizes"),
        ("task.metric=pearson", "task.metric: .*'matthews', got 'pearson'"),
        ("teacher.preset=bert-bass", "did you mean 'bert-base'"),
        (
            "student.num_layers=2",
            "student.num_layers: unknown key; did you mean 'num_hidden_layers'",
        ),
        ("pretrain={num_steps: 1, learning_rate: 1}", "need a corpus section"),
        ("general={num_steps: 1, learning_rate: 1}", "need a student section"),
        ("tokenizer.path=null", "expected a tokenizer"),
        ("finetune=null", "at least one stage"),
        ("task.unlabelled=rest", "'rest' needs max_train_rows"),
        ("task={builtin: true, text: body}", "has text and labels already"),
        (
            "general={num_steps: 1, learning_rate: 1, patience: 2}",
            "general is not evaluated",
        ),
        (
            "pretrain={num_steps: 1, learning_rate: 1, eval_every: 2}",
            "eval_every needs corpus.heldout_share",
        ),
        ("corpus={builtin: true, heldout_share: 1.0}", "corpus.heldout_share"),
        ("seed", "expected key.path=value"),
        ("run_dir.x=1", "expected a section at 'run_dir'"),
        ("task.train=${SURELY_NOT_SET_ANYWHERE}", "SURELY_NOT_SET_ANYWHERE, which is not set"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, override, expected):
    with pytest.raises(ConfigError, match=expected.replace("[", r"\[")):
        config_files.load(_written(tmp_path), [override])


def test_default_buckets_double_up_to_max_length(tmp_path):
    assert config_files.load(_written(tmp_path)).finetune.buckets() == (16, 32, 64, 128)
    shorter = config_files.load(_written(tmp_path), ["finetune.max_length=48"])
    assert shorter.finetune.buckets() == (16, 32, 48)


def test_a_value_that_is_no_list_or_mapping_is_shown_as_one(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: runs/a\ncorpus: {files: wiki.txt, stores: data/mine}\n")
    with pytest.raises(ConfigError) as caught:
        config_files.load(path)
    assert "corpus.files: expected a list, got 'wiki.txt'; write it as [wiki.txt]" in str(
        caught.value
    )
    assert "corpus.stores: expected a mapping, got 'data/mine'; write it as {name: value}" in str(
        caught.value
    )
