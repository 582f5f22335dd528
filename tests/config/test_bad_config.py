"""Wrong settings, or ones that do not fit: one message that helps, and no file touched."""

import fcntl
import shlex
from pathlib import Path

import numpy as np
import pytest
from bad_world import STAGE, STUDENT, TEXTS, World, change
from safetensors.numpy import load_file, save_file

from tinybert_jax.config import load as config_files
from tinybert_jax.runs.preflight import open_run

# The config


def test_misspelt_key(world):
    path = world.config("finetune", finetune={"learning_rat": 1})
    world.fails("run", path, naming=("finetune.learning_rat: unknown key", "'learning_rate'?"))


def test_key_given_twice(world):
    text = Path(world.config("finetune")).read_text() + "seed: 1\nseed: 2\n"
    path = world.file("config.yaml", text)
    world.fails("run", path, naming=("config.yaml", "'seed'", "twice", "line"))


def test_several_mistakes_are_listed_together(world):
    path = world.config("finetune", "baseline", baseline={"num_steps": 0}, seed="x", tusk={})
    named = ("4 errors", "baseline.num_steps", "seed", "tusk", "finetune.schedule", "'linear'?")
    world.fails("run", path, "finetune.schedule=lineer", naming=named)


def test_value_out_of_range(world):
    path = world.config("finetune", finetune={"warmup": 1.5})
    world.fails("run", path, naming=("finetune.warmup", "less than or equal to 1", "got 1.5"))


def test_override_without_equals_sign(world):
    path = world.config("finetune")
    world.fails("run", path, "seed", naming=("override 'seed'", "expected key.path=value"))


def test_text_that_yaml_reads_otherwise(world):
    """The message shows what to type; a `#` is no comment on the command line."""
    path = world.config("finetune")
    for value, typed in (("5", "'5'"), ("2020-01-01", "'2020-01-01'"), ("@x", "'@x'")):
        world.fails("run", path, f"task.text={value}", naming=(f'"task.text={typed}"',))
        tree = config_files.read_overrides([f"task.text={typed}"])
        assert tree == {"task": {"text": value}}
    world.fails("run", path, "task.text=a: b", naming=("\"task.text='…'\"",))
    for value in ("#1 String", "Item #1"):
        assert config_files.read_overrides([f"task.text={value}"])["task"]["text"] == value
    (word,) = shlex.split(config_files.in_quotes("task.text", "it's $5"))
    assert config_files.read_overrides([word]) == {"task": {"text": "it's $5"}}
    assert config_files.read_overrides(["a='x # y'", "b=[1, 2] # two"]) == {
        "a": "x # y",
        "b": [1, 2],
    }


def test_missing_config(world):
    world.config("finetune")
    path = str(world.folder / "confg.yaml")
    world.fails("run", path, naming=("confg.yaml", "found none", "config.yaml'?"))


@pytest.mark.parametrize("text", ["run_dir: [", "just words", b"name: \xff"])
def test_config_that_is_not_a_yaml_mapping(world, text):
    path = world.file("config.yaml", text)
    world.fails("run", path, naming=("config.yaml", "YAML" if text != "just words" else "mapping"))


def test_unset_environment_variables(world):
    task = {"train": "${NO_SUCH_A}/train.tsv", "dev": "${NO_SUCH_B}/dev.tsv"}
    path = world.config("finetune", task=task)
    named = ("task.train", "NO_SUCH_A", "task.dev", "NO_SUCH_B", "not set", "export")
    world.fails("run", path, naming=named)


def test_stage_that_the_config_has_not(world):
    path = world.config("finetune")
    world.fails("distill", path, naming=("['general', 'intermediate', 'prediction']", "finetune"))


