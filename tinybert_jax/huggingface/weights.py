"""The one table between our parameter paths and Hugging Face's BERT names, for both directions."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from tinybert_jax.models.heads import make_classifier, make_masked_lm
from tinybert_jax.models.params import flatten
from tinybert_jax.settings.sizes import ModelConfig


class Entry(NamedTuple):
    """`{i}` in the name marks a layer: our array stacks all layers along axis 0."""

    path: str
    name: str
    is_kernel: bool = False  # ours is [in, out], Hugging Face's [out, in]


def _linear(path: str, name: str) -> tuple[Entry, Entry]:
    return Entry(f"{path}/kernel", f"{name}.weight", True), Entry(f"{path}/bias", f"{name}.bias")


def _norm(path: str, name: str) -> tuple[Entry, Entry]:
    return Entry(f"{path}/scale", f"{name}.weight"), Entry(f"{path}/bias", f"{name}.bias")


_LAYER = "bert.encoder.layer.{i}"
TABLE: tuple[Entry, ...] = (
    Entry("encoder/embeddings/word/embedding", "bert.embeddings.word_embeddings.weight"),
    Entry("encoder/embeddings/position/embedding", "bert.embeddings.position_embeddings.weight"),
    Entry(
        "encoder/embeddings/token_type/embedding", "bert.embeddings.token_type_embeddings.weight"
    ),
    *_norm("encoder/embeddings/norm", "bert.embeddings.LayerNorm"),
    *_linear("encoder/layers/attention/query", f"{_LAYER}.attention.self.query"),
    *_linear("encoder/layers/attention/key", f"{_LAYER}.attention.self.key"),
    *_linear("encoder/layers/attention/value", f"{_LAYER}.attention.self.value"),
    *_linear("encoder/layers/attention/output", f"{_LAYER}.attention.output.dense"),
    *_norm("encoder/layers/attention_norm", f"{_LAYER}.attention.output.LayerNorm"),
    *_linear("encoder/layers/intermediate", f"{_LAYER}.intermediate.dense"),
    *_linear("encoder/layers/output", f"{_LAYER}.output.dense"),
    *_norm("encoder/layers/output_norm", f"{_LAYER}.output.LayerNorm"),
    *_linear("encoder/pooler", "bert.pooler.dense"),
    *_linear("classifier", "classifier"),
    *_linear("transform", "cls.predictions.transform.dense"),
    *_norm("norm", "cls.predictions.transform.LayerNorm"),
    Entry("decoder/bias", "cls.predictions.bias"),
    *_linear("pair", "cls.seq_relationship"),
)

_WORD_TABLE = "bert.embeddings.word_embeddings.weight"
_LM_BIAS = "cls.predictions.bias"
_DECODER_WEIGHT, _DECODER_BIAS = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"

# Names that carry no weight of their own.
_IGNORED = re.compile(r"embeddings\.position_ids$|cls\.predictions\.decoder\.(weight|bias)$")


def to_hf(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our flat parameters to Hugging Face's names and layouts, bit for bit."""
    tensors: dict[str, np.ndarray] = {}
    for entry in TABLE:
        if entry.path not in flat:
            continue
        stacked = flat[entry.path]
        layers = stacked if "{i}" in entry.name else [stacked]
        for i, array in enumerate(layers):
            name = entry.name.format(i=i)
            tensors[name] = np.ascontiguousarray(array.T if entry.is_kernel else array)
    unknown = set(flat) - {entry.path for entry in TABLE}
    assert not unknown, f"paths without a Hugging Face name: {sorted(unknown)}"
    return tensors


class Conversion(NamedTuple):
    """`missing`: our paths that the source lacks; `surplus`: its names that have no place."""

    flat: dict[str, np.ndarray]
    missing: tuple[str, ...]
    surplus: tuple[str, ...]


