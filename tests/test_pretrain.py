"""Pretraining beyond the masked LM: pairs of sentences, phases, more words."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from reference import SIZES, VOCAB, our_config, our_params, random_bert, write_bert  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    BertForPreTraining,
)

from tinybert_jax import cli, objectives  # noqa: E402
from tinybert_jax.data import vocab  # noqa: E402
from tinybert_jax.data.pipeline import Batch  # noqa: E402
from tinybert_jax.data.prepare import prepare  # noqa: E402
from tinybert_jax.data.store import open_store  # noqa: E402
from tinybert_jax.data_sections import PrepareConfig  # noqa: E402
from tinybert_jax.feed import corpus_feed  # noqa: E402
from tinybert_jax.model.heads import make_masked_lm  # noqa: E402
from tinybert_jax.recipes import pipeline  # noqa: E402
from tinybert_jax.run import open_run  # noqa: E402
from tinybert_jax.sections import RunConfig  # noqa: E402
from tinybert_jax.stage_sections import PretrainSection  # noqa: E402
from tinybert_jax.tree import flatten  # noqa: E402

DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WORDS = "wave tide harbour sail anchor gull salt deck storm shore oven spoon flour".split()
TEACHER = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
STAGE = {"num_steps": 8, "global_batch_size": 16, "max_length": 32, "learning_rate": 1e-3}


def _documents(seed):
    """Each of sentences that end in a full stop."""
    rng = np.random.default_rng(seed)
    sentence = lambda: " ".join(rng.choice(WORDS, rng.integers(3, 9))) + "."  # noqa: E731
    return [" ".join(sentence() for _ in range(rng.integers(2, 7))) for _ in range(60)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with text, its tokenizer and stores of it by name."""
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = vocab.train_wordpiece(_documents(0), vocab_size=90)
    tokenizer.save_pretrained(folder / "tokenizer")
    for seed, name in enumerate(("text", "heldout")):
        (folder / f"{name}.txt").write_text("\n\n".join(_documents(seed)))
    stores = {
        "pairs": ("text", {"mode": "pairs", "width": 32}),
        "pairs_heldout": ("heldout", {"mode": "pairs", "width": 32}),
        "order": ("text", {"mode": "pairs", "width": 32, "pair_label": "sentence_order"}),
        "short": ("text", {"width": 16}),
        "long": ("text", {"width": 32}),
    }
    for name, (source, settings) in stores.items():
        given = {"output": str(folder / name), "sources": [str(folder / f"{source}.txt")]}
        given |= {"tokenizer": str(folder / "tokenizer"), "workers": 1}
        prepare(PrepareConfig.model_validate({**given, **settings}), tokenizer)
    return folder


def _config(prepared, run_dir, *, stores=(), heldout=None, **stage):
    paths = {str(prepared / name): 1 for name in stores}
    corpus = {"stores": paths} if paths else {"files": [str(prepared / "text.txt")]}
    if heldout:
        corpus["heldout_store"] = str(prepared / heldout)
    return RunConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "teacher": TEACHER,
            "tokenizer": {"path": str(prepared / "tokenizer")},
            "corpus": corpus,
            "pretrain": {**STAGE, **stage},
        }
    )


