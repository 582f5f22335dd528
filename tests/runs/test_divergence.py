"""Stages that diverge: what is skipped, where a run stops, and how it goes on."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_inputs import STUDENT, TEACHER, TEXTS, write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import make_mesh
from tinybert_jax.runs import preflight, stage
from tinybert_jax.runs.divergence import load_batch
from tinybert_jax.runs.run import IDENTITIES
from tinybert_jax.training import checkpoint
from tinybert_jax.training.metric_log import read_rows
from tinybert_jax.training.step import TrainStep

STAGE = {
    "num_steps": 12,
    "global_batch_size": 8,
    "max_length": 16,
    "batching": "pad",
    "learning_rate": 1e-3,
    "warmup": 0.0,
    "log_every": 3,
    "save_every": 3,
    "eval_every": 60,
    "stop_after_skipped": 4,
}

pytestmark = pytest.mark.usefixtures("cheap_programs")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, cheap_programs):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, **TEACHER)
    return folder


def _config(inputs, name, **sections):
    return write_config(
        inputs / f"{name}.yaml", inputs, inputs / name, keep_checkpoints=True, **sections
    )


def _finetune(inputs, name, **settings):
    return _config(inputs, name, finetune={**STAGE, **settings})


def _regression(inputs, name, labels, **settings):
    task: dict[str, str] = {"kind": "regression"}
    for split, numbers in (("train", labels), ("dev", [0.5, 1.0] * 12)):
        rows = "".join(f"{text}\t{own}\n" for text, own in zip(TEXTS, numbers, strict=True))
        (inputs / f"{name}-{split}.tsv").write_text("text\tlabel\n" + rows)
        task[split] = str(inputs / f"{name}-{split}.tsv")
    return _config(inputs, name, task=task, finetune={**STAGE, **settings})


def _weights(run):
    return load_file(run / "models" / "finetune" / "model.safetensors")


def _assert_same_weights(run, other):
    ours, theirs = _weights(run), _weights(other)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def _told(run):
    return [
        {name: row.get(name) for name in ("kind", "step", "loss", "skipped", "losses", "limits")}
        for row in read_rows(run / "metrics.jsonl")
        if row["kind"] != "stage"
    ]


def test_bad_examples_are_skipped_and_a_resumed_run_has_the_same_bits(inputs, capfd):
    """One label is finite in fp32 but its square is not; another makes a spike of the loss."""
    labels = [0.5, 1.0, 1e30, *[1.5] * (len(TEXTS) - 4), 1e3]
    settings = {"num_steps": 48, "global_batch_size": 4, "stop_after_skipped": 6, "spikes": "skip"}
    path = _regression(inputs, "whole", labels, **settings)
    assert cli.main(["run", path]) == 0
    run = inputs / "whole"
    rows = read_rows(run / "metrics.jsonl")
    spikes = [row["step"] for row in rows if row["kind"] == "spike"]
    trained = [row for row in rows if row["kind"] == "train"]
    assert len(spikes) > 2 and min(spikes) > 20  # losses that have a median
    # An epoch has six batches.
    assert sum(row.get("skipped", 0) for row in trained) == 48 // 6 + len(spikes)
    assert all(np.isfinite(row["loss"]) for row in trained)
    shown = capfd.readouterr().out
    assert shown.count("is skipped: its loss or gradient is not finite") == 1
    assert shown.count("above the limit") == len(spikes)

    before = shutil.copytree(run, inputs / "before")
    for folder in ("models", IDENTITIES):  # as if killed after the save of step 45
        shutil.rmtree(run / folder)
    shutil.rmtree(run / "checkpoints" / "finetune" / "last" / "48")
    assert cli.main(["run", path]) == 0
    assert "resumes at step 45" in capfd.readouterr().out
    _assert_same_weights(run, before)
    by_step = [sorted(map(json.dumps, _told(own))) for own in (run, before)]
    assert by_step[0] == by_step[1]


def test_a_stage_stops_with_its_last_finite_state_and_what_computes_the_step_again(
    inputs, monkeypatch, capfd
):
    """No label has a finite square, so that no step of the stage is finite."""
    made = {}

    def spy(name):
        make = getattr(stage, name)

        def make_and_keep(*words, **given):
            made[name] = make(*words, **given)
            return made[name]

        monkeypatch.setattr(stage, name, make_and_keep)

    spy("abstract_state")
    spy("make_step")
    path = _regression(inputs, "diverged", [1e30] * len(TEXTS))
    assert cli.main(["run", path]) == 5
    run = inputs / "diverged"
    folder = run / "diverged" / "finetune-4"
    told = json.loads((folder / "step.json").read_text())
    assert (told["index"], told["stopped_at"], told["models"]) == (0, 4, ["seed 0"])
    skipped = [row["skipped"] for row in read_rows(run / "metrics.jsonl")]
    assert skipped == [3, 1]

    state = checkpoint.restore_newest(folder / "state", made["abstract_state"]).tree
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert told["keys"] == np.asarray(jax.random.key_data(state.key)).tolist()
    step, batch = made["make_step"], load_batch(folder / "batch.npz")
    batch = jax.device_put(batch, sharding.batch_sharding(step.mesh))
    again, metrics = step(state._replace(step=jnp.int32(told["index"])), batch, ())
    assert metrics["skipped"] and metrics["loss"] == jnp.inf and again.step == 1

    # No state is left of the steps that were skipped.
    assert checkpoint.steps(run / "checkpoints" / "finetune" / "last") == []
    capfd.readouterr()
    assert cli.main(["run", path]) == 5
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and "finetune: diverged: 4 steps in a row" in message
    assert "seed 0; diverged/finetune-4 of the run folder" in message
    assert "--from-step finetune:STEP finetune.learning_rate=RATE (it was 0.001)" in message


def test_weights_of_1e30_are_not_saved_and_the_run_goes_on_with_another_rate(inputs, capfd):
    """Loss and gradient of the first step are finite."""
    path = _finetune(inputs, "overflow", learning_rate=1e30, save_every=1, eval_every=1)
    rest = ["finetune.save_every=3", "finetune.eval_every=60"]
    assert cli.main(["run", path]) == 5
    run = inputs / "overflow"
    assert "step 1 made weights that are not finite" in capfd.readouterr().err
    assert json.loads((run / "diverged" / "finetune-1" / "step.json").read_text())["index"] == 0
    assert not [*run.rglob("manifest.json")]

    rate, back = "finetune.learning_rate=1e-3", ["--from-step", "finetune:0"]
    for words, named in (
        ([rate], "holds a run of another config"),
        (["--from-step", "finetune:4", rate], "one of 0, got 4"),
        (["--from-step", "finetune", rate], "expected STAGE:STEP"),
        (["--from-step", "general:3"], "expected one of the stages ['finetune']"),
        ([*back, rate, "seed=3"], "another config"),
    ):
        assert cli.main(["run", path, *words]) == 2
        assert named in capfd.readouterr().err
    assert cli.main(["run", path, *back, rate, *rest]) == 0
    assert cli.main(["run", _finetune(inputs, "golden")]) == 0
    _assert_same_weights(run, inputs / "golden")
    (line,) = (run / "changes.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["stage"], row["step"]) == ("finetune", 0)
    assert "finetune.learning_rate: 1e+30 there, 0.001 here" in row["changes"]
    assert cli.main(["run", path, *back, rate, *rest]) == 2
    assert "not finished" in capfd.readouterr().err


def test_a_flipped_bit_in_one_replica_ends_the_run_and_its_device_is_named(
    inputs, monkeypatch, capfd
):
    """On eight devices; the bit changes after the third step, and no loss tells."""
    call, number = TrainStep.__call__, 3

    def step(self, state, *rest):
        state, metrics = call(self, state, *rest)
        if state.step == 3:
            norm = state.params["encoder"]["embeddings"]["norm"]
            scale = norm["scale"]
            parts = [np.array(shard.data) for shard in scale.addressable_shards]
            parts[number].view(np.uint32)[2] ^= 1
            placed = [
                jax.device_put(part, shard.device)
                for part, shard in zip(parts, scale.addressable_shards, strict=True)
            ]
            norm["scale"] = jax.make_array_from_single_device_arrays(
                scale.shape, scale.sharding, placed
            )
        return state, metrics

    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr(preflight, "make_mesh", make_mesh)
    path = _finetune(inputs, "flipped", check_replicas_every=2, save_every=2)
    assert cli.main(["run", path]) == 5
    message = capfd.readouterr().err
    assert f"norm.scale on {jax.devices()[number]} (process 0)" in message
    assert "after step 4" in message and message.count("\n") == 1
    last = inputs / "flipped" / "checkpoints" / "finetune" / "last"
    assert checkpoint.steps(last) == [2]


def test_a_step_whose_best_parameters_are_gone_is_refused_before_anything_is_removed(
    inputs, monkeypatch, capfd
):
    """The scores of a tiny rate are equal: the best are those of step 3."""
    take = TrainStep.__call__

    def step(self, state, *words):
        if int(state.step) == 8:
            raise OSError("the machine is gone")
        return take(self, state, *words)

    path = _finetune(inputs, "bestless", eval_every=3, learning_rate=1e-12)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", step)
        assert cli.main(["run", path]) == 2
    folder = inputs / "bestless" / "checkpoints" / "finetune"
    assert checkpoint.read_meta(folder / "last" / "6")["best_step"] == 3
    for name in ("last", "best"):
        shutil.rmtree(folder / name / "3")
    before = checkpoint.steps(folder / "last")
    capfd.readouterr()
    assert cli.main(["run", path, "--from-step", "finetune:6"]) == 2
    assert "whose best parameters are still there, got 6" in capfd.readouterr().err
    assert checkpoint.steps(folder / "last") == before


def test_the_best_parameters_of_every_kept_state_are_kept(inputs):
    every = {"save_every": 1, "eval_every": 1, "keep_every": 1, "learning_rate": 1e-2}
    assert cli.main(["run", _regression(inputs, "kept", [0.5, 1.0] * 12, **every)]) == 0
    folder = inputs / "kept" / "checkpoints" / "finetune"
    states = [folder / "last" / str(step) for step in checkpoint.steps(folder / "last")]
    needed = {checkpoint.read_meta(state)["best_step"] for state in states}
    assert len(states) == 12 and len(needed) > 3
    assert needed == set(checkpoint.steps(folder / "best"))


@pytest.fixture(scope="module")
def tuned_teacher(inputs):
    assert cli.main(["run", _finetune(inputs, "tuned", num_steps=1)]) == 0
    return inputs / "tuned" / "models" / "finetune"


@pytest.mark.parametrize("name", ["general", "intermediate", "prediction"])
def test_a_teacher_whose_outputs_are_not_finite_is_named(inputs, tuned_teacher, name, capfd):
    """Its weights are finite, but its attention scores overflow."""
    source = inputs / "teacher" if name == "general" else tuned_teacher
    teacher = shutil.copytree(source, inputs / f"teacher-{name}")
    tensors = load_file(teacher / "model.safetensors")
    for part in ("embeddings.LayerNorm.weight", "layer.0.attention.self.query.weight"):
        (large,) = (tensor for tensor in tensors if tensor.endswith(part))
        tensors[large] = 1e10 * np.sign(tensors[large])
    tensors[large.replace("query", "key")] = tensors[large]
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    path = _config(
        inputs,
        f"bad-{name}",
        teacher={"path": str(teacher)},
        student={**STUDENT},
        distillation={"teacher_margin": -1},
        **{name: {**STAGE, **({} if name == "prediction" else {"eval_every": None})}},
    )
    capfd.readouterr()
    assert cli.main(["run", path]) == 2
    message = capfd.readouterr().err
    assert str(teacher) in message and "finite" in message and message.count("\n") == 1
    assert not [*(inputs / f"bad-{name}").rglob("manifest.json")]
