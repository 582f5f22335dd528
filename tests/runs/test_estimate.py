"""`--dry-run`: numbers equal those worked out by hand, and nothing is written."""

import datetime
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from tinybert_jax import cli
from tinybert_jax.config.run import RunConfig
from tinybert_jax.data.wordpiece import train_wordpiece
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.models.inputs import Text
from tinybert_jax.objectives.masked_lm import mlm_chunk_size
from tinybert_jax.performance import flops as model_flops
from tinybert_jax.runs import estimate as runs_estimate
from tinybert_jax.runs.preflight import read_run
from tinybert_jax.runs.stage_batches import make_stage_batches
from tinybert_jax.runs.workload import work_of

STEPS, ROWS, WIDTH, WORDS = 4, 8, 16, 6  # a row is WORDS words, [CLS] and [SEP]
SLOTS, TOKENS = STEPS * ROWS * WIDTH, STEPS * ROWS * (WORDS + 2)
TEACHER = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
STUDENT = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
STAGE = {
    "num_steps": STEPS,
    "global_batch_size": ROWS,
    "max_length": WIDTH,
    "batching": "pad",
    "learning_rate": 1e-3,
}
STAGES = ("pretrain", "finetune", "general", "intermediate", "prediction", "baseline")
# A token's forward pass: 2 · layers · (4d² + 2df + 2Td).
TEACHER_LAYER = 2 * (4 * 16**2 + 2 * 16 * 32 + 2 * WIDTH * 16)
STUDENT_LAYER = 2 * (4 * 8**2 + 2 * 8 * 16 + 2 * WIDTH * 8)
TEACHER_FORWARD = 2 * TEACHER_LAYER


def _last(layer, hidden_size, num_last_layer_tokens, width=WIDTH):
    """A row's: keys and values of all its tokens, the rest where few are read, else everywhere."""
    num_last_layer_tokens = num_last_layer_tokens if 2 * num_last_layer_tokens <= width else width
    keys_and_values = 2 * 2 * hidden_size**2
    return width * keys_and_values + num_last_layer_tokens * (layer - keys_and_values)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Single letters, each a token of its own; what a test writes goes elsewhere."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)

    def texts(num_words):
        return [" ".join(rng.choice(list("abcdefgh"), num_words)) for _ in range(24)]

    tokenizer = train_wordpiece(texts(WORDS), vocab_size=40)
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, lengths in (("short", [WORDS]), ("mixed", [WORDS, 14])):
        lines = [text for length in lengths for text in texts(length)]
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    labelled = [f"{text}\t{'ab'[i % 2]}" for i, text in enumerate(texts(WORDS))]
    (folder / "task.tsv").write_text("\n".join(["text\tlabel", *labelled]) + "\n")
    return folder


def _settings(inputs, run_dir, stages=STAGES, **changes):
    return {
        "run_dir": str(run_dir),
        "tokenizer": {"path": str(inputs / "tokenizer")},
        "corpus": {"files": [str(inputs / "short.txt")]},
        "task": {"train": str(inputs / "task.tsv"), "dev": str(inputs / "task.tsv")},
        "teacher": TEACHER,
        "student": STUDENT,
        "num_seeds": 3,
        **{name: STAGE for name in stages},
        **changes,
    }


def _run(inputs, tmp_path, stages=STAGES, **changes):
    config = RunConfig.model_validate(_settings(inputs, tmp_path / "run", stages, **changes))
    return read_run(config, config.stages)


def _price(run, stage):
    return runs_estimate.estimate_costs(run, run.plans[stage])


def _describe(run, *stages):
    return runs_estimate.describe(run, [run.plans[stage] for stage in stages])


def _room(rate, width=WIDTH):
    """Slots of a row for its masked tokens: their mean and four standard deviations."""
    return math.ceil(rate * width + 4 * math.sqrt(rate * width * (1 - rate)))


