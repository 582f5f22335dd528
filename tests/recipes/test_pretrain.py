"""Pretraining beyond the masked LM: pairs of sentences, phases."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from reference import VOCAB, our_config, our_params, random_bert
from transformers import BertForPreTraining

from tinybert_jax.batches.batch import Batch
from tinybert_jax.batches.tokenize import tokenize_corpus
from tinybert_jax.config import load as config_files
from tinybert_jax.config.data import PrepareConfig
from tinybert_jax.config.run import RunConfig
from tinybert_jax.config.stages import PRETRAIN, PretrainSection
from tinybert_jax.data.wordpiece import train_wordpiece
from tinybert_jax.models.heads import make_masked_lm
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.params import flatten
from tinybert_jax.objectives.masked_lm import make_mlm
from tinybert_jax.objectives.objective import count_units
from tinybert_jax.recipes import pipeline
from tinybert_jax.runs.preflight import open_run
from tinybert_jax.runs.stage_batches import make_stage_batches
from tinybert_jax.tokens.prepare import prepare
from tinybert_jax.tokens.store import open_store

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
    tokenizer = train_wordpiece(_documents(0), vocab_size=90)
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


def test_pair_head_equals_torch():
    model = random_bert(BertForPreTraining)
    apply, init = make_masked_lm(our_config(model), pair_head=True)
    rng = np.random.default_rng(0)
    ids = rng.integers(5, len(VOCAB), (5, 12)).astype(np.int32)
    mask = np.arange(12)[None] < np.array([12, 7, 1, 12, 5])[:, None]
    types = np.where(np.arange(12)[None] < 6, 0, mask).astype(np.int32)
    ours = jax.jit(apply)(our_params(model, init), Text(ids, types), mask).pair_logits
    with torch.no_grad():
        theirs = model.double()(*(torch.tensor(x).long() for x in (ids, mask, types)))
    np.testing.assert_allclose(ours, theirs.seq_relationship_logits, atol=2e-5)


def test_masked_lm_with_pairs_equals_transformers():
    """BertForPreTraining's loss: the mean over masked tokens and that over rows with a pair."""
    model = random_bert(BertForPreTraining, **DRY)
    apply, init = make_masked_lm(our_config(model), pair_head=True)
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 61, (5, 12)).astype(np.int32)
    types = np.tile(np.arange(12)[None] // 6, (5, 1))
    positions = np.array([[1, 5], [2, 0], [0, 0], [3, 4], [11, 0]])
    tokens = np.array([[7, 8], [9, -100], [-100, -100], [6, 5], [10, -100]])
    pairs = np.array([0, 1, -1, 1, 0])
    targets = {"positions": positions, "tokens": tokens, "pair_labels": pairs}
    batch = Batch(Text(ids, types), np.ones(ids.shape, bool), targets, np.ones(5, np.float32))
    batch = jax.tree.map(jnp.asarray, batch)
    counts = count_units(batch)._replace(predictions=jnp.float32(6), labelled_rows=jnp.float32(4))
    objective = make_mlm(
        apply,
        mask_rate=0.15,
        mask_token_id=4,
        special_token_ids=(0, 1, 2),
        vocab_size=61,
        max_chunk_size=3,
        pair_weight=1.0,
    )
    params = our_params(model, init)
    (value, parts), grads = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))(
        params, batch, counts, None, ()
    )

    theirs = np.full(ids.shape, -100)
    rows, slots = np.nonzero(tokens != -100)
    theirs[rows, positions[rows, slots]] = tokens[rows, slots]
    loss = model(
        input_ids=torch.tensor(ids).long(),
        token_type_ids=torch.tensor(types).long(),
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
    settings = _config(
        prepared, tmp_path / "run", stores=["pairs"], heldout="pairs_heldout", pair_weight=1.0
    )
    pipeline.main(settings)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (trained,) = [row for row in rows if row["kind"] == "train"]
    np.testing.assert_allclose(
        trained["loss"], trained["loss/pair"] + trained["loss/masked_lm"], rtol=1e-5
    )
    *_, judged = [row for row in rows if row["kind"] == "eval"]
    store = open_store(prepared / "pairs_heldout")
    num_pairs = (store.gather(np.arange(store.num_rows)).labels >= 0).sum()
    num_right = judged["pair_accuracy"] * num_pairs
    assert num_pairs > 0 and abs(num_right - round(num_right)) < 1e-4
    _, info = BertForPreTraining.from_pretrained(tmp_path / "run" / "hf", output_loading_info=True)
    assert not any(info[name] for name in ("unexpected_keys", "missing_keys", "mismatched_keys"))


@pytest.mark.parametrize("stores", [["long"], ["pairs", "long"], ["pairs", "order"]])
def test_pairs_without_one_kind_of_label_are_refused(prepared, tmp_path, stores):
    settings = _config(prepared, tmp_path / "run", stores=stores, pair_weight=1.0)
    with pytest.raises(ValueError, match="expected stores with one kind of pair label"):
        pipeline.main(settings)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="pair_weight needs corpus.stores"):
        _config(prepared, tmp_path / "run", pair_weight=1.0)