def from_hf(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> Conversion:
    """Hugging Face tensors to our flat parameters of the given shapes, bit for bit in fp32.

    Accepts names with or without the `bert.` prefix and the old `LayerNorm.gamma/beta`. Raises
    ValueError where a tensor's shape is not the one that the config calls for, where one is not
    finite or not floating-point, and where a masked-LM decoder is not the word table.
    """
    named = _named(tensors)
    if "decoder/bias" in shapes:
        _check_tied(named)
    flat, missing, used = {}, [], set()
    for entry in TABLE:
        if entry.path not in shapes:
            continue
        shape = shapes[entry.path]
        names = _layer_names(entry, shape)
        if not all(name in named for name in names):
            absent = [name for name in names if name not in named]
            if 0 < len(absent) < len(names):
                raise ValueError(f"expected all of {entry.name}, the checkpoint lacks {absent}")
            missing.append(entry.path)
            continue
        used.update(names)
        flat[entry.path] = _stack(entry, [named[name] for name in names], names, shape)
    surplus = [n for n in named if n not in used and not _IGNORED.search(n)]
    return Conversion(flat, tuple(missing), tuple(sorted(surplus)))


def our_shapes(tensors: Mapping[str, np.ndarray], num_layers: int) -> dict[str, tuple[int, ...]]:
    """Our paths and shapes for whatever of the table the tensors hold."""
    named = _named(tensors)
    shapes = {}
    for entry in TABLE:
        array = named.get(entry.name.format(i=0))
        if array is not None:
            each = array.shape[::-1] if entry.is_kernel else array.shape
            shapes[entry.path] = (num_layers, *each) if "{i}" in entry.name else each
    return shapes


# Parts that a folder may have or not; one with a piece of a part has to have all of it.
_PARTS = (
    ("encoder/pooler/",),
    ("transform/", "norm/", "decoder/"),
    ("pair/",),
    ("classifier/",),
)


def config_shapes(
    config: ModelConfig, held: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Our paths and the shapes by the config: the encoder's and those of each part in `held`."""
    absent = [part for part in _PARTS if not any(path.startswith(part) for path in held)]
    unwanted = tuple(prefix for part in absent for prefix in part)
    models = [make_classifier(config, held.get("classifier/kernel", (1,))[-1])]
    if not {"decoder/", "pair/"} <= set(unwanted):
        models.append(make_masked_lm(config, pair_head=True))
    shapes = {}
    for _, init in models:
        abstract = flatten(jax.eval_shape(init, jax.random.key(0)))
        shapes |= {path: tuple(leaf.shape) for path, leaf in abstract.items()}
    return {path: shape for path, shape in shapes.items() if not path.startswith(unwanted)}


def _named(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under today's names."""
    named = {_modern_name(name): array for name, array in tensors.items()}
    if len(named) != len(tensors):
        twice = sorted(name for name in tensors if _modern_name(name) != name)[:4]
        raise ValueError(f"expected each tensor once, got an old and a new name of {twice}")
    if _DECODER_BIAS in named:  # the same tensor by its other name; some writers keep only this
        named.setdefault(_LM_BIAS, named[_DECODER_BIAS])
    return named


def _check_tied(named: Mapping[str, np.ndarray]) -> None:
    for name, twin in ((_DECODER_WEIGHT, _WORD_TABLE), (_DECODER_BIAS, _LM_BIAS)):
        if name in named and not np.array_equal(named[name], named.get(twin, np.empty(0))):
            raise ValueError(
                f"expected {name} to equal {twin}, got a masked-LM decoder with weights of its "
                "own, which this model does not have"
            )


def _layer_names(entry: Entry, shape: tuple[int, ...]) -> list[str]:
    is_stacked = "{i}" in entry.name
    return [entry.name.format(i=i) for i in range(shape[0])] if is_stacked else [entry.name]


def _stack(
    entry: Entry, arrays: list[np.ndarray], names: Iterable[str], shape: tuple[int, ...]
) -> np.ndarray:
    each = shape[1:] if "{i}" in entry.name else shape
    expected = each[::-1] if entry.is_kernel else each
    for name, array in zip(names, arrays, strict=True):
        if array.shape != expected:
            raise ValueError(
                f"{name}: expected shape {list(expected)} from config.json, "
                f"got {list(array.shape)}: the weights belong to another configuration"
            )
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{name}: expected floating-point weights, got {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name}: expected finite weights, got NaN or infinity: the training diverged or "
                "the file is damaged; use an earlier checkpoint"
            )
    kernels = [np.ascontiguousarray(a.T if entry.is_kernel else a, np.float32) for a in arrays]
    return np.stack(kernels) if "{i}" in entry.name else kernels[0]


def _modern_name(name: str) -> str:
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    name = name.replace("LayerNorm.beta", "LayerNorm.bias")
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        return f"bert.{name}"
    return name
