"""Translation: losses on factors of logits, batches of pairs, and a run from files to a folder."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import yaml
from translation_world import PAIRS, STAGE, STUDENT, write_config, write_pairs

from tinybert_jax import cli
from tinybert_jax.batches.batch import Plan, make_batch
from tinybert_jax.batches.tokenize import tokenize_pairs
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.wordpiece import decode_texts, train_wordpiece
from tinybert_jax.huggingface.encoder_decoder import load_encoder_decoder
from tinybert_jax.inference.seq2seq import TinyBertForConditionalGeneration, translate
from tinybert_jax.losses.pointwise import kl, softmax_cross_entropy
from tinybert_jax.metrics.translation import (
    corpus_scores,
    sentence_counts,
    translation_scores,
)
from tinybert_jax.models.seq2seq import make_seq2seq
from tinybert_jax.objectives.factored import Factors, form_of
from tinybert_jax.objectives.supervised import make_supervised
from tinybert_jax.settings.sizes import EncoderDecoderConfig, ModelConfig

pytest.importorskip("sacrebleu")


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([text for pair in PAIRS for text in pair], vocab_size=90)


def _sizes(tokenizer, layers=1, width=16):
    side = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ids = {
        "decoder_start_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return EncoderDecoderConfig(encoder=side, decoder=side, **ids)


def _factors(seed, units=21, dim=8, vocab=13):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((units, dim), (vocab, dim), (vocab,))
    return Factors(*(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)))


def _whole(factors):
    return factors.hidden @ factors.table.T + factors.bias[None]


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothed_labels_are_those_of_whole_logits(smoothing, num_shards):
    """Value and gradients, with units that do not count."""
    labels = jnp.arange(21) % 13
    weights = (jnp.arange(21) % 4 > 0).astype(jnp.float32)

    def ours(factors):
        form = form_of("vocabulary", num_shards)
        return form.label_loss(factors, labels, weights, label_smoothing=smoothing, count=None)

    def theirs(factors):
        return softmax_cross_entropy(_whole(factors), labels, weights, label_smoothing=smoothing)

    factors = _factors(0)
    found, expected = (jax.value_and_grad(loss)(factors) for loss in (ours, theirs))
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-6)
    reference = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
    chosen = np.asarray(weights) > 0
    logits = torch.tensor(np.asarray(_whole(factors))[chosen])
    value = reference(logits, torch.tensor(np.asarray(labels)[chosen]).long())
    np.testing.assert_allclose(found[0], value, rtol=1e-5)


def test_the_teacher_s_words_are_those_of_whole_logits():
    weights = (jnp.arange(21) % 5 > 0).astype(jnp.float32)
    student, teacher = _factors(0), _factors(1, dim=4)
    form = form_of("vocabulary")
    found = form.teacher_loss(student, teacher, weights, divergence="kl", temperature=2.0)
    expected = kl(_whole(student), _whole(teacher), weights, temperature=2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_packed_pairs_have_the_loss_and_gradients_of_padded_ones(tokenizer):
    examples = Examples(*map(list, zip(*PAIRS, strict=True)), None, None)
    rows = tokenize_pairs(tokenizer, examples, 32)
    sizes = _sizes(tokenizer, layers=2)
    apply, init = make_seq2seq(sizes)
    params = init(jax.random.key(0))
    objective = make_supervised(apply, form="vocabulary", label_smoothing=0.1)

    def value_and_gradients(plan):
        batch = jax.tree.map(jnp.asarray, make_batch(rows, plan, tokenizer.pad_token_id))
        key = jax.random.key(1)
        batch, counts = objective.prepare(batch, key, jnp.zeros(()))
        loss = lambda params: objective.loss(params, batch, counts, None, ())[0]  # noqa: E731
        return float(counts.units), jax.jit(jax.value_and_grad(loss))(params)

    padded = value_and_gradients(Plan(np.array([0, 1, 2, 3, 4, 5, -1, -1]), 24))
    packed = value_and_gradients(Plan(np.array([[4, 0, -1], [1, 2, 5], [3, -1, -1]]), 32))
    assert padded[0] == packed[0] == len(rows.targets.labels)
    for one, two in zip(jax.tree.leaves(padded[1]), jax.tree.leaves(packed[1]), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_the_loss_is_that_of_transformers(tokenizer, tmp_path):
    """Shifted labels, weights and the tied table mean the same."""
    examples = Examples(*map(list, zip(*PAIRS, strict=True)), None, None)
    rows = tokenize_pairs(tokenizer, examples, 32)
    sizes = _sizes(tokenizer)
    apply, init = make_seq2seq(sizes)
    params = init(jax.random.key(0))
    model = TinyBertForConditionalGeneration(sizes, params)
    model.save_pretrained(tmp_path / "model", _both(tokenizer))
    theirs = transformers.EncoderDecoderModel.from_pretrained(tmp_path / "model").eval()
    batch = make_batch(rows, Plan(np.arange(6), 16), tokenizer.pad_token_id)
    objective = make_supervised(apply, form="vocabulary")
    placed = jax.tree.map(jnp.asarray, batch)
    placed, counts = objective.prepare(placed, jax.random.key(0), jnp.zeros(()))
    ours = objective.loss(params, placed, counts, None, ())[0]
    labels = np.where(batch.targets["units"] > 0, batch.targets["labels"], -100)
    with torch.no_grad():
        logits = theirs(
            input_ids=torch.tensor(batch.inputs.input_ids),
            attention_mask=torch.tensor(batch.attention_mask),
            decoder_input_ids=torch.tensor(batch.targets["decoder_input_ids"]),
            decoder_attention_mask=torch.tensor(batch.targets["decoder_mask"]),
        ).logits
    flat = logits.reshape(-1, logits.shape[-1])
    expected = torch.nn.functional.cross_entropy(flat, torch.tensor(labels).long().reshape(-1))
    np.testing.assert_allclose(ours, expected, rtol=2e-5)


def _both(tokenizer):
    from tinybert_jax.huggingface.encoder_decoder import Tokenizers

    return Tokenizers(tokenizer, tokenizer)


def test_the_scores_of_a_selection_are_sacrebleu_s():
    made = ["a dog runs home today", "the cat sleeps", "no word in common at all"]
    right = ["a dog runs home now", "the cat sleeps well", "something else"]
    counts = sentence_counts(made, right)
    for chosen in ([0, 1, 2], [0, 0, 1], [2]):
        found = corpus_scores(counts[chosen])
        expected = translation_scores([made[i] for i in chosen], [right[i] for i in chosen])
        assert [found["bleu"], found["chrf"]] == pytest.approx([own.value for own in expected])


@pytest.fixture
def world(tmp_path):
    write_pairs(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("cheap_programs")
def test_a_run_ends_in_a_folder_that_translates_alike_in_transformers(world, capsys):
    assert cli.main(["run", write_config(world)]) == 0
    told = capsys.readouterr().out
    assert "has translated 12 of 12 sources" in told
    results = json.loads((world / "run" / "results.json").read_text())
    assert [model["role"] for model in results["models"]] == ["teacher", "student", "baseline"]
    for model in results["models"]:
        assert set(model["metrics"]) == {"bleu", "chrf"}
        assert len(model["translations"]) == 12 and model["latency_ms"]["median"] > 0
    ours = TinyBertForConditionalGeneration.from_pretrained(world / "run" / "hf")
    assert ours.config.encoder.num_hidden_layers == 1
    assert ours.config.decoder.num_hidden_layers == 2
    sources = [source for source, _ in PAIRS]
    found = translate(ours, sources, num_beams=1, max_new_tokens=20).lines
    student = next(model for model in results["models"] if model["role"] == "student")
    assert found == [row["translation"] for row in student["translations"][: len(PAIRS)]]
    theirs = transformers.EncoderDecoderModel.from_pretrained(world / "run" / "hf").eval()
    tokens = transformers.AutoTokenizer.from_pretrained(world / "run" / "hf")
    inputs = tokens(sources, return_tensors="pt", padding=True, return_token_type_ids=False)
    ids = theirs.generate(**inputs, num_beams=1, max_new_tokens=20, do_sample=False)
    assert decode_texts(tokens, ids) == found
    # `evaluate` and `compare` give the scores of the run.
    words = [str(world / "train.en"), f"task.dev_target={world / 'train.de'}", "--max-length", "24"]
    assert cli.main(["evaluate", str(world / "run" / "hf"), *words]) == 0
    assert json.loads(capsys.readouterr().out) == student["metrics"] | {"num_examples": 12}
    folders = [str(world / "run" / name) for name in ("models/finetune", "hf")]
    assert cli.main(["compare", *folders, *words, "--max-regressions", "5%"]) == 2
    assert "whose answers are right or wrong, got translation" in capsys.readouterr().err
    assert cli.main(["compare", *folders, *words]) == 0
    assert "bleu" in capsys.readouterr().out
    # Again: nothing is trained or translated.
    assert cli.main(["run", str(world / "run.yaml")]) == 0
    assert "prediction: done before" in capsys.readouterr().out


@pytest.mark.usefixtures("cheap_programs")
def test_a_student_that_starts_from_layers_of_both_sides_learns_from_both(world):
    """With next to no steps it still has the teacher's embeddings, chosen layers and head."""
    sides = ("encoder", "decoder")
    terms = [
        {"term": "logits", "form": "kl"},
        *({"term": "attention", "side": side} for side in (*sides, "cross")),
        *({"term": term, "side": side} for term in ("hidden", "embedding") for side in sides),
    ]
    layers = {"num_hidden_layers": 1, "num_decoder_layers": 1, "init": "teacher_layers"}
    config = write_config(
        world,
        student={**layers, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
        distillation={"prediction": terms},
        prediction={**STAGE, "num_steps": 1, "eval_every": 1, "learning_rate": 1e-9},
        baseline=None,
    )
    assert cli.main(["run", config]) == 0
    models = world / "run" / "models"
    student, teacher = (
        jax.tree_util.tree_leaves_with_path(load_encoder_decoder(models / name).params)
        for name in ("prediction", "finetune")
    )
    for (path, ours), (_, theirs) in zip(student, teacher, strict=True):
        expected = theirs[1:] if len(ours) != len(theirs) else theirs  # the last of two layers
        np.testing.assert_allclose(ours, expected, atol=1e-6, err_msg=str(path))
    logged = map(json.loads, (world / "run" / "metrics.jsonl").read_text().splitlines())
    trained = next(row for row in logged if row["kind"] == "train" and row["stage"] == "prediction")
    parts = {name for name in trained if name.startswith("loss/")}
    assert parts >= {"loss/soft", "loss/attention_3", "loss/hidden_2", "loss/embedding_2"}
    assert (models / "prediction" / "decoder_projection.safetensors").is_file()


@pytest.mark.usefixtures("cheap_programs")
def test_damage_in_the_kept_translations_is_told(world, capsys):
    config = write_config(world, finetune=STAGE, baseline=None)
    assert cli.main(["run", config]) == 0
    (file,) = (world / "run" / "teacher_text").rglob("*.json")
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "texts": ["x", *found["texts"][1:]]}))
    for stage in ("models/prediction", "stages/prediction.json", "checkpoints/prediction"):
        path = world / "run" / stage
        path.unlink() if path.is_file() else [p.unlink() for p in path.rglob("*") if p.is_file()]
    capsys.readouterr()
    assert cli.main(["run", config]) == 2
    assert "expected 12 translations as they were written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, told",
    [
        ({"train_target": "short"}, ("11 lines, a translation", "12", "missing lines")),
        ({"train_target": "blank", "blank": "refuse"}, ("1 blank rows: 3", "blank: drop")),
        ({"train_target": "same"}, ("same text on both sides", "train_target")),
        ({"train_target": "gone"}, ("gone", "nothing")),
        ({"train_target": None, "dev_target": None}, (".jsonl table", "task.train_target")),
    ],
)
def test_files_that_are_not_parallel_are_refused(world, change, told, capsys):
    lines = (world / "train.de").read_text(encoding="utf-8").splitlines()
    for name, content in {
        "short": lines[:-1],
        "blank": [*lines[:2], "  ", *lines[3:]],
        "same": (world / "train.en").read_text().splitlines(),
    }.items():
        (world / name).write_text("\n".join(content) + "\n", encoding="utf-8")
    if change["train_target"] == "short":
        told = (told[1] + " lines", "11", told[2])
    write_config(world)
    tree = yaml.safe_load((world / "run.yaml").read_text())
    named = {k: str(world / v) if k.endswith("target") and v else v for k, v in change.items()}
    tree["task"] |= named | ({"format": "text"} if change["train_target"] is None else {})
    (world / "run.yaml").write_text(yaml.safe_dump(tree))
    assert cli.main(["run", str(world / "run.yaml"), "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in told), message


@pytest.mark.parametrize(
    "sections, told",
    [
        ({"intermediate": STAGE}, "translation has the stages"),
        ({"distillation": {}}, "expected form: kl with translation"),
        ({"prediction": {**STAGE, "head_init": "linear_probe"}}, "words have no probe"),
        ({"finetune": {**STAGE, "r_drop": 1.0}}, "r_drop"),
        ({"task": {"train": "x.tsv", "dev": "x.tsv"}}, "num_decoder_layers is for"),
        ({"distillation": {"prediction": [{"term": "cls"}]}}, "attention, hidden, embedding with"),
        ({"student": {**STUDENT, "init": "teacher_embeddings"}}, "from teacher_layers or from a"),
    ],
)
def test_settings_that_translation_lacks_are_refused(world, sections, told, capsys):
    assert cli.main(["run", write_config(world, **sections), "--print-config"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.usefixtures("cheap_programs")
def test_blank_and_long_rows_are_left_out_and_counted(world, capsys):
    lines = (world / "train.de").read_text(encoding="utf-8").splitlines()
    lines[3], lines[4] = " ", "Hund " * 40
    (world / "train.de").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert cli.main(["run", write_config(world), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "1 rows with a blank side are left out" in told
    assert "finetune: 1 of 11 rows are longer than 24 tokens and left out" in told
    config = yaml.safe_load((world / "run.yaml").read_text())
    config["task"]["long"] = "refuse"
    (world / "run.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["run", str(world / "run.yaml"), "--dry-run"]) == 2
    assert "set task.long=drop" in capsys.readouterr().err


@pytest.mark.usefixtures("cheap_programs")
def test_a_text_with_characters_that_the_vocabulary_lacks_is_counted(world, capsys):
    """A Chinese character that occurs once stays out of a vocabulary trained on the text."""
    lines = (world / "train.de").read_text(encoding="utf-8").splitlines()
    (world / "train.de").write_text("\n".join([lines[0] + " 龘", *lines[1:]]) + "\n", "utf-8")
    assert cli.main(["run", write_config(world), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "1 of 12 targets have characters that the vocabulary" in told
    assert "sources have characters" not in told


@pytest.mark.parametrize("place", ["teacher", "student"])
def test_an_encoder_is_no_translator(world, tokenizer, place, capsys):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(tokenizer), **sizes, intermediate_size=32)
    folder = world / "encoder"
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert (
        cli.main(
            [
                "run",
                write_config(
                    world, **{place: {"path": str(folder)}, "tokenizer": {"path": str(folder)}}
                ),
                "--dry-run",
            ]
        )
        == 2
    )
    told = capsys.readouterr().err
    assert f"{place}: expected a folder of an encoder-decoder" in told, told


def test_a_run_without_sacrebleu_is_refused_before_it_begins(world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert cli.main(["run", write_config(world), "--dry-run"]) == 2
    assert "pip install 'tinybert-jax[translation]'" in capsys.readouterr().err
