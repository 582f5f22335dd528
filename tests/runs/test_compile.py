"""`tinybert compile`: the step of a stage on eight devices; a rule that is broken on purpose."""

import importlib.util
import json

import jax
import pytest
import tiny_inputs
from jax.sharding import PartitionSpec

from tinybert_jax import cli
from tinybert_jax.parallel import sharding
from tinybert_jax.runs.topologies import has_gpu_compiler

SETTINGS = {
    "students": {"tiny": tiny_inputs.STUDENT, "small": tiny_inputs.STUDENT},
    "finetune": tiny_inputs.STAGE | {"num_epochs": 1},
    "intermediate": tiny_inputs.STAGE | {"num_epochs": 1},
    "prediction": tiny_inputs.STAGE | {"num_epochs": 1, "average_decay": 0.9},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compile")
    tiny_inputs.write_inputs(folder, **tiny_inputs.TEACHER)
    return tiny_inputs.write_config(folder / "run.yaml", folder, folder / "run", **SETTINGS)


def compiled(capsys, config, *words, topology="local"):
    """(exit status, the JSON object that is printed)."""
    status = cli.main(["compile", config, "--topology", topology, "--json", *words])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "intermediate", "prediction"])
def test_a_data_parallel_step_reduces_its_gradients_and_gathers_nothing(capsys, config, stage):
    words = ["pretrain={num_steps: 1, global_batch_size: 8, max_length: 16, learning_rate: 1.0}"]
    status, found = compiled(capsys, config, "--stage", stage, *words * (stage == "pretrain"))
    assert status == 0 and found["problems"] == []
    assert found["num_devices"] == jax.device_count() == 8
    assert {own["kind"] for own in found["collectives"]} == {"all-reduce"}
    reduced = sum(own["num_bytes"] for own in found["collectives"])
    # A pooler that nothing reads has a gradient, which is 0.
    assert 0.95 * found["gradient_bytes"] <= reduced <= 1.02 * found["gradient_bytes"] + 1024
    assert found["memory"]["total"] > 0


def test_weights_need_not_be_here(capsys, config):
    """The teacher of the prediction stage is not trained yet."""
    status, found = compiled(capsys, config, "--stage", "prediction")
    assert (status, found["stage"]) == (0, "prediction")


def test_the_stage_with_the_most_flops_is_chosen(capsys, config):
    _, found = compiled(capsys, config, "finetune.num_epochs=50")
    assert found["stage"] == "finetune"


def test_a_step_that_gathers_activations_is_refused(capsys, config, monkeypatch):
    def gathered(hidden):
        return jax.lax.with_sharding_constraint(hidden, PartitionSpec())

    from tinybert_jax.models import encoder

    assert encoder.shard_by_example is sharding.shard_by_example
    monkeypatch.setattr(encoder, "shard_by_example", gathered)
    status, found = compiled(capsys, config, "--stage", "finetune")
    assert status == 3
    assert any("got all-gather" in problem for problem in found["problems"])


def test_split_weights_are_gathered_and_fewer_are_held(capsys, config):
    _, whole = compiled(capsys, config, "--stage", "finetune")
    status, split = compiled(capsys, config, "--stage", "finetune", "mesh.fsdp=8", "mesh.data=1")
    assert status == 0
    assert "all-gather" in {own["kind"] for own in split["collectives"]}
    assert split["memory"]["arguments"] < 0.5 * whole["memory"]["arguments"]


def test_unknown_topologies_are_refused(config, capsys):
    assert cli.main(["compile", config, "--topology", "v5e:3x3"]) == 2
    assert "expected a topology of v5e" in capsys.readouterr().err
    for topology in ("b200:8", "h100:16"):
        assert cli.main(["compile", config, "--topology", topology]) == 2
        assert "expected GPUs of one host" in capsys.readouterr().err


has_libtpu = bool(importlib.util.find_spec("libtpu"))


@pytest.mark.skipif(has_gpu_compiler(), reason="JAX's plugin for CUDA is installed")
def test_a_missing_compiler_of_gpus_is_told_with_its_command(config, capsys):
    assert cli.main(["compile", config, "--topology", "h200:8"]) == 2
    assert "pip install 'jax[cuda13]'" in capsys.readouterr().err


@pytest.mark.skipif(not has_gpu_compiler(), reason="needs JAX's plugin for CUDA")
def test_gpus_that_are_not_here(capsys, config):
    words = ["--stage", "intermediate", "compute.dtype=bfloat16"]
    status, found = compiled(capsys, config, *words, topology="h200:8")
    assert status == 0
    assert (found["device"], found["num_devices"]) == ("NVIDIA H200", 8)
    assert {own["kind"] for own in found["collectives"]} == {"all-reduce"}
    assert set(found["times"]) == {"matrix units", "memory", "network"}
    assert found["memory"]["total"] < found["memory"]["limit"]


@pytest.mark.skipif(has_libtpu, reason="libtpu is installed")
def test_a_missing_compiler_is_told_with_its_command(config, capsys):
    assert cli.main(["compile", config, "--topology", "v5e:2x2"]) == 2
    assert "pip install 'tinybert-jax[tpu]'" in capsys.readouterr().err


@pytest.mark.skipif(not has_libtpu, reason="needs libtpu")
def test_a_tpu_that_is_not_here(capsys, config):
    status, found = compiled(
        capsys, config, "--stage", "intermediate", "compute.dtype=bfloat16", topology="v5e:2x4"
    )
    assert status == 0
    assert (found["device"], found["num_devices"]) == ("TPU v5 lite", 8)
    assert {own["kind"] for own in found["collectives"]} == {"all-reduce"}
    assert found["cycles"] > 0
    assert set(found["times"]) == {"matrix units", "memory", "network"}
    assert found["memory"]["total"] < found["memory"]["limit"]


@pytest.mark.skipif(not has_libtpu, reason="needs libtpu")
def test_slices_of_tpus_that_are_not_here(capsys, config):
    words = ["--stage", "finetune", "--slices", "2", "mesh.fsdp=4", "mesh.dcn_data=2"]
    status, found = compiled(capsys, config, *words, topology="v5e:2x2")
    assert (status, found["num_devices"]) == (0, 8)
    assert found["mesh"] == "data 2 × fsdp 4 × tensor 1"


@pytest.mark.skipif(not has_libtpu, reason="needs libtpu")
def test_a_model_that_does_not_fit_is_refused(capsys, config):
    wide = "pretrain={num_steps: 1, global_batch_size: 4194304, max_length: 16, learning_rate: 1.0}"
    status, found = compiled(capsys, config, "--stage", "pretrain", wide, topology="v5e:2x2")
    assert status == 3
    assert any(problem.startswith("memory:") for problem in found["problems"])
