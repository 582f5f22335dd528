"""A family of students: each is its solo run's, one teacher pass serves all, each is exported."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from tiny_inputs import STUDENT, TEACHER, TEXTS, write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.compute import MeshSection
from tinybert_jax.config.distillation import DistillSection
from tinybert_jax.huggingface.folder import read_model, start_params
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.models.inputs import Text
from tinybert_jax.objectives.distillation import Role, make_distill
from tinybert_jax.objectives.objective import encoder_inputs
from tinybert_jax.objectives.supervised import make_supervised
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import make_mesh
from tinybert_jax.runs.results import LINEAR
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.terms.table import reads_of
from tinybert_jax.training.members import join_objectives, join_optimizer
from tinybert_jax.training.metric_log import MetricLog
from tinybert_jax.training.optimizer import make_optimizer
from tinybert_jax.training.step import init_state, make_train_step

STUDENTS = {
    "wide": {**TEACHER, "num_attention_heads": 2, "init": "teacher_embeddings"},
    "1l-8d": STUDENT,
}
STAGE = {
    "num_steps": 6,
    "global_batch_size": 8,
    "max_length": 16,
    "batching": "pad",
    "learning_rate": 1e-2,
    "clip_norm": 0.05,
    "log_every": 1,
    "save_every": 2,
}
STAGES = ("general", "intermediate", "prediction", "baseline")

pytestmark = pytest.mark.usefixtures("cheap_programs")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, cheap_programs):
    """A folder with text, a teacher and the same teacher fine-tuned."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, **TEACHER)
    finetune = {**STAGE, "num_steps": 40, "clip_norm": 1.0, "save_every": 40, "eval_every": 20}
    _run(folder, "finetuned", finetune=finetune)
    return folder


def _run(inputs, name, **changes):
    """The run folder of a config with the given students or stages."""
    config = write_config(inputs / f"{name}.yaml", inputs, inputs / name, **changes)
    assert cli.main(["run", config]) == 0
    return inputs / name


def _distilled(inputs, name, **students):
    judged = {**STAGE, "eval_every": 2}
    return _run(
        inputs,
        name,
        teacher={
            "path": str(inputs / "teacher"),
            "finetuned": str(inputs / "finetuned" / "models" / "finetune"),
        },
        num_seeds=2,
        general=STAGE,
        intermediate={**STAGE, "batching": "pack"},
        prediction={**judged, "average_decay": 0.5, "gradient_accumulation_steps": 2},
        baseline=judged,
        distillation={"projection": "per_layer"},
        **students,
    )


@pytest.fixture(scope="module")
def together(inputs):
    return _distilled(inputs, "together", students=STUDENTS)


@pytest.fixture(scope="module")
def alone(inputs):
    return {name: _distilled(inputs, name, student=own) for name, own in STUDENTS.items()}


def _rows(run, kind):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["kind"] == kind]


COPY = {**TEACHER, "num_attention_heads": 2, "init": "teacher_layers"}


def test_a_student_of_all_the_teachers_layers_has_nothing_to_learn_from_them(inputs):
    run = _run(inputs, "copied", student=COPY, general={**STAGE, "num_steps": 1, "dropout": 0.0})
    assert _rows(run, "train")[0]["loss"] == 0


