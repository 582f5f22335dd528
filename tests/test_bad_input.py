"""Whatever is wrong with an input: status 2, one message that helps, and no file touched."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from tinybert_jax import cli, config
from tinybert_jax.convert import hf_files
from tinybert_jax.data.vocab import train_wordpiece
from tinybert_jax.model.heads import make_classifier, make_encoder
from tinybert_jax.run import open_run
from tinybert_jax.sections import ModelConfig

TEXTS = ["a fine film", "a dull film", "tea and toast", "toast and jam and more tea"] * 3
LABELS = ["neg", "pos"] * 6
STAGE = {"num_steps": 1, "global_batch_size": 8, "max_length": 16, "learning_rate": 1e-3}
STUDENT = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Tiny BERT folders, never changed: `classifier` (always answers neg), `encoder` and others."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_wordpiece(TEXTS, vocab_size=60)
    sizes = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    params = make_classifier(sizes, 2)[1](jax.random.key(0))
    params["classifier"] = jax.tree.map(np.zeros_like, params["classifier"])
    names = ("neg", "pos")
    hf_files.save_model(folder / "classifier", params, sizes, tokenizer, label_names=names)
    hf_files.save_model(folder / "encoder", params["encoder"], sizes, tokenizer)
    wider = sizes.model_copy(update={"hidden_size": 24})
    init = make_classifier(wider, 2)[1]
    hf_files.save_model(
        folder / "wider", init(jax.random.key(0)), wider, tokenizer, label_names=names
    )
    # As many pieces, but others.
    other = train_wordpiece([text.replace("m", "x") for text in TEXTS], vocab_size=60)
    sizes = sizes.model_copy(update={"vocab_size": len(other)})
    init = make_encoder(sizes)[1]
    hf_files.save_model(folder / "other_vocabulary", init(jax.random.key(0)), sizes, other)
    return folder


class World:
    """A folder with data, configs and copies of models, and the command run in it."""

    def __init__(self, folder: Path, models: Path, capfd):
        self.folder, self.models, self.capfd = folder, models, capfd
        self.run_dir = folder / "run"
        self.train = self.table("train.tsv")
        self.dev = self.table("dev.tsv")

    def table(self, name: str, texts=TEXTS, labels=LABELS, header="text\tlabel") -> str:
        rows = [f"{text}\t{label}" for text, label in zip(texts, labels, strict=True)]
        return self.file(name, "\n".join([header, *rows]) + "\n")

    def file(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def model(self, name: str, **settings) -> Path:
        """A copy that a test may spoil; `settings` go into its config.json, None removes."""
        copy = self.folder / f"{name}-copy"
        copy.mkdir()
        for file in (self.models / name).iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        raw = json.loads((copy / "config.json").read_text()) | settings
        raw = {key: value for key, value in raw.items() if value is not None}
        (copy / "config.json").write_text(json.dumps(raw))
        return copy

    def config(self, *stages: str, **sections) -> str:
        """A config that is right but for what `sections` changes, one mapping each."""
        tree = {
            "run_dir": str(self.run_dir),
            "teacher": {"path": str(self.models / "encoder")},
            "task": {"train": self.train, "dev": self.dev},
            **{stage: dict(STAGE) for stage in stages},
        }
        if set(stages) - {"finetune", "pretrain"}:
            tree["student"] = dict(STUDENT)
        for name, value in sections.items():
            changes_section = isinstance(value, dict) and isinstance(tree.get(name), dict)
            tree[name] = {**tree[name], **value} if changes_section else value
        return self.file("config.yaml", yaml.safe_dump(tree, sort_keys=False))

    def distil(self, **sections) -> str:
        """A distillation from a teacher that already knows the task."""
        teacher = {"teacher": {"path": str(self.models / "classifier")}}
        return self.config("intermediate", "prediction", **{**teacher, **sections})

    def fails(self, *argv: str, naming: tuple[str, ...]) -> str:
        """Runs the command; checks status, message and that no file came, went or changed."""
        before = self.content()
        self.capfd.readouterr()
        try:
            status = cli.main(argv)
        except SystemExit as exit:  # argparse's own way
            status = exit.code
        message = self.capfd.readouterr().err
        assert status == 2
        assert "Traceback" not in message
        assert message.startswith("tinybert: ") and message.count("tinybert: ") == 1
        for part in naming:
            assert part in message
        assert self.content() == before
        return message

    def content(self) -> dict[Path, bytes | None]:
        return {p: p.read_bytes() if p.is_file() else None for p in self.folder.rglob("*")}


@pytest.fixture
def world(tmp_path, models, capfd) -> World:
    return World(tmp_path, models, capfd)


def test_the_inputs_are_right_where_nothing_is_spoilt(world):
    """What follows fails for the reason it states, not because of the set-up."""
    margin = {"distillation": {"teacher_margin": 0.0}}
    for path in (world.config("finetune", "baseline"), world.distil(**margin)):
        settings = config.load(path)
        other = settings.model_copy(update={"run_dir": str(world.run_dir / Path(path).stem)})
        with open_run(other, other.stages) as run:
            assert run.task.label_names == ("neg", "pos")


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
    named = ("4 mistakes", "baseline.num_steps", "seed", "tusk", "finetune.schedule", "'linear'?")
    world.fails("run", path, "finetune.schedule=lineer", naming=named)


def test_value_out_of_range(world):
    path = world.config("finetune", finetune={"warmup": 1.5})
    world.fails("run", path, naming=("finetune.warmup", "less than or equal to 1", "got 1.5"))


def test_override_without_equals_sign(world):
    path = world.config("finetune")
    world.fails("run", path, "seed", naming=("override 'seed'", "expected key.path=value"))


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
        ({"term": "cosine"}, ("term cosine", "as wide as", "8 and 16", "projection")),
        ({"term": "hidden", "layer_map": [[1, 5]]}, ("term hidden", "layer_map", "[[1, 5]]")),
        ({"term": "cls"}, ("term cls", "layer_map", "two layers", "last")),
        ({"term": "attention", "head_map": [[1, 3]]}, ("head_map", "1 to 2", "[1, 3]")),
    ],
)
def test_terms_that_cannot_compare_the_models(world, term, named):
    path = world.distil(distillation={"prediction": [term, {"term": "logits"}]})
    world.fails("run", path, naming=("distillation.prediction", *named))


def test_ignored_lowercase(world):
    path = world.config("finetune", tokenizer={"lowercase": False})
    world.fails("run", path, naming=("tokenizer.lowercase", "tokenizer.vocab_size", "leave it out"))


def test_ignored_student_start(world):
    student = {**dict.fromkeys(STUDENT), "path": "x", "init": "teacher_embeddings"}
    world.fails("run", world.distil(student=student), naming=("student", "init", "path 'x'"))


# The data


def test_missing_data(world):
    path = world.config("finetune", task={"train": world.train.replace("train", "trian")})
    world.fails("run", path, naming=("trian.tsv", "nothing", "did you mean 'train.tsv'?"))


@pytest.mark.parametrize(
    "content, named",
    [
        ("", ("an empty file",)),
        ("text\tlabel\n", ("only a header",)),
        ("sentence\tlabel\nx\tneg\n", ("a column 'text'", "columns 'sentence', 'label'")),
        ("text\tlabel\nx\tneg\ny\tgood\n", ("'neg', 'pos'", "line 3: 'good'", "`labels`")),
        ("text\tlabel\nx\tneg\ny\t\n", ("a label", "line 3: none", "fill in")),
        ("text\tlabel\nx\tneg\n\tpos\n", ("text in column 'text'", "line 3: ''", "fill in")),
        ("text\tlabel\nx\tneg\ny\tz\tpos\n", ("2 columns in every row", "line 3: 3", "tabs")),
        (b"text\tlabel\nx\tneg\n\xe9\tpos\n", ("UTF-8", "line 3: 0xe9", "iconv")),
    ],
    ids=["empty", "header", "column", "label", "no_label", "no_text", "ragged", "encoding"],
)
def test_wrong_dev_set(world, content, named):
    path = world.config("finetune", task={"dev": world.file("dev.tsv", content)})
    world.fails("run", path, naming=("dev.tsv", "expected", "got", "fix", *named))


def test_broken_json_line(world):
    rows = [json.dumps({"text": t, "label": y}) for t, y in zip(TEXTS, LABELS, strict=True)]
    train = world.file("train.jsonl", "\n".join([rows[0], rows[1][:-1], *rows[2:]]))
    path = world.config("finetune", task={"train": train})
    world.fails("run", path, naming=("train.jsonl", "one JSON object on every line", "line 2"))


def test_label_out_of_range(world):
    train = world.table("ids.tsv", labels=["0", "1", "2"] * 4)
    path = world.config("finetune", task={"train": train, "labels": {0: "neg", 1: "pos"}})
    world.fails("run", path, naming=("ids.tsv", "labels '0', '1'", "line 4: '2'", "`labels`"))


def test_a_single_class(world):
    train = world.table("one.tsv", labels=["neg"] * len(TEXTS))
    path = world.config("finetune", task={"train": train})
    world.fails("run", path, naming=("one.tsv", "at least 2 labels", "['neg']"))


def test_corpus_without_words(world):
    corpus = {"files": [world.file("corpus.txt", "a\n\nb\n")]}
    path = world.config("pretrain", corpus=corpus)
    world.fails("run", path, naming=("corpus", "expected", "2 documents"))


# Sizes that do not fit


def test_longer_than_the_positions(world):
    path = world.config("finetune", finetune={"max_length": 64})
    world.fails("run", path, naming=("finetune.max_length", "at most 32", "got 64"))


def test_batch_that_the_devices_cannot_share(world):
    path = world.config("finetune", finetune={"global_batch_size": 12})
    world.fails("run", path, naming=("finetune.global_batch_size", "multiple of 8", "got 12"))


def test_mesh_of_other_devices(world):
    path = world.config("finetune", mesh={"data": 3})
    world.fails("run", path, naming=("mesh", "8 devices", "3 × 1 × 1", "data: -1"))


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


# Vocabularies


def test_tokenizer_larger_than_the_table(world):
    large = world.folder / "large"
    text = [f"{a}{b} {a}{b}" for a in "abcdefghijkl" for b in "mnopqrst"]
    train_wordpiece(text, vocab_size=300).save_pretrained(str(large))
    path = world.config("finetune", tokenizer={"path": str(large)})
    named = ("vocabulary", "the teacher's table", "tokenizer that belongs to the teacher")
    world.fails("run", path, naming=named)


def test_student_of_another_vocabulary(world):
    path = world.models / "other_vocabulary"
    student = {**dict.fromkeys(STUDENT), "path": str(path)}
    named = ("vocabulary", str(path), "tokenizer")
    world.fails("run", world.distil(student=student), naming=named)
    world.fails("run", world.config("baseline", student=student), naming=named)


def test_folder_whose_tokenizer_is_larger_than_its_table(world):
    folder = world.model("classifier")
    pieces = json.loads((folder / "tokenizer.json").read_text())
    pieces["model"]["vocab"] |= {f"new{i}": 60 + i for i in range(100)}
    (folder / "tokenizer.json").write_text(json.dumps(pieces))
    world.fails("predict", str(folder), "-t", "x", naming=("vocabulary", "pieces", "tokenizer"))


# Teachers


@pytest.mark.parametrize(
    "names, named",
    [
        (["pos", "neg"], ("the teacher's order ['pos', 'neg']", "['neg', 'pos']", "task.labels")),
        (["a", "b", "c"], ("['a', 'b', 'c']", "['neg', 'pos']", "finetune section")),
    ],
    ids=["order", "number"],
)
def test_teacher_of_other_labels(world, names, named):
    folder = world.model("classifier", id2label={str(i): name for i, name in enumerate(names)})
    if len(names) == 3:
        _change(folder, "classifier.weight", np.zeros((3, 16), np.float32))
        _change(folder, "classifier.bias", np.zeros(3, np.float32))
    path = world.distil(teacher={"path": str(folder)})
    world.fails("run", path, naming=("labels", *named))


def test_start_of_another_number_of_labels(world):
    folder = world.model("classifier", id2label={"0": "a", "1": "b", "2": "c"})
    _change(folder, "classifier.weight", np.zeros((3, 16), np.float32))
    _change(folder, "classifier.bias", np.zeros(3, np.float32))
    path = world.config("finetune", teacher={"path": str(folder)})
    world.fails("run", path, naming=("head with 2 labels", "got one with 3", "'a', 'b', 'c'"))


def test_teacher_without_a_head(world):
    path = world.distil(teacher={"path": str(world.models / "encoder")})
    world.fails("run", path, naming=("encoder", "classifier", "finetune section"))


def test_finetuned_teacher_of_other_sizes(world):
    teacher = {"path": str(world.models / "encoder"), "finetuned": str(world.models / "wider")}
    named = ("teacher.finetuned", "hidden_size", "16", "24")
    world.fails("run", world.distil(teacher=teacher), naming=named)


def test_teacher_near_chance(world):
    teacher = {
        "path": str(world.models / "encoder"),
        "finetuned": str(world.models / "classifier"),
    }
    named = ("teacher", "at least 0.5200", "got 0.5000", "label order", "teacher_margin")
    world.fails("run", world.distil(), naming=named)
    world.fails("run", world.distil(teacher=teacher), naming=named)


def test_finetuned_teacher_near_chance(world):
    """It stays, the student is not begun, and asking again changes nothing."""
    margin = {"distillation": {"teacher_margin": 0.5}}
    path = world.config("finetune", "prediction", finetune={"learning_rate": 1e-9}, **margin)
    assert cli.main(["run", path]) == 2
    assert sorted(p.name for p in (world.run_dir / "models").iterdir()) == ["finetune"]
    assert sorted(p.name for p in (world.run_dir / "checkpoints").iterdir()) == ["finetune"]
    world.fails("run", path, naming=("teacher", "at least 1.0000", "models/finetune"))


# Model folders


@pytest.mark.parametrize("stage", ["finetune", "pretrain", "prediction"])
def test_weights_that_are_not_finite(world, stage):
    folder = world.model("classifier")
    name = "bert.encoder.layer.1.output.dense.weight"
    _change(folder, name, np.full((16, 32), np.nan, np.float32))
    corpus = {"files": [world.file("corpus.txt", "\n\n".join(TEXTS))]}
    path = world.config(stage, teacher={"path": str(folder)}, corpus=corpus)
    world.fails("run", path, naming=(str(folder), name, "finite", "NaN"))
    target = str(world.folder / "target")
    world.fails("convert", str(folder), target, naming=(str(folder), name, "finite"))


def test_pretraining_from_an_untied_decoder(world):
    folder = world.model("encoder")
    name = "cls.predictions.decoder.weight"
    table = load_file(folder / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    _change(folder, name, table + 1)
    corpus = {"files": [world.file("corpus.txt", "\n\n".join(TEXTS))]}
    path = world.config("pretrain", teacher={"path": str(folder)}, corpus=corpus)
    world.fails("run", path, naming=(str(folder), name, "word_embeddings"))


def test_weights_of_other_sizes(world):
    folder = world.model("encoder", intermediate_size=64)
    path = world.config("finetune", teacher={"path": str(folder)})
    world.fails("run", path, naming=(str(folder), "[64, 16]", "[32, 16]", "config.json"))


def test_weights_that_lack_a_layer(world):
    folder = world.model("encoder", num_hidden_layers=3)
    path = world.config("finetune", teacher={"path": str(folder)})
    world.fails("run", path, naming=(str(folder), "encoder.layer.2", "lacks"))


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_weights(world, keep):
    folder = world.model("encoder")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    named = ("model.safetensors", "expected a whole safetensors file", "copy it again")
    world.fails("run", world.config("finetune", teacher={"path": str(folder)}), naming=named)
    world.fails("convert", str(folder), str(world.folder / "target"), naming=named)


def test_only_a_pickle(world):
    folder = world.model("encoder")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    named = (str(folder), "model.safetensors", "pytorch_model.bin", "save_pretrained")
    world.fails("run", world.config("finetune", teacher={"path": str(folder)}), naming=named)


def test_no_tokenizer(world):
    folder = world.model("classifier")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    named = (str(folder), "tokenizer.json or vocab.txt", "copy")
    world.fails("run", world.config("finetune", teacher={"path": str(folder)}), naming=named)
    world.fails("predict", str(folder), "-t", "a film", naming=named)


def test_broken_tokenizer(world):
    folder = world.model("classifier")
    (folder / "tokenizer.json").write_text('{"model": ')
    named = (str(folder), "tokenizer", "expected", "copy")
    world.fails("run", world.config("finetune", teacher={"path": str(folder)}), naming=named)


def test_tokenizer_without_bert_tokens(world):
    folder = world.model("classifier")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps({k: v for k, v in settings.items() if not k.endswith("_token")}))
    named = (str(folder), "tokenizer", "cls_token", "expected")
    world.fails("run", world.config("finetune", teacher={"path": str(folder)}), naming=named)


@pytest.mark.parametrize(
    "setting, named",
    [
        ({"model_type": "roberta"}, ("model_type 'bert'", "'roberta'")),
        (
            {"position_embedding_type": "relative_key"},
            ("position_embedding_type", "'absolute'", "relative_key"),
        ),
        ({"is_decoder": True}, ("is_decoder",)),
        ({"hidden_act": "silu"}, ("hidden_act", "gelu", "'silu'")),
        ({"num_attention_heads": 3}, ("config.json", "multiple of num_attention_heads", "16")),
        ({"id2label": {"a": "neg"}}, ("id2label", "ids from 0 on", "'a'")),
        ({"id2label": ["neg", "pos"]}, ("id2label", "ids from 0 on", "['neg', 'pos']")),
        (
            {"id2label": {"0": "a", "1": "b", "2": "c"}},
            ("one label name for each", "2 outputs", "has 3", "'c'"),
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_json_that_is_not_ours(world, setting, named):
    folder = world.model("classifier", **setting)
    path = world.config("finetune", teacher={"path": str(folder)})
    world.fails("run", path, naming=(str(folder), "expected", *named))


def test_folder_that_is_not_there(world):
    path = world.config("finetune", teacher={"path": str(world.folder / "gone")})
    world.fails("run", path, naming=("gone", "expected", "model folder"))


# The run folder


@pytest.fixture
def existing(world) -> World:
    settings = config.load(world.config("finetune"))
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
    settings = config.load(world.config("finetune", task={"labels": {"neg": "neg", "pos": "pos"}}))
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


# predict, evaluate, convert


def test_predict_wants_one_source(world):
    model = str(world.models / "classifier")
    named = ("a data file or --sentence",)
    out = ("-o", str(world.folder / "out.jsonl"))
    world.fails("predict", model, world.dev, "-t", "x", *out, naming=(*named, "both"))
    world.fails("predict", model, *out, naming=(*named, "neither"))


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_no_head(world, command):
    named = (str(world.models / "encoder"), "classification head", "found none", "fine-tune")
    world.fails(command, str(world.models / "encoder"), world.dev, naming=named)


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize("length, named", [("33", "at most 32"), ("0", "at least 4")])
def test_impossible_max_length(world, command, length, named):
    argv = (command, str(world.models / "classifier"), world.dev, "--max-length", length)
    world.fails(*argv, naming=("max_length", named, f"got {length}"))


def test_multi_label_head(world):
    folder = world.model("classifier", problem_type="multi_label_classification")
    named = (str(folder), "one label or one number", "multi_label_classification")
    world.fails("predict", str(folder), "-t", "x", naming=named)


@pytest.mark.parametrize("output, named", [("no/such/out", "a folder"), ("", "a file")])
def test_output_that_cannot_be_written(world, output, named):
    argv = ("predict", str(world.models / "classifier"), "-t", "x", "-o")
    world.fails(*argv, str(world.folder / output), naming=("--output", named))


@pytest.mark.parametrize("option", ["--text", "--label", "--text-pair"])
def test_evaluate_on_a_wrong_column(world, option):
    argv = ("evaluate", str(world.models / "classifier"), world.dev, option, "txt")
    world.fails(*argv, naming=("dev.tsv", "a column 'txt'", "columns 'text', 'label'"))


def test_evaluate_on_unknown_labels(world):
    data = world.table("data.tsv", labels=["good", "bad"] * 6)
    argv = ("evaluate", str(world.models / "classifier"), data)
    world.fails(*argv, naming=("data.tsv", "'neg', 'pos'", "line 2: 'good'"))


def test_output_over_the_data(world):
    argv = ("predict", str(world.models / "classifier"), world.dev, "-o", world.dev)
    world.fails(*argv, naming=("--output", "another file than the data", "dev.tsv"))


def test_empty_sentence(world):
    argv = ("predict", str(world.models / "classifier"), "-t", "tea", "-t", " ")
    world.fails(*argv, naming=("text in every sentence", "number 2"))


def test_convert_to_what_exists(world):
    target = world.folder / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    argv = ("convert", str(world.models / "encoder"), str(target))
    world.fails(*argv, naming=(str(target), "does not exist yet", "nothing is replaced"))


def test_convert_of_what_would_be_lost(world):
    folder = world.model("encoder")
    _change(folder, "bert.adapter.weight", np.ones((2, 2), np.float32))
    argv = ("convert", str(folder), str(world.folder / "target"))
    world.fails(*argv, naming=(str(folder), "bert.adapter.weight", "nothing was written"))


# As a process


@pytest.mark.parametrize("mistake", ["config", "arguments"])
def test_exit_status_of_the_process(world, mistake):
    path = world.config("finetune", sede=1)
    argv = ["run", path] if mistake == "config" else ["run", path, "--sede"]
    before = world.content()
    done = subprocess.run(
        [sys.executable, "-m", "tinybert_jax", *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "sede" in done.stderr and "Traceback" not in done.stderr
    assert world.content() == before


def _change(folder: Path, name: str, array: np.ndarray) -> None:
    file = folder / "model.safetensors"
    tensors = {**load_file(file), name: array}
    save_file(tensors, file, metadata={"format": "pt"})