PHASES = [
    {"share": 0.5, "global_batch_size": 8, "max_length": 16},
    {"share": 0.25, "max_length": 16},
]


@pytest.mark.parametrize("stores", [[], ["short", "long"]])
def test_each_phase_goes_through_the_rows_of_its_length_from_the_start(prepared, tmp_path, stores):
    """The first epoch of each phase has every row once, in an order of its own."""
    more = {"num_steps": 80} | ({} if stores else {"batching": "pad"})
    settings = _config(prepared, tmp_path / "run", stores=stores, phases=PHASES, **more)
    orders = []
    with open_run(settings, [PRETRAIN]) as run:
        stage_batches = make_stage_batches(run, run.plans["pretrain"])
        tokenizer = run.tokenizer
    for start, stop, size, width in ((0, 40, 8, 16), (40, 60, 16, 16), (60, 80, 16, 32)):
        batches = [stage_batches.batch_at(step) for step in range(start, stop)]
        assert {batch.shape for batch in batches} == {(size, width)}
        seen = [row.tobytes() for b in batches for row in b.inputs.input_ids[b.weights > 0]]
        if stores:
            store = open_store(prepared / ("short" if width == 16 else "long"))
            rows = store.gather(np.arange(store.num_rows)).ids
        else:
            ragged = tokenize_corpus(tokenizer, _documents(0), width)
            rows = [np.pad(r, (0, width - len(r))) for r in np.split(ragged.ids, ragged.offsets)]
            rows = np.array(rows[1:-1], np.int32)
        assert len(seen) > len(rows)
        assert sorted(seen[: len(rows)]) == sorted(row.tobytes() for row in rows)
        orders.append(seen[:20])
    assert orders[0] != orders[1]


def test_a_phase_without_rows_and_a_store_without_a_phase_are_refused(prepared, tmp_path):
    settings = _config(prepared, tmp_path / "run", stores=["long"], phases=PHASES)
    with pytest.raises(ValueError, match="pretrain.phases.0.max_length: expected 32, .* got 16"):
        pipeline.main(settings)
    settings = _config(prepared, tmp_path / "run", stores=["short", "long"])
    with pytest.raises(ValueError, match="expected rows as wide as a stage's max_length.*short"):
        pipeline.main(settings)
    odd = [{"share": 0.5, "global_batch_size": 12}]
    settings = _config(prepared, tmp_path / "run", stores=["long"], phases=odd)
    with pytest.raises(ValueError, match="pretrain.phases.0.global_batch_size: expected a mul"):
        pipeline.main(settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phases": PHASES, "num_steps": None, "num_epochs": 1}, "shares of num_steps"),
        ({"phases": [{"share": 0.5}]}, "another max_length or global_batch_size.*neither"),
        ({"phases": [{"share": 0.5, "max_length": 32}]}, "another max_length or global_batch"),
        (
            {"phases": [PHASES[0], {"share": 0.5, "max_length": 8}]},
            "one of the 8 steps after them, .* .0, 4, 8",
        ),
        ({"phases": [{"share": 0.05, "max_length": 8}]}, "expected phases of at least one step"),
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


def test_a_misspelt_key_of_a_phase_gets_the_nearest_of_a_phase(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("pretrain: {phases: [{share: 0.5, max_lenght: 8}]}")
    with pytest.raises(ValueError, match=r"phases.0.max_lenght: .* did you mean 'max_length'"):
        config_files.load(file, [])


def test_shorter_phases_keep_the_buckets_that_fit():
    section = PretrainSection.model_validate(
        {**STAGE, "length_buckets": [8, 24, 32], "phases": [{"share": 0.5, "max_length": 16}]}
    )
    assert [part.section.buckets() for part in section.parts()] == [(8, 16), (8, 24, 32)]