def test_distillation_without_a_teacher_that_knows(world):
    path = world.distil(teacher={"path": None, "preset": "bert-tiny"}, tokenizer={"path": "x"})
    world.fails("run", path, naming=("teacher", "finetune section", "teacher.finetuned"))
    corpus = {"files": [world.file("corpus.txt", "\n\n".join(TEXTS))]}
    random = {"num_hidden_layers": 2, **{k: v for k, v in STUDENT.items() if "layers" not in k}}
    path = world.config("general", teacher={"path": None, **random}, corpus=corpus)
    named = ("general", "pretrain section", "teacher.path")
    world.fails("run", path, "tokenizer.vocab_size=60", naming=named)


def test_positions_of_a_model_that_brings_its_own(world):
    corpus = {"files": [world.file("corpus.txt", "\n\n".join(TEXTS))]}
    path = world.config("pretrain", corpus=corpus)
    named = ("pretrain.position_init", "teacher.path", "leave it out")
    world.fails("run", path, "pretrain.position_init=sinusoid", naming=named)


def test_preset_of_which_the_sizes_leave_nothing(world):
    path = world.distil(distillation={"preset": "tinybert"})
    named = ("student", "preset bert-tiny together with", "hidden_size", "set those to null")
    world.fails("run", path, "student.preset=bert-tiny", naming=named)


@pytest.mark.parametrize(
    "task",
    [
        {"kind": "classification", "labels": ["neg", "pos", "neg"]},
        {"kind": "multi_label", "label_columns": ["neg", "pos", "neg"]},
    ],
)
def test_labels_that_are_given_twice(world, task):
    path = world.config("finetune", task=task)
    world.fails("run", path, naming=("task", "every label once", "['neg'] more than once"))


def test_smoothing_of_labels_that_are_numbers(world):
    path = world.config("finetune", task={"kind": "regression"})
    named = ("finetune: a regression has no label_smoothing", "remove it")
    world.fails("run", path, "finetune.label_smoothing=0.1", naming=named)


def test_smoothing_of_answers(world):
    terms = {"prediction": [{"term": "label", "label_smoothing": 0.1}]}
    path = world.config("prediction", task={"kind": "question_answering"}, distillation=terms)
    named = ("distillation.prediction, label_smoothing: answers have no classes", "remove it")
    world.fails("run", path, naming=named)


def test_distillation_before_its_finetuning(world):
    """`tinybert distill` of a config whose teacher is still to be fine-tuned."""
    path = world.config("finetune", "prediction")
    named = ("prediction", "finished finetune", "found none", "tinybert finetune")
    world.fails("distill", path, naming=named)


def test_nothing_to_match(world):
    path = world.distil(distillation={"preset": "minilmv2"})
    named = ("minilmv2", "distillation.intermediate: expected a term", "remove the stage")
    world.fails("run", path, naming=named)


@pytest.mark.parametrize(
    "distillation, named",
    [
        ({"general": [{"term": "logits"}]}, ("no logits", "of prediction: move it there")),
        ({"intermediate": [{"term": "masked_lm"}]}, ("no masked_lm", "a term of general")),
        ({"prediction": [{"term": "word_logits"}]}, ("no word_logits", "a term of general")),
        ({"prediction": [{"term": "logit"}]}, ("prediction.0.term", "'logit'", "mean 'logits'")),
        ({"prediction": [{"term": "logits", "weight": 0}]}, ("weight above 0", "prediction")),
        ({"prediction": [{"term": "logits", "weight": -1}]}, ("prediction.0.weight:", "got -1")),
        ({"prediction": [{"term": "cls", "layer_map": "skp"}]}, ("0.layer_map:", "mean 'skip'")),
        ({"prediction": [{"term": "${UNSET_NAME}"}]}, ("UNSET_NAME", "not set")),
        ({"preset": "distilbert", "mask_rate": 0}, ("mask_rate", "more than 0", "got 0")),
        ({"mask_rate": 0.1}, ("mask_rate", "general", "leave mask_rate out")),
        (
            {"normalisation": "paper_code", "prediction": [{"term": "cosine"}]},
            ("paper_code", "['cosine']", "valid_only"),
        ),
        (
            {"prediction": [{"term": "attention", "heads": 2, "head_map": [[1, 1]]}]},
            ("heads 2", "[[1, 1]]", "leave one"),
        ),
    ],
)
def test_terms_that_do_not_fit_their_stage(world, distillation, named):
    path = world.config("prediction", distillation=distillation)
    world.fails("run", path, naming=("distillation", *named))


