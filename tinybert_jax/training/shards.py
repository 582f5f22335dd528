"""The arrays of a checkpoint that several processes write, each the parts on its own devices.

The folder `shards` of a checkpoint has one safetensors file for each process. Any number of
processes and devices reads it: a part says where in its array it begins.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tinybert_jax.parallel import processes
from tinybert_jax.performance import disk

FOLDER = "shards"


class Parts(NamedTuple):
    """Copies of the parts of arrays that this process writes."""

    parts: dict[str, np.ndarray]  # by "name of the array|where it begins", such as "w|0,16"
    shapes: dict[str, tuple[int, ...]]  # of the whole arrays
    num_bytes: int  # of the whole arrays


class Source(NamedTuple):
    """A saved array."""

    shape: tuple[int, ...]
    read: Callable[[Any], np.ndarray]  # (a slice for each dim) -> its values


def copy_parts(leaves: Iterable[tuple[str, Any]]) -> Parts:
    """Copies each part in the host's memory; of equal parts one process alone has a copy."""
    parts, shapes, num_bytes = {}, {}, 0
    for name, leaf in leaves:
        shapes[name], num_bytes = tuple(leaf.shape), num_bytes + leaf.nbytes
        for shard in leaf.addressable_shards:
            if not shard.replica_id:
                begin = ",".join(str(part.start or 0) for part in shard.index)
                # Of rows, as safetensors writes the memory: a TPU may store an array transposed.
                parts[f"{name}|{begin}"] = np.array(shard.data, order="C")
    return Parts(parts, shapes, num_bytes)


def write(checkpoint: Path, own: Parts) -> None:
    """Writes this process's file; raises OSError where the file system refuses it."""
    file = checkpoint / FOLDER / f"{processes.index()}.safetensors"
    disk.make_folder(file.parent)
    try:
        save_file(own.parts, file, metadata={"shapes": json.dumps(own.shapes)})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    disk.sync(file)


def open_arrays(checkpoint: Path) -> dict[str, Source]:
    """The arrays of a checkpoint by name."""
    shapes: dict[str, list[int]] = {}
    places: dict[str, list[tuple[tuple[int, ...], Path, str]]] = {}
    for file in sorted((checkpoint / FOLDER).glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            shapes |= json.loads(opened.metadata()["shapes"])
            for key in opened.keys():  # noqa: SIM118
                name, _, begin = key.rpartition("|")
                starts = tuple(int(start) for start in begin.split(",") if start)
                places.setdefault(name, []).append((starts, file, key))
    return {name: _source(name, tuple(shapes[name]), own) for name, own in places.items()}


def of_whole(arrays: Mapping[str, np.ndarray]) -> dict[str, Source]:
    """Arrays in memory as sources."""
    return {name: Source(own.shape, own.__getitem__) for name, own in arrays.items()}


def _source(
    name: str, shape: tuple[int, ...], places: list[tuple[tuple[int, ...], Path, str]]
) -> Source:
    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        found, num_found = np.empty(0), 0
        for starts, file, key in places:
            with safe_open(file, "numpy") as opened:
                sizes = opened.get_slice(key).get_shape()
                common = [
                    (max(start, begin), min(stop, begin + size))
                    for (start, stop), begin, size in zip(bounds, starts, sizes, strict=True)
                ]
                if any(start >= stop for start, stop in common):
                    continue
                part = opened.get_tensor(key)
            if not num_found:
                found = np.empty([stop - start for start, stop in bounds], part.dtype)
            into = tuple(
                slice(a - start, b - start)
                for (a, b), (start, _) in zip(common, bounds, strict=True)
            )
            of = tuple(
                slice(a - begin, b - begin) for (a, b), begin in zip(common, starts, strict=True)
            )
            found[into] = part[of]
            num_found += found[into].size
        size = math.prod(stop - start for start, stop in bounds)
        if not size:
            with safe_open(places[0][1], "numpy") as opened:
                dtype = opened.get_tensor(places[0][2]).dtype
            found = np.empty([stop - start for start, stop in bounds], dtype)
        if num_found != size:
            raise ValueError(f"{name} lacks {size - num_found} of {size} values")
        return found

    return Source(shape, read)


def place(source: Source, abstract: Any) -> jax.Array:
    """The array on the devices of all processes, sharded as `abstract`."""
    return jax.make_array_from_callback(
        source.shape, abstract.sharding, lambda index: np.asarray(source.read(index))
    )