def test_masked_lm_with_pairs_equals_transformers():
    """BertForPreTraining's loss: the mean over masked tokens and that over rows with a pair."""
    model = random_bert(BertForPreTraining, **DRY)
    apply, init = make_masked_lm(our_config(model), pair_head=True)
    rng = np.random.default_rng(0)
    ids, types = rng.integers(5, 61, (5, 12)).astype(np.int32), np.arange(12)[None] // 6
    batch = Batch(ids, np.ones(ids.shape, bool), np.tile(types, (5, 1)), 0, np.ones(5, np.float32))
    positions = np.array([[1, 5], [2, 0], [0, 0], [3, 4], [11, 0]])
    tokens = np.array([[7, 8], [9, -100], [-100, -100], [6, 5], [10, -100]])
    pairs = np.array([0, 1, -1, 1, 0])
    counts = objectives.Counts(*(jnp.float32(n) for n in (5, 60, 720, 6, 4)))
    labels = objectives.MaskedLabels(*map(jnp.asarray, (positions, tokens, pairs)))
    objective = objectives.make_mlm(
        apply,
        mask_rate=0.15,
        mask_token_id=4,
        special_token_ids=(0, 1, 2),
        vocab_size=61,
        chunk_size=3,
        pair_weight=1.0,
    )
    params = our_params(model, init)
    (value, parts), grads = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))(
        params, jax.tree.map(jnp.asarray, batch._replace(labels=labels)), counts, None, ()
    )

    theirs = np.full(ids.shape, -100)
    rows, slots = np.nonzero(tokens != -100)
    theirs[rows, positions[rows, slots]] = tokens[rows, slots]
    loss = model(
        input_ids=torch.tensor(ids).long(),
        token_type_ids=torch.tensor(batch.token_type_ids).long(),
        labels=torch.tensor(theirs),
        next_sentence_label=torch.tensor(np.where(pairs < 0, -100, pairs)),
    ).loss
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(parts["loss/masked_lm"] + parts["loss/pair"], value, rtol=1e-6)
    for parameter in model.parameters():
        parameter.data = parameter.grad
    ours, expected = flatten(grads), flatten(our_params(model, init))
    whole = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in expected.values()))
    for path, leaf in expected.items():
        error = np.linalg.norm(ours[path] - leaf)
        assert error <= 1e-5 * np.linalg.norm(leaf) + 1e-6 * whole, path


def test_pretraining_on_pairs_ends_in_a_folder_with_both_heads(prepared, tmp_path):
    config = _config(
        prepared, tmp_path / "run", stores=["pairs"], heldout="pairs_heldout", pair_weight=1.0
    )
    pipeline.main(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (trained,) = [row for row in rows if row["kind"] == "train"]
    assert 0.3 < trained["loss/pair"] < 1.2
    np.testing.assert_allclose(
        trained["loss"], trained["loss/pair"] + trained["loss/masked_lm"], rtol=1e-5
    )
    *_, judged = [row for row in rows if row["kind"] == "eval"]
    labels = open_store(prepared / "pairs_heldout").gather(np.arange(87)).labels
    always = [(labels == answer).sum() / (labels >= 0).sum() for answer in (0, 1)]
    assert min(always) - 1e-6 <= judged["pair_accuracy"] <= max(always) + 1e-6
    _, info = BertForPreTraining.from_pretrained(tmp_path / "run" / "hf", output_loading_info=True)
    assert not any(info[name] for name in ("unexpected_keys", "missing_keys", "mismatched_keys"))


@pytest.mark.parametrize("stores", [["long"], ["pairs", "long"], ["pairs", "order"]])
def test_pairs_without_one_kind_of_label_are_refused(prepared, tmp_path, stores):
    config = _config(prepared, tmp_path / "run", stores=stores, pair_weight=1.0)
    with pytest.raises(ValueError, match="expected stores with one kind of pair label"):
        pipeline.main(config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="pair_weight needs corpus.stores"):
        _config(prepared, tmp_path / "run", pair_weight=1.0)


PHASES = [
    {"share": 0.25, "global_batch_size": 8, "max_length": 16},
    {"share": 0.5, "max_length": 16},
]


@pytest.mark.parametrize("stores", [[], ["short", "long"]])
def test_phases_begin_with_shorter_rows_and_smaller_batches(prepared, tmp_path, stores):
    more = {} if stores else {"batching": "pad"}
    config = _config(prepared, tmp_path / "run", stores=stores, phases=PHASES, **more)
    with open_run(config, ["pretrain"]) as run:
        feed = corpus_feed(run, "pretrain")
        batches = [feed.batch_at(step) for step in range(8)]
        shapes = [batch.input_ids.shape for batch in batches]
        assert shapes == [(8, 16)] * 2 + [(16, 16)] * 4 + [(16, 32)] * 2
        for step in (7, 2, 0, 5):
            np.testing.assert_array_equal(feed.batch_at(step).input_ids, batches[step].input_ids)
    pipeline.main(config)
    assert (tmp_path / "run" / "hf" / "config.json").is_file()


def test_a_phase_without_rows_and_a_store_without_a_phase_are_refused(prepared, tmp_path):
    config = _config(prepared, tmp_path / "run", stores=["long"], phases=PHASES)
    with pytest.raises(ValueError, match="pretrain.max_length: expected 32, .* got 16"):
        pipeline.main(config)
    config = _config(prepared, tmp_path / "run", stores=["short", "long"])
    with pytest.raises(ValueError, match="expected rows as wide as a stage's max_length.*short"):
        pipeline.main(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phases": PHASES, "num_steps": None, "num_epochs": 1}, "shares of num_steps"),
        ({"phases": [{"share": 0.5}]}, "expected max_length or global_batch_size"),
        ({"phases": [PHASES[0], {"share": 0.75, "max_length": 8}]}, "leave some steps"),
        ({"phases": [{"share": 0.5, "max_length": 64}]}, "at most max_length = 32"),
        (
            {"phases": [{"share": 0.5, "global_batch_size": 6}], "gradient_accumulation_steps": 4},
            "multiple of gradient_accumulation_steps = 4, got 6",
        ),
    ],
)
def test_phases_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PretrainSection.model_validate({**STAGE, **settings})


