"""Reads the files of a Hugging Face model folder: safetensors (one file or shards) and JSON."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
_DTYPES = frozenset("F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL".split())


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a folder by name, floats as fp32; a tensor is read when it is asked for.

    The files stay open: do not overwrite them in place while an object of this class is in use.
    """

    def __init__(self, files: Mapping[str, Any]):
        self._files = files  # name -> the open safetensors file that holds the tensor

    def __getitem__(self, name: str) -> np.ndarray:
        """Floats as fp32, which holds bfloat16 and float16 exactly; integers do not change."""
        array = self._files[name].get_tensor(name)
        is_integer = np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_
        return array if is_integer else array.astype(np.float32)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor; reads none."""
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header of its file."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_tensors(folder: Path) -> Tensors:
    """Reads the headers of all weight files; raises ValueError with the name of a wrong file."""
    index = folder / INDEX
    if not index.is_file():
        return Tensors(_open_file(folder / WEIGHTS))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(
            f"{index}: expected weight_map with the file of every tensor, got "
            f"{str(weight_map)[:60]}; copy the folder again"
        )
    files: dict[str, Any] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: expected plain .safetensors file names, got '{name}'; correct it"
            )
        part = _open_file(folder / name)
        expected = {tensor for tensor, file in weight_map.items() if file == name}
        if set(part) != expected:
            difference = sorted(set(part) ^ expected)[:4]
            raise ValueError(
                f"{folder / name}: expected the tensors that {INDEX} lists, got other names: "
                f"{difference}; copy the folder again"
            )
        files |= part
    return Tensors(files)


def _open_file(file: Path) -> dict[str, Any]:
    """Name of a tensor -> the open file, for all tensors of the file."""
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
    try:
        opened = safe_open(str(file), framework="numpy")
        types = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{file}: expected a complete safetensors file, got: {error}; copy it again"
        ) from error
    foreign = {name: kind for name, kind in types.items() if kind not in _DTYPES}
    if foreign:
        name, kind = next(iter(foreign.items()))
        raise ValueError(
            f"{file}: expected tensors of floats from 16 bits, integers or booleans, got {kind} in "
            f"{len(foreign)} tensors ({name}, …); use a model that is not quantised"
        )
    return dict.fromkeys(types, opened)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ValueError for anything else."""
    if not file.is_file():
        raise ValueError(
            f"{file.parent}: expected {file.name}, found none; give a folder that save_pretrained "
            "wrote"
        )
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected JSON, got: {error}; copy it again") from error
    if not isinstance(tree, dict):
        raise ValueError(
            f"{file}: expected a JSON object, got {type(tree).__name__}; copy it again"
        )
    return tree
