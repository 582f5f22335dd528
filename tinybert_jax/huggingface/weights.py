"""Converts parameters to the tensors of transformers and back, by the table of a family."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from tinybert_jax.huggingface.tensors import shape_of
from tinybert_jax.models.heads import make_classifier, make_masked_lm, make_span_scorer
from tinybert_jax.models.params import flatten
from tinybert_jax.settings.sizes import ModelConfig


class Entry(NamedTuple):
    """A parameter here and in transformers.

    `{i}` in the name is the number of a layer: the array here stacks all layers along axis 0.
    """

    path: str  # in the parameters, as `params.flatten` writes it
    name: str  # in transformers
    is_kernel: bool = False  # [in, out] here, [out, in] in transformers


class Format(NamedTuple):
    """How transformers names the classes, weights and settings of a family."""

    class_prefix: str  # prefix of class names, such as Bert
    base_prefix: str  # prefix of the encoder's tensors in a model with a head, such as "bert."
    table: tuple[Entry, ...]
    # config.json -> fields of `ModelConfig`
    read_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    decoder: str  # masked-LM decoder: `.weight` is the word table, `.bias` the output bias
    word_table: str = "encoder/embeddings/word/embedding"  # our paths of what the decoder's
    output_bias: str = "decoder/bias"  # tensors repeat
    pair_head: str | None = None  # name of the head for pairs of texts; None: the family has none
    pooler_in: tuple[str, ...] = ()  # task heads of the classes with a pooler; ("*",): all classes

    def name_of(self, path: str) -> str:
        """The name in transformers of the parameter `path`."""
        return next(entry.name for entry in self.table if entry.path == path)

    def holds_pooler(self, head: str | None) -> bool:
        """Whether a folder with this task head (None: without a head) has the pooler's weights."""
        return "*" in self.pooler_in or head in self.pooler_in

    @property
    def aliases(self) -> dict[str, str]:
        """Second name of a tensor -> the name in the table."""
        names = {
            f"{self.decoder}.weight": self.name_of(self.word_table),
            f"{self.decoder}.bias": self.name_of(self.output_bias),
        }
        return {alias: name for alias, name in names.items() if alias != name}

    def is_unused(self, name: str) -> bool:
        """Whether a tensor of this name holds no additional parameter."""
        return name in self.aliases or name.endswith("embeddings.position_ids")


def linear(path: str, name: str) -> tuple[Entry, Entry]:
    """The entries of a linear map."""
    return Entry(f"{path}/kernel", f"{name}.weight", True), Entry(f"{path}/bias", f"{name}.bias")


def norm(path: str, name: str) -> tuple[Entry, Entry]:
    """The entries of a LayerNorm."""
    return Entry(f"{path}/scale", f"{name}.weight"), Entry(f"{path}/bias", f"{name}.bias")


