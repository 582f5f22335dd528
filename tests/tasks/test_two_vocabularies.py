"""Translation with a vocabulary of its own for the targets."""

import json

import jax
import numpy as np
import pytest
import transformers
import yaml
from translation_world import PAIRS, STAGE, write_config, write_pairs

from tinybert_jax import cli
from tinybert_jax.batches.batch import Plan, make_batch
from tinybert_jax.batches.tokenize import tokenize_pairs
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.wordpiece import decode_texts, train_wordpiece
from tinybert_jax.huggingface.encoder_decoder import load_encoder_decoder, load_tokenizers
from tinybert_jax.inference.seq2seq import TinyBertForConditionalGeneration, translate


@pytest.fixture
def world(tmp_path):
    write_pairs(tmp_path)
    return tmp_path


OWN = {"vocab_size": 60, "target_vocab_size": 50, "lowercase": False}


def test_each_side_has_the_ids_of_its_tokenizer():
    sources, targets = (list(side) for side in zip(*PAIRS, strict=True))
    one, two = train_wordpiece(sources, vocab_size=60), train_wordpiece(targets, vocab_size=50)
    pairs = Examples(sources, targets, None, None)
    rows = tokenize_pairs(one, pairs, 24, target_tokenizer=two)
    assert rows.targets is not None
    np.testing.assert_array_equal(rows.ids, np.concatenate(one(sources)["input_ids"]))
    expected = [ids[1:] for ids in two(targets)["input_ids"]]
    np.testing.assert_array_equal(rows.targets.labels, np.concatenate(expected))
    # The padding of sources may have an id that the targets' table lacks.
    batch = make_batch(rows, Plan(np.arange(len(PAIRS)), 24), pad_token_id=59)
    assert batch.inputs.input_ids.max() == 59
    assert batch.targets["decoder_input_ids"].max() < 50


@pytest.mark.usefixtures("cheap_programs")
def test_a_run_with_two_vocabularies_ends_in_a_folder_with_both(world, capsys):
    """Trained, distilled at all levels, started from layers, scored and read in transformers."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    student = {"num_hidden_layers": 1, "num_decoder_layers": 1, "init": "teacher_layers", **sizes}
    terms = [{"term": "logits", "form": "kl"}, {"term": "hidden", "side": "decoder"}]
    config = write_config(
        world,
        tokenizer=OWN,
        student=student,
        finetune={**STAGE, "num_steps": 60, "eval_every": 60},
        distillation={"targets": "teacher", "num_beams": 2, "prediction": terms},
        baseline=None,
    )
    assert cli.main(["run", config]) == 0
    folder = world / "run" / "hf"
    source, target = load_tokenizers(folder)
    vocabularies = [tokenizer.get_vocab() for tokenizer in (source, target)]
    assert [len(own) for own in vocabularies] == [
        len(load_encoder_decoder(folder).params[side]["embeddings"]["word"]["embedding"])
        for side in ("encoder", "decoder")
    ]
    assert vocabularies[0] != vocabularies[1] and "d" in vocabularies[0]
    assert set(vocabularies[1]) >= set("ÄäDH") & set("".join(german for _, german in PAIRS))
    sources = [english for english, _ in PAIRS]
    ours = TinyBertForConditionalGeneration.from_pretrained(folder)
    found = translate(ours, sources, num_beams=1, max_new_tokens=20).lines
    theirs = transformers.EncoderDecoderModel.from_pretrained(folder).eval()
    inputs = source(sources, return_tensors="pt", padding=True, return_token_type_ids=False)
    ids = theirs.generate(**inputs, num_beams=1, max_new_tokens=20, do_sample=False)
    assert decode_texts(target, ids) == found
    results = json.loads((world / "run" / "results.json").read_text())
    scores = next(model for model in results["models"] if model["role"] == "student")
    assert found == [row["translation"] for row in scores["translations"][: len(PAIRS)]]
    capsys.readouterr()
    words = [str(world / "train.en"), f"task.dev_target={world / 'train.de'}", "--max-length", "24"]
    assert cli.main(["evaluate", str(folder), *words]) == 0
    assert json.loads(capsys.readouterr().out) == scores["metrics"] | {"num_examples": 12}
    # A second run starts from the folder, whose two tokenizers come with it.
    tree = yaml.safe_load((world / "run.yaml").read_text())
    again = tree | {"run_dir": str(world / "again"), "teacher": {"finetuned": str(folder), **sizes}}
    again |= {"tokenizer": {"path": str(folder)}, "finetune": None}
    again["teacher"] |= {"num_hidden_layers": 1, "num_decoder_layers": 1}
    again["teacher"] |= {"max_position_embeddings": 32}
    again["prediction"] = {**STAGE, "num_steps": 1, "eval_every": 1, "learning_rate": 1e-9}
    (world / "again.yaml").write_text(yaml.safe_dump(again))
    for _ in range(2):  # the second time with the tokenizers that the run folder keeps
        assert cli.main(["run", str(world / "again.yaml")]) == 0
    first, second = (
        jax.tree.leaves(load_encoder_decoder(world / run / "hf").params) for run in ("run", "again")
    )
    for one, two in zip(first, second, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    # A folder's vocabulary of targets is the one that `target_path` takes.
    named = {"path": str(folder), "target_path": str(folder)}
    (world / "third.yaml").write_text(
        yaml.safe_dump(again | {"run_dir": str(world / "third"), "tokenizer": named})
    )
    assert cli.main(["run", str(world / "third.yaml"), "--dry-run"]) == 0
    # Another vocabulary of the targets alone is refused.
    named = {"path": str(folder), "target_vocab_size": 40}
    (world / "third.yaml").write_text(
        yaml.safe_dump(again | {"run_dir": str(world / "third"), "tokenizer": named})
    )
    capsys.readouterr()
    assert cli.main(["run", str(world / "third.yaml")]) == 2
    assert "expected the run's tokenizer to be that of the teacher" in capsys.readouterr().err
    card = (folder / "README.md").read_text()
    assert 'AutoTokenizer.from_pretrained("FOLDER", subfolder="decoder_tokenizer")' in card


@pytest.mark.parametrize(
    "tokenizer, told",
    [
        ({**OWN, "target_path": "folder"}, "set one of them"),
        ({**OWN, "target_vocab_size": 3}, "tokenizer.target_vocab_size: expected a vocabulary of"),
        ({"vocab_size": 60, "target_path": "a/b/gone"}, "tokenizer.target_path: a/b/gone: "),
    ],
)
def test_wrong_settings_are_refused(world, tokenizer, told, capsys):
    assert cli.main(["run", write_config(world, tokenizer=tokenizer), "--dry-run"]) == 2
    assert told in capsys.readouterr().err


def test_the_setting_is_for_translation_alone(world, capsys):
    config = write_config(world, tokenizer=OWN)
    tree = yaml.safe_load((world / "run.yaml").read_text())
    tree["task"] = {"kind": "classification", "train": "a.csv", "dev": "b.csv"}
    (world / "run.yaml").write_text(yaml.safe_dump(tree))
    assert cli.main(["run", config, "--dry-run"]) == 2
    assert "of the targets of a translation: leave it out" in capsys.readouterr().err