def test_dry_run_names_all_stages_and_writes_nothing(inputs, tmp_path, capsys, monkeypatch):
    measured = []
    monkeypatch.setattr(
        runs_estimate, "measure_gemm_peak", lambda dtype: measured.append(dtype) or 1e3
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(_settings(inputs, tmp_path / "run")))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["run", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    *_, text = capsys.readouterr().out.partition("pretrain: 4 steps")
    text = ("pretrain: 4 steps" + text).replace("\xa0", " ").strip()
    *blocks, together, note = text.split("\n\n")
    assert [block.split(":")[0] for block in blocks] == list(STAGES)
    for name, block in zip(STAGES, blocks, strict=True):
        assert "4 steps, 256 tokens in 512 slots (50% padding), rows of up to 16" in block
        assert ("× 3 seeds" in block) == (name not in ("pretrain", "finetune"))
        assert ("teacher   5.38 k parameters" in block) == (
            name in ("general", "intermediate", "prediction")
        )
    # 32 rows · 3 passes of the teacher, at 40 % of 1,000 FLOP/s
    flops = 3 * SLOTS // WIDTH * (WIDTH * TEACHER_LAYER + _last(TEACHER_LAYER, 16, 1))
    assert f"whole stage {flops:.3g}" in blocks[1]
    time = datetime.timedelta(seconds=math.ceil(flops / 400))
    assert f"this CPU {time}" in blocks[1]
    assert "at 40% of its float32 peak" in note
    (total,) = re.findall(r"^together: (\S+) FLOPs\n  time      this CPU ", together)
    of_stages = [float(re.findall(r"whole stage (\S+)", block)[0]) for block in blocks]
    assert float(total) == pytest.approx(sum(of_stages), rel=0.01)
    assert measured == ["float32"]


def test_time_is_of_the_compute_dtype(inputs, tmp_path, monkeypatch):
    """An H200's sheet: 989.4 TFLOP/s in bfloat16, half of them in float32 (TF32)."""
    measured = []
    monkeypatch.setattr(
        runs_estimate, "measure_gemm_peak", lambda dtype: measured.append(dtype) or 1e3
    )
    asked = []
    monkeypatch.setattr(
        runs_estimate, "peak_flops", lambda kind, dtype: asked.append(dtype) or 1e12
    )
    run = _run(inputs, tmp_path, ["pretrain"], compute={"dtype": "bfloat16_products"}, num_seeds=1)
    assert "of its bfloat16 peak" in _describe(run, "pretrain")
    assert set(measured + asked) == {"bfloat16"}


def test_stages_that_are_done_are_not_priced_again(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs_estimate, "measure_gemm_peak", lambda dtype: 1e9)
    run = _run(inputs, tmp_path)
    run.model_folder("pretrain").mkdir(parents=True)
    (run.model_folder("pretrain") / "config.json").touch()
    done, pending, _ = _describe(run, "pretrain", "finetune").split("\n\n")
    assert done == "pretrain: done before" and pending.startswith("finetune: 4 steps")


def test_flops_of_supervised_stages_by_hand(inputs, tmp_path):
    run = _run(inputs, tmp_path)
    teacher, student = _price(run, "finetune"), _price(run, "baseline")
    assert (teacher.num_tokens, teacher.num_slots, teacher.width) == (TOKENS, SLOTS, WIDTH)
    num_rows = SLOTS // WIDTH
    once = num_rows * (WIDTH * TEACHER_LAYER + _last(TEACHER_LAYER, 16, 1))
    assert teacher.flops == {"forward": once, "backward": 2 * once}
    once = 3 * num_rows * _last(STUDENT_LAYER, 8, 1)  # three seeds
    assert student.flops == {"forward": once, "backward": 2 * once}


@pytest.mark.parametrize(
    ("last_rate", "num_chunks"),
    [
        (None, [1, 1, 1, 1]),  # 0.9 masked tokens
        (0.45, [1, 2, 3, 3]),  # 0.9, 1.5, 2.1 and 2.7
    ],
)
def test_flops_of_the_masked_lm_by_hand(inputs, tmp_path, last_rate, num_chunks):
    """Eight devices with a row each; the product with the table goes there token by token."""
    settings = {**STAGE, "mask_rate": 0.15, "mask_rate_end": last_rate, "loss_chunk_size": 1}
    run = _run(inputs, tmp_path, ["pretrain"], pretrain=settings, num_seeds=1)
    costs = _price(run, "pretrain")
    mapped, predicted = ROWS * _room(last_rate or 0.15), ROWS * np.mean(num_chunks)
    head = 2 * 16 * (mapped * 16 + predicted * run.teacher.vocab_size)
    assert costs.flops["words"] == 3 * STEPS * head
    assert set(costs.flops) == {"forward", "backward", "words"}
    once = WIDTH * TEACHER_LAYER + _last(TEACHER_LAYER, 16, _room(last_rate or 0.15))
    assert costs.flops["forward"] == STEPS * ROWS * once


def test_the_masked_lm_s_chunks_are_those_of_the_step(inputs, tmp_path):
    """A row of 16 slots on each device, 2.4 masked, 5.3 with two deviations: a chunk of 8."""
    settings = {**STAGE, "mask_rate": 0.15, "loss_chunk_size": 64}
    run = _run(inputs, tmp_path, ["pretrain"], pretrain=settings, num_seeds=1)
    assert mlm_chunk_size(WIDTH, 64, mask_rate=0.15) == 8 < _room(0.15)
    head = 2 * 16 * ROWS * (_room(0.15) * 16 + 8 * run.teacher.vocab_size)
    assert _price(run, "pretrain").flops["words"] == 3 * STEPS * head


@pytest.mark.parametrize(
    ("terms", "entries"),
    [
        ([{"term": "attention"}, {"term": "hidden"}, {"term": "embedding"}], 2),
        ([{"term": "embedding"}], 1),
        ([{"term": "hidden", "layer_map": [[1, 1], [1, 2]]}], 1),
        ([{"term": "attention"}], 0),
    ],
)
def test_projection_is_of_the_entries_that_terms_read(inputs, tmp_path, terms, entries):
    run = _run(inputs, tmp_path, distillation={"general": terms})
    flops = _price(run, "general").flops
    assert flops.get("projection", 0) == 3 * 3 * SLOTS * 2 * entries * 8 * 16
    assert flops["teacher"] == SLOTS * TEACHER_FORWARD, "one pass for three students"


@pytest.mark.parametrize("at", ["real", "masked"])
def test_words_of_distillation_by_hand(inputs, tmp_path, at):
    """A device has one row and one chunk: of the row, or of its room for masked tokens."""
    terms = [{"term": "masked_lm"}, {"term": "word_logits", "at": at}]
    run = _run(inputs, tmp_path, distillation={"general": terms})
    vocab = run.teacher.vocab_size
    mapped = ROWS * (WIDTH if at == "real" else _room(0.15))
    student = 2 * 8 * (mapped * 8 + (ROWS * _room(0.15) + mapped) * vocab)
    teacher = 2 * 16 * (mapped * 16 + mapped * vocab)
    assert _price(run, "general").flops["words"] == STEPS * (3 * 3 * student + teacher)


def test_each_batch_counts_at_its_own_width(inputs, tmp_path):
    bucket = {**STAGE, "batching": "bucket", "length_buckets": [8, 16], "mask_rate": 0.05}
    corpus = {"files": [str(inputs / "mixed.txt")]}
    run = _run(inputs, tmp_path, ["pretrain"], pretrain=bucket, corpus=corpus, num_seeds=1)
    stage_batches = make_stage_batches(run, run.plans["pretrain"])
    shapes = [stage_batches.batch_at(step).shape for step in range(STEPS)]
    assert {width for _, width in shapes} == {8, 16}
    expected = 0
    for rows, width in shapes:
        layer = 2 * (4 * 16**2 + 2 * 16 * 32 + 2 * width * 16)
        expected += rows * (width * layer + _last(layer, 16, _room(0.05, width), width))
    costs = _price(run, "pretrain")
    np.testing.assert_allclose(costs.flops["forward"], expected, rtol=1e-12)
    assert costs.width == 16 and costs.num_slots == sum(rows * width for rows, width in shapes)


def test_a_family_has_one_teacher(inputs, tmp_path, monkeypatch):
    """Everything is the sum of its members' runs, but for the teacher, who is there once."""
    other = {**STUDENT, "num_hidden_layers": 2, "hidden_size": 12}
    family = {"student": None, "students": {"one": STUDENT, "two": other}}
    terms = {"distillation": {"general": [{"term": "hidden"}, {"term": "word_logits"}]}}
    runs = [
        _run(inputs, tmp_path, **terms, **students)
        for students in (family, {"student": STUDENT}, {"student": other})
    ]
    for stage in ("general", "prediction", "baseline"):
        both, *alone = (_price(run, stage) for run in runs)
        teacher = work_of(runs[0], runs[0].plans[stage]).teacher
        for part, value in both.flops.items():
            total = sum(own.flops[part] for own in alone)
            if part == "teacher":
                num_last_layer_tokens = WIDTH if stage == "general" else 1
                row = WIDTH * TEACHER_LAYER + _last(TEACHER_LAYER, 16, num_last_layer_tokens)
                assert value == total / 2 == SLOTS // WIDTH * row
            elif part == "words":
                vocab = runs[0].teacher.vocab_size
                shared = STEPS * ROWS * WIDTH * 2 * 16 * (16 + vocab)
                assert value == total - shared
            else:
                assert value == total
        frozen = 4 * model_flops.num_parameters(teacher) if teacher else 0
        assert both.state_bytes == sum(own.state_bytes for own in alone) - frozen
        taps = {"general": 2, "prediction": 0, "baseline": 0}[stage]  # hidden states
        shared = 4 * taps * 16 * WIDTH
        assert both.activation_bytes == sum(own.activation_bytes for own in alone) - shared
    monkeypatch.setattr(runs_estimate, "measure_gemm_peak", lambda dtype: 1e9)
    text = _describe(runs[0], "general").replace("\xa0", " ")
    assert text.count("  teacher   ") == 1
    for name in ("one", "two"):
        assert f"  trained   {name}, " in text


def test_state_by_hand(inputs, tmp_path):
    """Parameters, gradients and two moments of each seed, the teacher's parameters, all fp32."""
    run = _run(inputs, tmp_path, distillation={"projection": "per_layer"})
    # Tables with a LayerNorm, layers, pooler.
    rows = run.teacher.vocab_size + 16 + 2 + 2
    teacher = rows * 16 + 2 * (4 * 272 + 2 * 512 + 48 + 4 * 16) + 272
    student = rows * 8 + 1 * (4 * 72 + 2 * 128 + 24 + 4 * 8) + 72
    projection = 2 * (8 + 1) * 16  # one for each hidden entry
    state = _price(run, "general").state_bytes
    assert state == 4 * (4 * 3 * (student + projection) + teacher)
    for dtype, saved in ("bfloat16_products", 2), ("int8_products", 3), ("float8_products", 3):
        short = _run(
            inputs,
            tmp_path,
            distillation={"projection": "per_layer"},
            compute={"teacher_dtype": dtype},
        )
        layers = model_flops.num_encoder_parameters(run.teacher)
        assert _price(short, "general").state_bytes == state - saved * layers
    averaged = {**STAGE, "average_decay": 0.9}
    state = _price(_run(inputs, tmp_path, finetune=averaged), "finetune").state_bytes
    assert state == 4 * 5 * teacher


@pytest.mark.parametrize(
    ("terms", "taps", "of_students"),
    [
        # Queries, keys and hidden states of two layers and the embeddings; two projected entries.
        ([{"term": "attention"}, {"term": "hidden"}, {"term": "embedding"}], 7, 2 * 16 * WIDTH),
        # Values of two layers; six maps.
        ([{"term": "relation", "of": ["values"], "heads": 2}], 2, 6 * 2 * WIDTH**2),
        # The logits of a row's 16 tokens twice, with their gradient, over 21 pieces.
        ([{"term": "word_logits"}], 0, 3 * WIDTH * 21),
    ],
)
def test_activations_of_terms_by_hand(inputs, tmp_path, terms, taps, of_students):
    """Of fp32 and one row a device, beside the embeddings' term: a tap and a projected entry."""
    runs = [
        _run(inputs, tmp_path, distillation={"general": own})
        for own in ([{"term": "embedding"}], terms)
    ]
    assert runs[0].teacher.vocab_size == 21
    embedding, taught = (_price(run, "general").activation_bytes for run in runs)
    once = 16 * WIDTH
    assert taught - embedding == 4 * ((taps - 1) * once + of_students - once)


def test_what_an_unrolled_teacher_keeps_for_a_term_by_hand(inputs, tmp_path):
    """Of the one layer that is read: hidden states, or the map of two heads beside the gap."""
    read = {}
    for term in ("hidden", "attention"):
        for unroll in (False, True):
            settings = {"general": [{"term": term}]}
            compute = {"unroll_layers": unroll}
            run = _run(inputs, tmp_path, distillation=settings, compute=compute)
            read[term, unroll] = _price(run, "general").activation_bytes
    once, maps = 4 * 16 * WIDTH, 4 * 2 * WIDTH**2
    assert read["hidden", True] - read["hidden", False] == -once  # one layer for two
    # Rolled: queries and keys of two layers, for Gram matrices.
    assert read["attention", True] - read["attention", False] == 2 * maps - 4 * once


def test_activations_are_near_those_of_the_compiled_program(inputs, tmp_path, monkeypatch):
    """One row a device; XLA's own figure of a stage's gradient grows by as much with each row."""
    sizes = {**STUDENT, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3}
    run = _run(inputs, tmp_path, ["baseline"], student=sizes, num_seeds=1)
    apply, init = make_classifier(run.students[0].sizes, 2)
    key = jax.random.key(0)
    params = init(key)

    def loss(params, ids):
        return jnp.square(apply(params, Text(ids, ids * 0), ids > 0, key).logits).mean()

    def num_bytes(num_rows):
        ids = jnp.ones((num_rows, WIDTH), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(params, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    each = (num_bytes(96) - num_bytes(32)) / 64
    estimate = _price(run, "baseline").activation_bytes
    np.testing.assert_allclose(estimate, each, rtol=0.25)
    three = run._replace(plans={"baseline": run.plans["baseline"]._replace(seeds=(0, 1, 2))})
    assert _price(three, "baseline").activation_bytes == estimate  # one seed at a time, on a CPU
    monkeypatch.setattr(runs_estimate, "runs_seeds_sequentially", lambda mesh: False)
    assert _price(three, "baseline").activation_bytes == 3 * estimate


def test_dry_run_answers_whatever_stands_in_the_run_folder(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs_estimate, "measure_gemm_peak", lambda dtype: 1e3)
    settings = _settings(inputs, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    words = ["run", str(tmp_path / "run.yaml"), "--dry-run", "general=null", "intermediate=null"]
    assert cli.main(words) == 0
    expected = capsys.readouterr().out
    (tmp_path / "run").mkdir()
    for name, text, told in (
        ("thesis.txt", "years of work", "with thesis.txt"),
        ("config.yaml", yaml.safe_dump({**settings, "seed": 3}), "that no run wrote"),
        ("env.json", "{}", "seed: 3 there, 0 here"),
    ):
        (tmp_path / "run" / name).write_text(text)
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(words) == 0
        assert sorted(tmp_path.rglob("*")) == before
        shown = capsys.readouterr().out
        assert "tinybert run would be refused: run_dir" in shown and told in shown
        assert shown.endswith(expected[expected.index("pretrain: 4 steps") :])
