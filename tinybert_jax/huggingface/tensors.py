"""Reads the weights of a Hugging Face model folder: safetensors, one file or shards."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinybert_jax.huggingface.header import read_shapes
from tinybert_jax.huggingface.untrusted import is_plain_name, read_json, shorten

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a folder by name, floats as fp32; a tensor is read when it is asked for.

    The files stay open: do not overwrite them in place while an object of this class is in use.
    """

    def __init__(self, files: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]):
        self._files = files  # name -> the open safetensors file that holds the tensor
        self._shapes = shapes

    def __getitem__(self, name: str) -> np.ndarray:
        """Floats as fp32, which holds bfloat16 and float16 exactly; integers do not change."""
        array = self.stored(name)
        is_integer = np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_
        if is_integer:
            return array
        with np.errstate(over="ignore"):  # infinity, which is refused where the weight is used
            return array.astype(np.float32)

    def stored(self, name: str) -> np.ndarray:
        """A tensor in the number format of its file."""
        return self._files[name].get_tensor(name)

    def without(self, names: Iterable[str]) -> "Tensors":
        """All tensors but these; reads none."""
        left_out = frozenset(names)
        rest = {name: file for name, file in self._files.items() if name not in left_out}
        return Tensors(rest, self._shapes)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor; reads none."""
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header of its file."""
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def shape_of(tensors: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    """The shape of a tensor; one of a file is not read for it."""
    return tensors.shape(name) if isinstance(tensors, Tensors) else tensors[name].shape


def open_tensors(folder: Path) -> Tensors:
    """Reads the headers of all weight files; raises ValueError with the name of a wrong file.

    A folder may have both an index and a single file, but then with the same weights: transformers
    reads the single file, and this function the files of the index.
    """
    index = folder / INDEX
    return _open_shards(index) if index.is_file() else _open_file(folder / WEIGHTS)


def _open_shards(index: Path) -> Tensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(
            f"{index}: expected weight_map with the file of every tensor, got "
            f"{shorten(weight_map)}; copy the folder again"
        )
    files, shapes = {}, {}
    for name in sorted(set(weight_map.values())):
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: expected plain .safetensors file names, got {name!r}; correct it"
            )
        part = _open_file(index.parent / name)
        expected = {tensor for tensor, file in weight_map.items() if file == name}
        if set(part) != expected:
            difference = sorted(set(part) ^ expected)[:4]
            raise ValueError(
                f"{index.parent / name}: expected the tensors that {INDEX} lists, got other names: "
                f"{shorten(difference)}; copy the folder again"
            )
        files |= part._files
        shapes |= part._shapes
    if not files:
        raise ValueError(f"{index}: expected weights, got an empty weight_map; copy it again")
    tensors, single = Tensors(files, shapes), index.parent / WEIGHTS
    if single.is_file() and set(weight_map.values()) != {WEIGHTS}:
        _check_same(tensors, _open_file(single), index.parent)
    return tensors


def _check_same(tensors: Tensors, single: Tensors, folder: Path) -> None:
    """Raises ValueError where the files of the index and the single file hold other weights."""
    different = sorted(set(tensors) ^ set(single)) or [
        name
        for name in tensors
        if tensors.shape(name) != single.shape(name)
        or tensors.stored(name).dtype != single.stored(name).dtype
        or tensors.stored(name).tobytes() != single.stored(name).tobytes()
    ]
    if different:
        raise ValueError(
            f"{folder}: expected one set of weights, got {INDEX} and {WEIGHTS}, which differ in "
            f"{shorten(different[:4])}; remove the file that is not the model"
        )


def _open_file(file: Path) -> Tensors:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        others = sorted(p.name for p in file.parent.glob("*.bin"))
        hint = "; copy the folder again"
        if others:
            hint = (
                f"; {others} are pickles, which are not read: load the folder in transformers and "
                "write it with save_pretrained"
            )
        raise ValueError(f"{file.parent}: expected {file.name}, found none{hint}")
    shapes = read_shapes(file)
    try:
        opened = safe_open(str(file), framework="numpy")
        is_same = set(opened.keys()) == set(shapes)
    except SafetensorError as error:
        raise ValueError(
            f"{file}: expected a complete safetensors file, got: {error}; copy it again"
        ) from error
    if not is_same:
        raise ValueError(
            f"{file}: expected one list of tensors, got a header that two readers understand in "
            "two ways; copy it again"
        )
    return Tensors(dict.fromkeys(shapes, opened), shapes)