def test_shorter_phases_keep_the_buckets_that_fit():
    section = PretrainSection.model_validate(
        {**STAGE, "length_buckets": [8, 24, 32], "phases": [{"share": 0.5, "max_length": 16}]}
    )
    assert [part.buckets() for _, part in section.by_phase()] == [(8, 16), (8, 24, 32)]


@pytest.fixture
def letters(tmp_path):
    """A masked LM whose vocabulary has letters only, and text of three words."""
    model = random_bert(BertForMaskedLM)
    folder = write_bert(tmp_path / "model", model)
    (tmp_path / "text.txt").write_text("sea wave\n" * 5 + "tide sea a\n" + "Wave wave\n" * 2)
    return folder, model, tmp_path / "text.txt"


def test_new_words_begin_as_the_mean_of_their_pieces(letters, tmp_path, capsys):
    folder, model, text = letters
    target = tmp_path / "more"
    arguments = ["data", "extend", str(folder), str(text), "-o", str(target)]
    assert cli.main(arguments) == 0
    assert "2 new words, wave, sea" in capsys.readouterr().out  # 9 and 6 times; tide once

    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.tokenize("Sea waves abc") == ["sea", "wave", "##s", "a", "##b", "##c"]
    assert tokenizer.convert_tokens_to_ids(["wave", "sea"]) == [len(VOCAB), len(VOCAB) + 1]
    extended = AutoModelForMaskedLM.from_pretrained(target).eval()
    assert extended.config.vocab_size == len(VOCAB) + 2
    old, new = model.state_dict(), extended.state_dict()
    pieces = [VOCAB.index(piece) for piece in ("s", "##e", "##a")]
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        np.testing.assert_array_equal(new[name][: SIZES["vocab_size"]], old[name])
        np.testing.assert_allclose(new[name][-1], old[name][pieces].mean(0), rtol=1e-6, atol=1e-7)
    assert all(
        torch.equal(new[name], old[name]) for name in old if new[name].shape == old[name].shape
    )

    before = (target / "model.safetensors").read_bytes()
    assert cli.main(arguments) == 2
    assert "does not exist yet" in capsys.readouterr().err
    assert (target / "model.safetensors").read_bytes() == before


def test_words_are_as_many_and_as_common_as_asked(letters, tmp_path, capsys):
    folder, _, text = letters
    arguments = ["data", "extend", str(folder), str(text), "-o"]
    assert cli.main([*arguments, str(tmp_path / "one"), "--words", "1"]) == 0
    assert "sea" not in AutoTokenizer.from_pretrained(tmp_path / "one").get_vocab()
    assert cli.main([*arguments, str(tmp_path / "all"), "--min-count", "1"]) == 0
    assert "tide" in AutoTokenizer.from_pretrained(tmp_path / "all").get_vocab()
    assert cli.main([*arguments, str(tmp_path / "none"), "--min-count", "10"]) == 2
    assert "10 times or more in the text, found none" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