def to_hf(form: Format, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Flat parameters in the names and layouts of transformers, bit for bit."""
    tensors: dict[str, np.ndarray] = {}
    for entry in form.table:
        if entry.path not in flat:
            continue
        stacked = flat[entry.path]
        layers = stacked if "{i}" in entry.name else [stacked]
        for i, array in enumerate(layers):
            name = entry.name.format(i=i)
            tensors[name] = np.ascontiguousarray(array.T if entry.is_kernel else array)
    unknown = set(flat) - {entry.path for entry in form.table}
    assert not unknown, f"paths without a Hugging Face name: {sorted(unknown)}"
    return tensors


class Conversion(NamedTuple):
    """The result of `from_hf`."""

    flat: dict[str, np.ndarray]  # fp32 parameters by path
    missing: tuple[str, ...]  # paths without a tensor
    surplus: tuple[str, ...]  # names of tensors without a path


def from_hf(
    form: Format, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> Conversion:
    """Tensors of transformers as flat fp32 parameters of the given shapes, bit for bit.

    Accepts names with or without the `bert.` prefix, and the old `LayerNorm.gamma/beta`. Raises
    ValueError for a tensor of another shape, before any is read; for a tensor that is not finite,
    too large or not floating-point; and for a masked-LM decoder that differs from the word table.
    """
    named = _named(form, tensors)
    places, missing = {}, []
    for entry in form.table:
        if entry.path not in shapes:
            continue
        shape = shapes[entry.path]
        names = _layer_names(entry, shape)
        if not all(name in named for name in names):
            absent = [name for name in names if name not in named]
            if 0 < len(absent) < len(names):
                raise ValueError(
                    f"expected {entry.name} of all {len(names)} layers, got a folder without "
                    f"{absent}; copy it again"
                )
            missing.append(entry.path)
            continue
        for name in names:
            _check_shape(entry, name, shape_of(tensors, named[name]), shape)
        places[entry] = names
    if form.output_bias in shapes:
        _check_tied(form, tensors, named)
    flat = {
        entry.path: _stack(entry, {name: tensors[named[name]] for name in names})
        for entry, names in places.items()
    }
    used = {name for names in places.values() for name in names}
    surplus = [n for n in named if n not in used and not form.is_unused(n)]
    return Conversion(flat, tuple(missing), tuple(sorted(surplus)))


def our_shapes(
    form: Format, tensors: Mapping[str, np.ndarray], num_layers: int
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter in the table that the tensors hold."""
    named = _named(form, tensors)
    shapes = {}
    for entry in form.table:
        name = named.get(entry.name.format(i=0))
        if name is not None:
            held = shape_of(tensors, name)
            shape = held[::-1] if entry.is_kernel else held
            shapes[entry.path] = (num_layers, *shape) if "{i}" in entry.name else shape
    return shapes


def has_tensor(form: Format, names: Iterable[str], path: str) -> bool:
    """Whether the tensors of these names hold the parameter of our path."""
    return form.name_of(path) in (_modern_name(form, name) for name in names)


# Optional parts of a folder. A folder with one tensor of a part needs all tensors of the part.
_PARTS = (
    ("encoder/pooler/",),
    ("transform/", "norm/", "decoder/"),
    ("pair/",),
    ("classifier/",),
    ("spans/",),
)


def config_shapes(
    form: Format, config: ModelConfig, held: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Path -> shape, as the config implies, of the encoder and of the optional parts in `held`."""
    absent = [part for part in _PARTS if not any(path.startswith(part) for path in held)]
    unwanted = tuple(prefix for part in absent for prefix in part)
    num_classes = held.get("classifier/kernel", (1,))[-1]
    models = [make_classifier(config, num_classes), make_span_scorer(config)]
    if not {"decoder/", "pair/"} <= set(unwanted):
        models.append(make_masked_lm(config, pair_head=form.pair_head is not None))
    shapes = {}
    for _, init in models:
        abstract = flatten(jax.eval_shape(init, jax.random.key(0)))
        shapes |= {path: tuple(leaf.shape) for path, leaf in abstract.items()}
    return {path: shape for path, shape in shapes.items() if not path.startswith(unwanted)}


def _named(form: Format, tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Current name -> name in `tensors`; reads no tensor."""
    named = {_modern_name(form, name): name for name in tensors}
    if len(named) != len(tensors):
        twice = sorted(name for name in tensors if _modern_name(form, name) != name)[:4]
        raise ValueError(f"expected every tensor once, got an old and a new name of {twice}")
    for alias, name in form.aliases.items():
        # Some folders have only the alias of the output bias.
        if alias in named and name == form.name_of(form.output_bias):
            named.setdefault(name, named[alias])
    return named


def _check_tied(form: Format, tensors: Mapping[str, np.ndarray], named: Mapping[str, str]) -> None:
    for name, twin in form.aliases.items():
        if name not in named or named[name] == named.get(twin):
            continue
        same = twin in named and np.array_equal(tensors[named[name]], tensors[named[twin]])
        if not same:
            raise ValueError(
                f"expected {name} to equal {twin}, got a masked-LM decoder that is not the word "
                "table; use a model whose decoder is the word table"
            )


def _layer_names(entry: Entry, shape: tuple[int, ...]) -> list[str]:
    is_stacked = "{i}" in entry.name
    return [entry.name.format(i=i) for i in range(shape[0])] if is_stacked else [entry.name]


def _check_shape(entry: Entry, name: str, held: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    layer_shape = wanted[1:] if "{i}" in entry.name else wanted
    expected = layer_shape[::-1] if entry.is_kernel else layer_shape
    if held != expected:
        raise ValueError(
            f"{name}: expected shape {list(expected)} from config.json, "
            f"got {list(held)}: the weights belong to another config.json; "
            "copy the folder again"
        )


# No trained weight comes near; sums and squares of larger ones are soon beyond fp32.
LARGEST_WEIGHT = 1e10


def _stack(entry: Entry, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(
                f"{name}: expected floating-point weights, got {array.dtype}; "
                "use a model that is not quantised"
            )
        lowest, highest = array.min(initial=0), array.max(initial=0)  # NaN where there is a NaN
        if not np.isfinite(lowest) or not np.isfinite(highest):
            raise ValueError(
                f"{name}: expected finite weights, got NaN, infinity or numbers beyond fp32: the "
                "training diverged or the file is damaged; use an earlier checkpoint"
            )
        if (largest := max(highest, -lowest)) > LARGEST_WEIGHT:
            raise ValueError(
                f"{name}: expected weights of at most {LARGEST_WEIGHT:g}, got {largest:g}, from "
                "which outputs overflow: the training diverged or the file is damaged; use an "
                "earlier checkpoint"
            )
    kernels = [
        np.ascontiguousarray(a.T if entry.is_kernel else a, np.float32) for a in arrays.values()
    ]
    return np.stack(kernels) if "{i}" in entry.name else kernels[0]


def _modern_name(form: Format, name: str) -> str:
    """The current name of a tensor with an old LayerNorm name or without the base prefix."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    name = name.replace("LayerNorm.beta", "LayerNorm.bias")
    base = {entry.name for entry in form.table if entry.name.startswith(form.base_prefix)}
    parts = {known.removeprefix(form.base_prefix).split(".")[0] for known in base}
    return f"{form.base_prefix}{name}" if name.split(".")[0] in parts else name