@pytest.mark.parametrize(
    "term, named",
    [
        ({"term": "relation", "heads": 3}, ("term relation", "divide", "hidden_size 8", "got 3")),
        ({"term": "pooled"}, ("term pooled", "as wide as", "8 and 16", "projection")),
        ({"term": "cosine"}, ("term cosine", "as wide as", "8 and 16", "projection")),
        ({"term": "hidden", "layer_map": [[1, 5]]}, ("term hidden", "layer_map", "[[1, 5]]")),
        ({"term": "cls"}, ("term cls", "layer_map", "two layers", "last")),
        ({"term": "attention", "head_map": [[1, 3]]}, ("head_map", "1 to 2", "[1, 3]")),
    ],
)
def test_terms_that_cannot_compare_the_models(world, term, named):
    path = world.distil(distillation={"prediction": [term, {"term": "logits"}]})
    world.fails("run", path, naming=("distillation.prediction", *named))


@pytest.mark.parametrize(
    "stage, changes, named",
    [
        ("general", {"teacher": "no pooler"}, ("trained weights of its pooler", "has none")),
        ("general", {"pretrain": STAGE}, ("trained pooler", "set pretrain.pair_weight")),
        ("general", {"corpus": {"stores": {"x": 1}}}, ("term pooled", "corpus.files")),
        ("intermediate", {"student": {"model_type": "distilbert"}}, ("distilbert", "be lost")),
        ("prediction", {"task": {"kind": "tagging"}}, ("whole texts", "tagging", "term cls")),
    ],
)
def test_the_term_pooled_needs_poolers(world, stage, changes, named):
    corpus = {"files": [world.file("corpus.txt", "\n\n".join(TEXTS))]}
    folder = world.model("encoder" if stage == "general" else "classifier")
    if changes.get("teacher"):
        tensors = load_file(folder / "model.safetensors")
        kept = {name: array for name, array in tensors.items() if "pooler" not in name}
        save_file(kept, folder / "model.safetensors")
    if "task" in changes:
        words = world.file("words.conll", "tea O\ntoast B-X\n\njam O\n")
        changes = {"task": {**changes["task"], "train": words, "dev": words}}
    path = world.config(
        stage,
        **{
            "corpus": corpus,
            **changes,
            "teacher": {"path": str(folder)},
            "student": {**STUDENT, "hidden_size": 16, **changes.get("student", {})},
            "distillation": {stage: [{"term": "pooled"}]},
        },
    )
    world.fails("run", path, naming=(f"distillation.{stage}", "pooled", *named))


# A family of students

OTHER = {**STUDENT, "hidden_size": 12}


def _family(world, stages=("intermediate", "prediction"), **changes):
    """Of two members that fit, but for what `changes` makes of the second."""
    second = {key: value for key, value in (OTHER | changes).items() if value is not None}
    return world.config(
        *stages,
        teacher={"path": str(world.models / "classifier")},
        student=None,
        students={"small": STUDENT, "other": second},
    )


def test_student_and_students(world):
    path = world.distil(students={"small": STUDENT})
    world.fails("run", path, naming=("student or students", "both", "small", "remove one"))


def test_no_students(world):
    path = world.distil(student=None)
    named = ("2 errors", "students: ", "at least 1 item", "seed: ")
    world.fails("run", path, "students={}", "seed=x", naming=named)