@pytest.mark.parametrize("stage, terms", [("general", "hidden"), ("prediction", "label")])
def test_students_start_from_the_layers_named(inputs, stage, terms):
    """Of two seeds of a family, in whichever stage is the first; its steps are too small to see."""
    names = {"top": 2, "bottom": 1}
    run = _run(
        inputs,
        f"layers-{stage}",
        teacher={
            "path": str(inputs / "teacher"),
            "finetuned": str(inputs / "finetuned" / "models" / "finetune"),
        },
        num_seeds=2,
        students={name: {**COPY, "num_hidden_layers": 1, "init_layers": name} for name in names},
        distillation={stage: [{"term": terms}]},
        **{stage: {**STAGE, "num_steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0}},
    )
    of_stage = {"general": inputs / "teacher", "prediction": inputs / "finetuned/models/finetune"}
    teacher = load_file(of_stage[stage] / "model.safetensors")
    theirs = {key.removeprefix("bert."): array for key, array in teacher.items()}
    for name, layer in names.items():
        for seed in ("", "-seed-1"):
            own = load_file(run / "models" / f"{stage}-{name}{seed}" / "model.safetensors")
            compared = 0
            for key, array in own.items():
                given = theirs.get(
                    key.removeprefix("bert.").replace("layer.0", f"layer.{layer - 1}")
                )
                if "encoder" in key or "embeddings" in key:
                    np.testing.assert_allclose(array, given, atol=1e-9, err_msg=key)
                    compared += 1
            assert compared > 16


def test_a_teacher_in_a_format_of_its_own(inputs):
    """Nearly the fp32 teacher's losses, whichever terms read it, and a step that is nearly its."""
    distilbert = [{"term": "word_logits"}, {"term": "cosine"}, {"term": "relation", "heads": 2}]
    for name, terms in ("tinybert", None), ("distilbert", distilbert):
        losses = []
        for dtype in ("float32", "bfloat16", "bfloat16_products", "int8_products"):
            run = _run(
                inputs,
                f"{name}-{dtype}",
                student={**COPY, "init": "random"},
                compute={"teacher_dtype": dtype},
                general={**STAGE, "num_steps": 2, "dropout": 0.0},
                **({"distillation": {"general": terms}} if terms else {}),
            )
            losses.append([row["loss"] for row in _rows(run, "train")])
        np.testing.assert_allclose(losses[1:], losses[:1] * 3, rtol=1e-2)
        assert len({tuple(own) for own in losses}) == 4


def test_each_member_is_its_solo_run(together, alone):
    """Weights of every stage and seed, losses, dev scores; the gradient of each is clipped."""
    for name, run in alone.items():
        for stage in STAGES:
            for seed in ("", "-seed-1"):
                for file in ("model", "projection"):
                    path = f"{stage}{seed}/{file}.safetensors"
                    if not (run / "models" / path).exists():
                        assert (file, stage) not in (("model", stage), ("projection", "general"))
                        continue
                    solo = load_file(run / "models" / path)
                    ours = load_file(
                        together / "models" / f"{stage}-{name}{seed}" / f"{file}.safetensors"
                    )
                    assert solo.keys() == ours.keys()
                    for key, array in solo.items():
                        np.testing.assert_allclose(
                            ours[key], array, rtol=1e-5, atol=1e-5, err_msg=f"{path} {key}"
                        )
    for kind, solo_key, key in (("train", "loss", "loss/{}"), ("eval", "accuracy", "accuracy/{}")):
        ours = _rows(together, kind)
        each = {name: [row[solo_key] for row in _rows(run, kind)] for name, run in alone.items()}
        for name, values in each.items():
            np.testing.assert_allclose([row[key.format(name)] for row in ours], values, rtol=2e-5)
        means = np.mean(list(each.values()), axis=0)
        np.testing.assert_allclose([row[solo_key] for row in ours], means, rtol=2e-5)
    for run in (*alone.values(), together):
        norms = [row["grad_norm"] for row in _rows(run, "train")]
        assert np.median(norms) > 2 * STAGE["clip_norm"]


def test_losses_are_told_as_means_and_by_member(together):
    for row in _rows(together, "train"):
        assert row["loss"] == pytest.approx(np.mean([row[f"loss/{name}"] for name in STUDENTS]))
        assert row["mfu"] > 0
    first = _rows(together, "train")[0]
    parts = {"loss/attention", "loss/hidden", "loss/embedding"}
    assert {name for name in first if name.startswith("loss/")} == parts | {
        f"loss/{name}" for name in STUDENTS
    }
    assert first["loss"] == pytest.approx(sum(first[name] for name in parts))


def test_each_member_is_scored_and_exported(together, alone):
    results = json.loads((together / "results.json").read_text())
    described = {(m["role"], m["name"]): m for m in results["models"]}
    teacher, *others = described
    assert teacher == ("teacher", "2 layers × 16")
    trained = [(role, name) for role in ("student", "baseline") for name in STUDENTS]
    assert others == [*trained, ("linear", LINEAR)]
    assert results["share_kept"].keys() == STUDENTS.keys()
    for name, run in alone.items():
        solo = json.loads((run / "results.json").read_text())
        assert results["share_kept"][name] == pytest.approx(solo["share_kept"])
        for model in solo["models"][1:-1]:
            ours = described[model["role"], name]
            assert ours["by_seed"] == model["by_seed"]
            assert ours["num_parameters"] == model["num_parameters"]
        scores = [own["accuracy"] for own in described["student", name]["by_seed"]]
        best = f"prediction-{name}" + ("-seed-1" if np.argmax(scores) else "")
        weights = together / "models" / best / "model.safetensors"
        assert (together / "hf" / name / "model.safetensors").read_bytes() == weights.read_bytes()
        assert not (together / "hf" / name / "projection.safetensors").exists()
    assert {path.name for path in (together / "hf").iterdir()} == STUDENTS.keys()


def test_exports_load_in_transformers(together):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    for name, sizes in STUDENTS.items():
        folder = together / "hf" / name
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        assert model.config.num_hidden_layers == sizes["num_hidden_layers"]
        inputs = AutoTokenizer.from_pretrained(folder)(TEXTS[:4], padding=True, return_tensors="pt")
        with torch.no_grad():
            theirs = model(**inputs).logits.numpy()
        config = read_model(folder).config
        apply, init = make_classifier(config, 2)
        names = ("input_ids", "token_type_ids", "attention_mask")
        ids, types, mask = (jnp.asarray(inputs[key].numpy(), jnp.int32) for key in names)
        params = start_params(folder, init, whole=True)
        ours = apply(params, Text(ids, types), mask > 0).logits
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


class _Killed(BaseException):
    pass


def test_killed_it_ends_with_the_same_bits(inputs, together, monkeypatch):
    """Between two checkpoints, of a stage without and of one with dev scores.

    tests/recipes/test_end_to_end.py kills one student in every stage.
    """
    write = MetricLog.write
    for stage in ("intermediate", "prediction"):

        def stop(self, kind, name, step, values, stage=stage):
            write(self, kind, name, step, values)
            if (kind, name, step) == ("train", stage, 5):
                raise _Killed

        with monkeypatch.context() as patch:
            patch.setattr(MetricLog, "write", stop)
            with pytest.raises(_Killed):
                _distilled(inputs, "killed", students=STUDENTS)
    killed = _distilled(inputs, "killed", students=STUDENTS)
    for kind in ("train", "eval"):
        clocks = {"time", "seconds", "seconds_left", "tokens_per_second", "mfu"}
        before, now = (
            [{k: v for k, v in row.items() if k not in clocks} for row in _rows(run, kind)]
            for run in (together, killed)
        )
        assert before == now
    files = sorted(p.relative_to(together) for p in (together / "models").rglob("*.safetensors"))
    assert len(files) == 4 * len(STAGES) + 8  # of both members and seeds; projections of two stages
    for file in files:
        assert (together / file).read_bytes() == (killed / file).read_bytes(), file


SIZES = ModelConfig(
    vocab_size=50,
    num_attention_heads=2,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
)


def _batch():
    """No two rows alike: of other words, lengths, labels and weights."""
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(5, SIZES.vocab_size, (8, 16)), jnp.int32)
    real = jnp.asarray(np.arange(16) < np.arange(9, 17)[:, None])
    labels = jnp.asarray(rng.integers(0, 2, 8), jnp.int32)
    return Batch(Text(ids * real, ids * 0), real, {"labels": labels}, jnp.linspace(0.5, 1.5, 8))


def _members():
    return {
        f"{n}l": SIZES.model_copy(update={"num_hidden_layers": n, "hidden_size": 8 * n})
        for n in (1, 2)
    }


def test_eight_devices_equal_one():
    made = {name: make_classifier(sizes, 2) for name, sizes in _members().items()}
    supervised = {name: make_supervised(apply) for name, (apply, _) in made.items()}
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
    optimizer = join_optimizer(optimizer, made)
    results = []
    for devices, axes in ((1, {}), (8, {"fsdp": 2, "tensor": 2})):
        mesh = make_mesh(MeshSection(**axes), jax.devices()[:devices])
        params = {name: jax.jit(init)(jax.random.key(0)) for name, (_, init) in made.items()}
        state = init_state(params, optimizer, jax.random.key(3), mesh)
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        kernel = state.params["2l"]["encoder"]["layers"]["intermediate"]["kernel"]
        assert len({str(shard.index) for shard in kernel.addressable_shards}) == min(devices, 4)
        objective = join_objectives(supervised)
        step = make_train_step(objective, optimizer, lambda _: 0.1, mesh, placed, num_steps=2)
        for _ in range(2):
            batch = jax.device_put(_batch(), sharding.batch_sharding(mesh))
            state, metrics = step(state, batch, ())
        results.append(jax.device_get((state.params, metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), *results)


def _objective(sizes, apply_teacher):
    apply, init = make_classifier(sizes, 2)
    terms = DistillSection().terms("prediction")
    role = Role(apply, reads_of(terms), sizes.num_hidden_layers)
    teacher = Role(apply_teacher, reads_of(terms, of_teacher=True), SIZES.num_hidden_layers)
    return make_distill(role, teacher, terms), init


def test_one_teacher_pass_for_all_members(monkeypatch):
    """Traced once; the compiled step has the FLOPs of its students and of one teacher.

    What no member reads of the teacher, here all but its logits, takes no memory.
    """
    calls = []
    teach, init_teacher = make_classifier(SIZES, 2)

    def apply_teacher(*inputs, **options):
        calls.append(inputs)
        return teach(*inputs, **options)

    made = {name: _objective(own, apply_teacher) for name, own in _members().items()}
    starts = {name: {"student": init(jax.random.key(0))} for name, (_, init) in made.items()}
    batch = _batch()
    frozen = init_teacher(jax.random.key(1))
    mesh = make_mesh(MeshSection(), jax.devices()[:1])
    # The step is lowered from outside, where no mesh can be set.
    monkeypatch.setattr(jax, "set_mesh", lambda mesh: contextlib.nullcontext())

    def compiled(*names, change=lambda objective: objective):
        objective = change(join_objectives({name: made[name][0] for name in names}))
        optimizer = join_optimizer(make_optimizer(lambda _: 1e-3), names)
        state = init_state(
            {name: starts[name] for name in names}, optimizer, jax.random.key(0), mesh
        )
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = make_train_step(objective, optimizer, lambda _: 1e-3, mesh, placed, num_steps=2)
        calls.clear()
        program = jax.jit(lambda *inputs: step(*inputs)).lower(state, batch, frozen).compile()
        assert len(calls) == 1
        return program

    def only_logits(objective):
        def targets(*inputs):
            return objective.targets(*inputs)._replace(encoder=None)

        return objective._replace(targets=targets)

    programs = [compiled("1l"), compiled("2l"), compiled("1l", "2l")]
    programs.append(jax.jit(teach).lower(frozen, *encoder_inputs(batch)).compile())
    one, two, both, teacher = (program.cost_analysis()["flops"] for program in programs)
    assert both == pytest.approx(one + two - teacher, rel=0.01)
    assert teacher > 0.1 * both
    lean = compiled("1l", "2l", change=only_logits)
    sizes = [p.memory_analysis().temp_size_in_bytes for p in (programs[2], lean)]
    assert sizes[0] == sizes[1]
