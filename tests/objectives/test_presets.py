"""Every preset but tinybert through the stages that it has, as a user runs them."""

import json

import pytest
import yaml
from safetensors.numpy import load_file
from tiny_inputs import write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.huggingface.folder import read_model, save_model

SIZES = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 32}
STAGE = {"num_steps": 4, "global_batch_size": 8, "max_length": 16, "learning_rate": 1e-3}
STAGES = {
    "minilmv2": ("general", "prediction"),
    "distilbert": ("general", "prediction"),
    "pkd": ("prediction",),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, cheap_programs):
    """A folder with text and a teacher that has a masked-LM head, not one of the task."""
    folder = tmp_path_factory.mktemp("inputs")
    params, sizes, tokenizer = write_inputs(folder, **SIZES)
    save_model(folder / "encoder", params["encoder"], sizes, tokenizer)
    return folder


def _config(inputs, tmp_path, preset, stages, **changes):
    return write_config(
        tmp_path / "run.yaml",
        inputs,
        tmp_path / "run",
        **{
            "student": {**SIZES, "num_attention_heads": 2},
            "distillation": {"preset": preset, "teacher_margin": 0.0},
            **{stage: dict(STAGE) for stage in stages},
            **changes,
        },
    )


@pytest.mark.parametrize("preset", STAGES)
def test_a_preset_runs_from_end_to_end(inputs, tmp_path, preset):
    """With a teacher of the task where it reads one; two seeds; masked where it predicts words."""
    finetune = {"finetune": {**STAGE, "num_steps": 40, "learning_rate": 5e-3}}
    learns = preset == "pkd"
    config = _config(
        inputs, tmp_path, preset, STAGES[preset], num_seeds=2, **(finetune if learns else {})
    )
    assert cli.main(["run", config]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    train = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    terms = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["distillation"]
    metric = {"logits": "soft"}
    for stage in STAGES[preset]:
        parts = {f"loss/{metric.get(t['term'], t['term'])}" for t in terms[stage]}
        rows = [row for row in train if row["stage"] == stage]
        assert rows and all(parts <= row.keys() for row in rows)
    saved = read_model(tmp_path / "run" / "hf")
    assert saved.config.num_hidden_layers == 2 and saved.label_names == ("neg", "pos")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {m["role"] for m in results["models"]} == (
        {"teacher", "student", "linear"} if learns else {"student", "linear"}
    )


def test_a_teacher_of_random_weights_that_pretraining_makes_can_be_read_for_words(inputs, tmp_path):
    teacher = {"teacher": {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 16}}
    config = _config(
        inputs,
        tmp_path,
        "distilbert",
        ("pretrain", "general", "prediction"),
        tokenizer={"path": str(inputs / "teacher")},
        **teacher,
    )
    for command in ("pretrain", "distill"):
        assert cli.main([command, config]) == 0
    assert (tmp_path / "run" / "models" / "prediction" / "config.json").is_file()


@pytest.mark.parametrize("finetune", [{}, {"finetune": STAGE}])
def test_a_teacher_without_a_head_for_words_is_refused_at_the_start(
    inputs, tmp_path, capsys, finetune
):
    teacher = {"path": str(inputs / "encoder")}
    config = _config(
        inputs, tmp_path, "distilbert", ("general", "prediction"), teacher=teacher, **finetune
    )
    assert cli.main(["run", config]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("transform", "masked-LM head", "distillation.general"))
    assert not (tmp_path / "run").exists()


def test_a_projection_is_handed_on_past_a_stage_without_one(inputs, tmp_path):
    hidden, relation = [{"term": "hidden"}], [{"term": "relation", "heads": 2}]
    distillation = {
        "general": hidden,
        "intermediate": relation,
        "prediction": [*hidden, {"term": "label"}],
        "teacher_margin": 0.0,
    }
    still = {**STAGE, "num_steps": 1, "learning_rate": 1e-12}
    stages = {"general": STAGE, "intermediate": STAGE, "prediction": still}
    finetune = {**STAGE, "num_steps": 40, "learning_rate": 5e-3}
    config = _config(
        inputs,
        tmp_path,
        "tinybert",
        (),
        distillation=distillation,
        finetune=finetune,
        **stages,
    )
    assert cli.main(["run", config]) == 0
    kept = [
        (tmp_path / "run" / "models" / stage / "projection.safetensors")
        for stage in ("general", "intermediate", "prediction")
    ]
    assert not kept[1].exists()
    first, last = load_file(kept[0])["kernel"], load_file(kept[2])["kernel"]
    assert abs(first - last).max() < 1e-9