@pytest.mark.parametrize(
    "name, named",
    [
        ("a/b", ("letters, digits, - and _", "got 'a/b'")),
        ("..", ("letters, digits, - and _",)),
        ("1.5m", ("letters, digits, - and _",)),
        ("", ("letters, digits, - and _",)),
        ("small-seed-1", ("seed-<number>", "folder")),
        ("hidden_2", ("a part of the loss",)),
        ("Small", ("capitals",)),
    ],
)
def test_name_of_a_member(world, name, named):
    path = world.distil(student=None, students={"small": STUDENT, name: STUDENT})
    world.fails("run", path, naming=(f"students.{name}: expected", "choose another name", *named))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"hidden_siz": 4}, (".hidden_siz: unknown key", "'hidden_size'?")),
        ({"intermediate_size": None}, (": expected a path, a preset", "['intermediate_size']")),
        ({"hidden_size": 15}, (": ", "multiple of num_attention_heads", "15 and 2")),
        (
            {"num_attention_heads": 4},
            (": ", "attention heads", "4 for the student", "2 for the teacher"),
        ),
        ({"num_hidden_layers": 3}, (": ", "layer_map", "no deeper", "3 layers for 2")),
        ({"max_position_embeddings": 8}, (": ", "max_length", "at most 8", "got 16")),
        (
            {"hidden_size": 32, "init": "teacher_embeddings"},
            (".hidden_size: expected at most 16", "got 32", "students.other.init=random"),
        ),
    ],
)
def test_member_that_does_not_fit(world, changes, named):
    message = world.fails("run", _family(world, **changes), naming=("students.other", *named))
    assert "students.other" + named[0] in message
    assert "small" not in message


@pytest.mark.parametrize("folder", ["other_vocabulary", "damaged", "nowhere"])
def test_member_from_a_folder_that_does_not_fit(world, folder):
    """Another vocabulary; weights that are no finite numbers; none at all."""
    path = world.models / folder
    if folder == "damaged":
        path = world.model("classifier")
        name = "bert.encoder.layer.1.output.dense.weight"
        change(path, name, np.full((16, 32), np.nan, np.float32))
    changes = {**dict.fromkeys(STUDENT), "path": str(path)}
    for stages in (("intermediate", "prediction"), ("baseline",)):
        config = _family(world, stages, **changes)
        world.fails("run", config, naming=("students.other: ", str(path), "expected"))


def test_ignored_lowercase(world):
    path = world.config("finetune", tokenizer={"lowercase": False})
    world.fails("run", path, naming=("tokenizer.lowercase", "tokenizer.vocab_size", "leave it out"))


def test_ignored_student_start(world):
    student = {**dict.fromkeys(STUDENT), "path": "x", "init": "teacher_embeddings"}
    world.fails("run", world.distil(student=student), naming=("student", "init", "path 'x'"))


# Sizes that do not fit


def test_longer_than_the_positions(world):
    path = world.config("finetune", finetune={"max_length": 64})
    world.fails("run", path, naming=("finetune.max_length", "at most 32", "got 64"))


def test_batch_that_the_devices_cannot_share(world):
    path = world.config("finetune", finetune={"global_batch_size": 12})
    world.fails("run", path, naming=("finetune.global_batch_size", "multiple of 8", "got 12"))


def test_mesh_of_other_devices(world):
    path = world.config("finetune", mesh={"data": 3})
    world.fails("run", path, naming=("mesh", "8 devices", "3 × 1 × 1", "mesh.data=-1"))


def test_other_attention_heads(world):
    path = world.distil(student={"num_attention_heads": 4})
    named = ("attention heads", "4 for the student", "2 for the teacher", "a head_map")
    world.fails("run", path, naming=named)


@pytest.mark.parametrize(
    "depth, layer_map, named",
    [
        (3, "uniform", ("no deeper", "3 layers for 2")),
        (1, [3], ("1 teacher layers from 1 to 2", "[3]")),
        (1, [1, 2], ("1 teacher layers", "[1, 2]")),
    ],
)
def test_layer_map_that_does_not_fit(world, depth, layer_map, named):
    term = {"term": "hidden", "layer_map": layer_map}
    changes = {"student": {"num_hidden_layers": depth}, "distillation": {"intermediate": [term]}}
    world.fails("run", world.distil(**changes), naming=("layer_map", *named))


