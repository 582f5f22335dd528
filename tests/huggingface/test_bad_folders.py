"""Models and tokenizers that are wrong: one message that helps, and no file touched."""

import json

import numpy as np
import pytest
from bad_world import STUDENT, TEXTS, change
from safetensors.numpy import load_file

from tinybert_jax import cli
from tinybert_jax.data.wordpiece import train_wordpiece

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
        change(folder, "classifier.weight", np.zeros((3, 16), np.float32))
        change(folder, "classifier.bias", np.zeros(3, np.float32))
    path = world.distil(teacher={"path": str(folder)})
    world.fails("run", path, naming=("labels", *named))


def test_a_teacher_without_names_of_labels_is_told(world):
    folder = world.model("classifier", id2label={"0": "LABEL_0", "1": "LABEL_1"})
    path = world.distil(teacher={"path": str(folder)}, distillation={"teacher_margin": -1})
    assert cli.main(["run", path, "--dry-run"]) == 0
    told = "its outputs have no names, and are taken for 'neg', 'pos'; task.labels sets another"
    assert told in world.capfd.readouterr().out


def test_a_finetune_section_mends_a_teacher_of_other_labels(world):
    folder = world.model("classifier", id2label={"0": "a", "1": "b", "2": "c"})
    change(folder, "classifier.weight", np.zeros((3, 16), np.float32))
    change(folder, "classifier.bias", np.zeros(3, np.float32))
    path = world.config("finetune", teacher={"path": str(folder)})
    assert cli.main(["finetune", path]) == 0
    assert "with a new head in place of its own" in world.capfd.readouterr().out


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
    named = (
        "teacher",
        "at least 0.5200",
        "learnt nothing has 0.5000",
        "order of its labels",
        "teacher_margin",
    )
    world.fails("run", world.distil(), naming=named, with_status=3)
    world.fails("run", world.distil(teacher=teacher), naming=named, with_status=3)


def test_finetuned_teacher_near_chance(world):
    """It stays, the student is not begun, and asking again changes nothing."""
    margin = {"distillation": {"teacher_margin": 0.5}}
    path = world.config("finetune", "prediction", finetune={"learning_rate": 1e-9}, **margin)
    assert cli.main(["run", path]) == 3
    assert sorted(p.name for p in (world.run_dir / "models").iterdir()) == ["finetune"]
    assert sorted(p.name for p in (world.run_dir / "checkpoints").iterdir()) == ["finetune"]
    named = ("teacher", "at least 1.0000", "models/finetune", "teacher_margin=-1")
    world.fails("run", path, naming=named, with_status=3)
    assert cli.main(["run", path, "distillation.teacher_margin=-1"]) == 0  # goes on in the folder
    assert (world.run_dir / "models" / "prediction").is_dir()


# Model folders


@pytest.mark.parametrize("stage", ["finetune", "pretrain", "prediction"])
def test_weights_that_are_not_finite(world, stage):
    folder = world.model("classifier")
    name = "bert.encoder.layer.1.output.dense.weight"
    change(folder, name, np.full((16, 32), np.nan, np.float32))
    corpus = {"files": [world.file("corpus.txt", "\n\n".join(TEXTS))]}
    path = world.config(stage, teacher={"path": str(folder)}, corpus=corpus)
    world.fails("run", path, naming=(str(folder), name, "finite", "NaN"))
    target = str(world.folder / "target")
    world.fails("convert", str(folder), target, naming=(str(folder), name, "finite"))


def test_pretraining_from_an_untied_decoder(world):
    folder = world.model("encoder")
    name = "cls.predictions.decoder.weight"
    table = load_file(folder / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    change(folder, name, table + 1)
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
    world.fails("run", path, naming=(str(folder), "encoder.layer.2", "a folder without"))


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_weights(world, keep):
    folder = world.model("encoder")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    named = ("model.safetensors", "expected a complete safetensors file", "copy it again")
    world.fails("run", world.config("finetune", teacher={"path": str(folder)}), naming=named)
    world.fails("convert", str(folder), str(world.folder / "target"), naming=named)


def test_quantised_weights(world):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    folder = world.model("encoder")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "query.weight" in name)
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file)
    named = ("model.safetensors", "floats from 16 bits", "F8_E4M3 in 1 tensors", "not quantised")
    world.fails("run", world.config("finetune", teacher={"path": str(folder)}), naming=named)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_files(world, content):
    folder = world.model("encoder")
    (folder / "model.safetensors.index.json").write_text(content)
    named = ("model.safetensors.index.json", "the file of every tensor", "copy the folder again")
    world.fails("run", world.config("finetune", teacher={"path": str(folder)}), naming=named)


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
            ("2 label names", "one per output", "got 3", "'c'"),
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


def test_the_folder_of_a_run_names_its_models(world):
    run = world.folder / "run"
    for name in ("small", "small/1_Pooling", "large"):
        (run / "hf" / name).mkdir(parents=True)
        (run / "hf" / name / "config.json").write_text("{}")
    named = ("got that of a run", str(run / "hf" / "large"), str(run / "hf" / "small"))
    assert "1_Pooling" not in world.fails("predict", str(run), "-t", "x", naming=named)
