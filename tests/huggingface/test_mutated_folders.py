"""Generated damage to config.json, the index and the header of the weights: refused or read.

`TINYBERT_MUTATIONS` sets how many are tried together (default: 1,500).
"""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from hostile import INDEX, WEIGHTS, join, shards, split
from hypothesis import given, settings
from hypothesis import strategies as st

from tinybert_jax.huggingface.bert import BERT
from tinybert_jax.huggingface.folder import HfModel, convert_params, read_model
from tinybert_jax.huggingface.weights import config_shapes
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.models.params import flatten
from tinybert_jax.tasks.table import task_of

EACH = -(-int(os.environ.get("TINYBERT_MUTATIONS", "1500")) // 3)
STOPS = settings(max_examples=EACH)

# JSON values that a reader may not expect, among those it knows.
VALUES = st.recursive(
    st.sampled_from(
        [None, True, False, 0, -1, 1, 2, 16, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan")]
        + [float("inf"), "", "bert", "distilbert", "relu", "\ud800", "\x1b[2J", "F32", "F8_E4M3"]
        + ["../x", "/etc/passwd", "a\0b", "part-0.safetensors", "TokenClassification", "0", "é"]
    )
    | st.integers()
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=4,
)
KEYS = st.sampled_from(
    "auto_map id2label architectures problem_type model_type vocab_size num_labels pad_token_id "
    "dim n_layers tinybert_answers tinybert_task tinybert_pairs quantization_config weight_map "
    "dtype shape __metadata__ 0 1 classifier.weight bert.encoder.layer.9.output.dense.bias".split()
) | st.text(max_size=6)  # fmt: skip


def change_tree(draw: Any, tree: dict) -> None:
    """Changes, removes, renames or adds one value somewhere in a tree of JSON, in place."""
    places: list[tuple[Any, Any]] = []
    rest: list[Any] = [tree]
    while rest:
        node = rest.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            places.append((node, key))
            if isinstance(value, dict | list):
                rest.append(value)
    kind = draw(st.sampled_from(["set", "set", "remove", "rename", "add", "swap"]))
    if kind == "add" or not places:
        tree[draw(KEYS)] = draw(VALUES)
        return
    node, key = places[draw(st.integers(0, len(places) - 1))]
    if kind == "set":
        node[key] = draw(VALUES)
    elif kind == "swap":
        other, place = places[draw(st.integers(0, len(places) - 1))]
        node[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(node[key])
    elif kind == "rename" and isinstance(node, dict):
        node[draw(KEYS)] = node.pop(key)
    else:
        del node[key]


@st.composite
def damaged(draw, tree: dict) -> bytes:
    """The JSON of `tree` with one to three changes of values, or of bytes."""
    is_bytes = draw(st.integers(0, 3)) == 0
    changed = copy.deepcopy(tree)
    if not is_bytes:
        for _ in range(draw(st.integers(1, 3))):
            change_tree(draw, changed)
        return json.dumps(changed).encode()
    data = bytearray(json.dumps(changed).encode())
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, len(data)))
        last = first + draw(st.sampled_from([0, 1, 1, 2, 40]))
        data[first:last] = draw(st.binary(max_size=3) | st.sampled_from([b"{", b"]", b'"', b"9"]))
    return bytes(data)


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory) -> dict[str, Path]:
    """A good folder for each file that is damaged."""
    root = tmp_path_factory.mktemp("mutated")
    for name in ("config", "index", "header"):
        shutil.copytree(models / "classifier", root / name)
    shards(lambda index: None)(root / "index")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def shapes(folders) -> dict[str, tuple[int, ...]]:
    config = read_model(folders["config"]).config
    abstract = flatten(jax.eval_shape(make_classifier(config, 2)[1], jax.random.key(0)))
    held = {path: tuple(leaf.shape) for path, leaf in abstract.items()}
    return config_shapes(BERT, config, held)


def read(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """As every command begins; only a ValueError with an explanation may come."""
    try:
        model: HfModel = read_model(folder)
        task_of(model)
        convert_params(model, shapes)
    except ValueError as error:
        # A UnicodeError or a JSONDecodeError would be one of Python's own, without explanation.
        assert type(error) is ValueError, repr(error)
        message = str(error)
        assert str(folder) in message and "expected" in message, message
        assert message.isprintable() and len(message) < 2000, message


@pytest.mark.parametrize("file", ["config", "index", "header"])
def test_the_good_folder_is_read(file, folders, shapes):
    model = read_model(folders[file])
    assert not convert_params(model, shapes).missing


@STOPS
@given(data=st.data())
def test_damaged_config(data, folders, shapes):
    file = folders["config"] / "config.json"
    good = json.loads((folders["header"] / "config.json").read_text())
    file.write_bytes(data.draw(damaged(good)))
    read(folders["config"], shapes)


@STOPS
@given(data=st.data())
def test_damaged_index(data, folders, shapes):
    file = folders["index"] / INDEX
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(names(folders)))}
    file.write_bytes(data.draw(damaged({"metadata": {"total_size": 1}, "weight_map": files})))
    read(folders["index"], shapes)


@STOPS
@given(data=st.data())
def test_damaged_header(data, folders, shapes):
    tree, rest = split((folders["config"] / WEIGHTS).read_bytes())
    text = data.draw(damaged(tree))
    length = data.draw(st.sampled_from([len(text)] * 6 + [0, 1, len(text) - 1, 2**40, 2**64 - 1]))
    whole = join(text, rest)
    (folders["header"] / WEIGHTS).write_bytes(length.to_bytes(8, "little") + whole[8:])
    read(folders["header"], shapes)


def names(folders: dict[str, Path]) -> list[str]:
    tree, _ = split((folders["config"] / WEIGHTS).read_bytes())
    return [name for name in tree if name != "__metadata__"]