@pytest.mark.parametrize("size, most", [("max_position_embeddings", 32), ("hidden_size", 16)])
def test_student_tables_larger_than_the_teachers(world, size, most):
    student = {size: most * 2, "init": "teacher_embeddings"}
    named = (f"student.{size}", f"at most {most}", f"got {most * 2}", "student.init")
    world.fails("run", world.distil(student=student), naming=named)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"intermediate_size": 24}, ("student.intermediate_size", "expected 32", "got 24")),
        ({"hidden_size": 8}, ("student.hidden_size", "expected 16", "got 8")),
        ({"max_position_embeddings": 64}, ("student.max_position_embeddings", "at most 32")),
        ({"init_layers": [3]}, ("student.init_layers: expected 1 teacher layers", "[3]")),
        ({"num_hidden_layers": 3}, ("no deeper", "3 layers for 2")),
        ({"init": "random", "init_layers": "top"}, ("init_layers: expected", "got init random")),
    ],
)
def test_student_that_cannot_start_from_its_teachers_layers(world, changes, named):
    student = {"hidden_size": 16, "intermediate_size": 32, "init": "teacher_layers"} | changes
    world.fails("run", world.distil(student=student), naming=named)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"intermediate_size": 48}, ("student.intermediate_size", "at most 32", "got 48")),
        ({"init_layers": [3]}, ("student.init_layers: expected 1 teacher layers", "[3]")),
    ],
)
def test_student_that_cannot_be_reduced_from_its_teacher(world, changes, named):
    student = {"hidden_size": 8, "intermediate_size": 16, "init": "teacher_reduced"} | changes
    world.fails("run", world.distil(student=student), naming=named)


# The run folder


@pytest.fixture
def existing(world) -> World:
    settings = config_files.load(world.config("finetune"))
    with open_run(settings, settings.stages) as run:
        (run.folder / "models").mkdir()
        (run.folder / "models" / "weights").write_bytes(b"dear")
    return world


def test_run_folder_of_another_config(existing):
    path = existing.config("finetune", finetune={"learning_rate": 0.5}, seed=7)
    named = (str(existing.run_dir), "seed", "7", "finetune.learning_rate", "0.5", "0.001")
    message = existing.fails("run", path, naming=named)
    assert "num_steps" not in message


def test_run_folder_of_another_label_order(world):
    settings = config_files.load(
        world.config("finetune", task={"labels": {"neg": "neg", "pos": "pos"}})
    )
    with open_run(settings, settings.stages):
        pass
    path = world.config("finetune", task={"labels": {"pos": "pos", "neg": "neg"}})
    world.fails("run", path, naming=("run_dir", "task.labels", "order"))


def test_wrong_data_of_an_existing_run(existing):
    path = existing.config("finetune")
    existing.file("dev.tsv", "text\tlabel\nx\tgood\n")
    existing.fails("run", path, naming=("dev.tsv", "'good'"))


def test_foreign_files_in_the_run_folder(world):
    world.run_dir.mkdir()
    (world.run_dir / "thesis.txt").write_text("years of work")
    named = ("run_dir", str(world.run_dir), "an empty or new folder", "thesis.txt")
    world.fails("run", world.config("finetune"), naming=named)


def test_foreign_config_in_the_run_folder(world):
    world.run_dir.mkdir()
    (world.run_dir / "config.yaml").write_text("a: [")
    named = ("run_dir", str(world.run_dir), "a config.yaml that no run wrote", "rename the file")
    world.fails("run", world.config("finetune"), naming=named)
    (world.run_dir / "models").mkdir()
    world.fails("run", world.config("finetune"), naming=("run/config.yaml", "YAML"))


def test_run_folder_is_a_file(world):
    world.run_dir.write_text("years of work")
    world.fails("run", world.config("finetune"), naming=("run_dir", "folder", "a file"))


def test_run_folder_in_use(existing):
    path = existing.config("finetune")
    with (existing.run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        named = (str(existing.run_dir), "in use", "another process", "wait")
        existing.fails("run", path, naming=named)
