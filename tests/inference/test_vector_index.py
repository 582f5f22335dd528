"""An index on disk finds what exact search finds, and belongs to one model and its texts."""

import json

import numpy as np
import pytest

from tinybert_jax.inference import vector_index
from tinybert_jax.inference.search import nearest
from tinybert_jax.inference.vector_index import search_index

faiss = pytest.importorskip("faiss")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def _vectors(count, dim=16, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def _never():
    raise AssertionError("the texts are embedded again")


def test_it_finds_what_exact_search_finds_and_embeds_once(tmp_path, model):
    vectors, queries = _vectors(300), _vectors(7, seed=1)
    texts, options = [f"text {n}" for n in range(300)], {"width": None}
    expected = nearest(vectors, queries, 5)
    for make in (lambda: vectors, _never):
        scores, places = search_index(
            tmp_path / "index", str(model), texts, options, queries, 5, make
        )
        np.testing.assert_array_equal(places, expected[1])
        np.testing.assert_allclose(scores, expected[0], atol=1e-6)
    scores, _ = search_index(tmp_path / "index", str(model), texts, options, queries, 999, _never)
    assert scores.shape == (7, 300)


def test_beyond_many_texts_a_graph_finds_nearly_all(tmp_path, model, monkeypatch):
    monkeypatch.setattr(vector_index, "NUM_EXACT", 100)
    vectors, queries = _vectors(3000), _vectors(50, seed=1)
    texts = [str(n) for n in range(3000)]
    _, places = search_index(
        tmp_path / "index", str(model), texts, {}, queries, 10, lambda: vectors
    )
    index = faiss.read_index(str(tmp_path / "index" / "vectors.faiss"))
    assert isinstance(index, faiss.IndexHNSW)
    _, expected = nearest(vectors, queries, 10)
    found = [len({*own} & {*exact}) for own, exact in zip(places, expected, strict=True)]
    assert sum(found) >= 0.95 * 500


@pytest.mark.parametrize(
    "change, told",
    [
        ("texts", "one of other texts"),
        ("weights", "one of other weights"),
        ("options", "with another --max-length or --width"),
        ("bytes", "something else or damaged"),
        ("about", "something else or damaged"),
        ("folder", "something else or damaged"),
    ],
)
def test_another_index_is_refused_and_left_as_it_is(change, told, tmp_path, model):
    folder, texts, options = tmp_path / "index", ["a", "b"], {"width": None}
    search_index(folder, str(model), texts, options, _vectors(1), 1, lambda: _vectors(2))
    if change == "texts":
        texts = ["a", "c"]
    elif change == "weights":
        (model / "model.safetensors").write_bytes(b"others")
    elif change == "options":
        options = {"width": 8}
    elif change == "about":
        (folder / "index.json").write_text(json.dumps([1]))
    elif change == "bytes":
        content = bytearray((folder / "vectors.faiss").read_bytes())
        content[-1] ^= 1
        (folder / "vectors.faiss").write_bytes(content)
    else:
        (folder / "index.json").unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=told):
        search_index(folder, str(model), texts, options, _vectors(1), 1, _never)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
