"""Stages that train on token stores: what is read, what is refused."""

import json

import numpy as np
import pytest

from tinybert_jax.batches.loader import segment_rows
from tinybert_jax.batches.tokenize import tokenize_corpus
from tinybert_jax.config.data import PrepareConfig
from tinybert_jax.config.run import RunConfig
from tinybert_jax.data.wordpiece import train_wordpiece
from tinybert_jax.recipes import pipeline
from tinybert_jax.tokens.prepare import prepare
from tinybert_jax.tokens.store import open_store

WIDTH = 16
STAGE = {"num_steps": 6, "global_batch_size": 8, "max_length": WIDTH, "learning_rate": 1e-3}
SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": WIDTH,
}


def _documents(seed):
    words = "wave tide harbour sail anchor gull salt deck storm shore oven spoon flour".split()
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, rng.integers(3, 40))) + "." for _ in range(60)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, cheap_programs):
    """(folder, tokenizer): stores a, b and heldout in it."""
    folder = tmp_path_factory.mktemp("stores")
    tokenizer = train_wordpiece(_documents(0) + _documents(1), vocab_size=90)
    tokenizer.save_pretrained(folder / "tokenizer")
    for seed, name in enumerate(("a", "b", "heldout")):
        (folder / f"{name}.txt").write_text("\n\n".join(_documents(seed)))
        prepare(_prepare_config(folder, name), tokenizer)
    return folder, tokenizer


def _prepare_config(folder, name, **more):
    settings = {
        "output": str(folder / name),
        "sources": [str(folder / f"{name}.txt")],
        "tokenizer": str(folder / "tokenizer"),
        "width": WIDTH,
        "workers": 1,
    }
    return PrepareConfig.model_validate({**settings, **more})


def _run_config(folder, run_dir, **more):
    settings = {
        "run_dir": str(run_dir),
        "teacher": SIZES,
        "student": SIZES,
        "tokenizer": {"path": str(folder / "tokenizer")},
        "corpus": {
            "stores": {str(folder / "a"): 3, str(folder / "b"): 1},
            "heldout_store": str(folder / "heldout"),
        },
        "pretrain": {**STAGE, "eval_every": 3},
        "general": STAGE,
    }
    return RunConfig.model_validate({**settings, **more})


def test_segments_of_a_store_are_the_rows_of_its_documents(prepared):
    folder, tokenizer = prepared
    rows = segment_rows(open_store(folder / "a"))
    expected = tokenize_corpus(tokenizer, _documents(0), WIDTH)

    def contents(rows):
        return sorted(tuple(part) for part in np.split(rows.ids, rows.offsets[1:-1]))

    short = [c for c in contents(rows) if len(c) < 4]  # in-memory rows drop a lone word
    assert [c for c in contents(rows) if len(c) >= 4] == contents(expected)
    assert len(short) < 5
    assert (rows.second == rows.lengths).all()


def test_stages_train_on_stores_and_tell_perplexity_on_a_heldout_one(prepared, tmp_path, capsys):
    folder, _ = prepared
    pipeline.main(_run_config(folder, tmp_path / "run"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    perplexity = [row["perplexity"] for row in rows if row["kind"] == "eval"]
    assert len(perplexity) == 2 and perplexity[1] < perplexity[0] < 110
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["heldout"]["perplexity"] == perplexity[1]
    report = (tmp_path / "run" / "report.html").read_text()
    assert f'on held-out text is <b class="teacher">{perplexity[1]:.1f}<' in report
    assert f"perplexity {perplexity[1]:.4g}, " in capsys.readouterr().out
    trained = {row["stage"] for row in rows if row["kind"] == "train"}
    assert trained == {"pretrain", "general"}
    padding = [row["padding_share"] for row in rows if row["kind"] == "train"]
    assert max(padding) < 0.2  # the rows are filled
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()


def test_a_store_of_another_tokenizer_or_width_is_refused_before_anything_is_written(
    prepared, tmp_path
):
    folder, _ = prepared
    other = train_wordpiece(_documents(2), vocab_size=80)
    other.save_pretrained(tmp_path / "other")
    config = _run_config(
        folder, tmp_path / "run", tokenizer={"path": str(tmp_path / "other")}, general=None
    )
    with pytest.raises(ValueError, match="corpus.stores: expected the run's tokenizer"):
        pipeline.main(config)
    corpus = {"stores": {str(folder / "a"): 1, str(folder / "b"): 1e-6}}
    config = _run_config(folder, tmp_path / "run", corpus=corpus, pretrain=STAGE)
    with pytest.raises(ValueError, match="shares of corpora: expected shares above"):
        pipeline.main(config)
    config = _run_config(folder, tmp_path / "run", pretrain={**STAGE, "max_length": 12})
    with pytest.raises(ValueError, match="pretrain.max_length: expected 16, the width"):
        pipeline.main(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrain": {**STAGE, "batching": "pack"}}, "remove .'batching'"),
        ({"corpus": {"stores": {"a": 1}, "heldout_share": 0.1}}, "remove max_documents and"),
        ({"corpus": {"stores": {"a": 1}, "builtin": True}}, "exactly one"),
        ({"corpus": {"files": ["a.txt"], "heldout_store": "b"}}, "heldout_store is for stores"),
        ({"distillation": {"normalisation": "paper_code"}}, "no padding to count"),
        ({"tokenizer": {"vocab_size": 100}}, "corpus.stores have one already"),
        ({"corpus": {"stores": {"a": 1}, "heldout_store": "a"}}, "is trained on"),
        ({"num_seeds": 2, "general": None}, "num_seeds is for students"),
    ],
)
def test_settings_that_stores_cannot_meet_are_refused(prepared, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        _run_config(prepared[0], tmp_path / "run", **change)
