"""Reads the header of a safetensors file and checks it before any weight is read."""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinybert_jax.huggingface.untrusted import kind_of_content, parse_object, shorten

_MOST_BYTES = 1 << 24  # of a header; 100 bytes a tensor are usual
_MOST_TENSORS = 100_000
_MOST_AXES = 8
_DTYPES = {
    **dict.fromkeys("F64 I64 U64".split(), 8),
    **dict.fromkeys("F32 I32 U32".split(), 4),
    **dict.fromkeys("F16 BF16 I16 U16".split(), 2),
    **dict.fromkeys("I8 U8 BOOL".split(), 1),
}


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a file by name; reads the header only.

    Raises ValueError for a file that is not safetensors or not complete, a number format that is
    not supported, and sizes that do not fit the file.
    """
    try:
        header, num_bytes = _read(file)
        header.pop("__metadata__", None)
        if len(header) > _MOST_TENSORS:
            raise ValueError(f"a header of {len(header)} tensors")
        tensors = {name: _checked(name, entry) for name, entry in header.items()}
        _check_places(tensors, num_bytes)
    except ValueError as error:
        with file.open("rb") as opened:
            got = kind_of_content(opened.read(32)) or error
        raise ValueError(
            f"{file}: expected a complete safetensors file, got {got}; copy it again"
        ) from None
    foreign = {name: dtype for name, (dtype, *_) in tensors.items() if dtype not in _DTYPES}
    if foreign:
        name, dtype = next(iter(foreign.items()))
        raise ValueError(
            f"{file}: expected tensors of floats from 16 bits, integers or booleans, got "
            f"{shorten(dtype)[1:-1]} in {len(foreign)} tensors ({name}, …); use a model that is "
            "not quantised"
        )
    return {name: shape for name, (_, shape, _, _) in tensors.items()}


def _read(file: Path) -> tuple[dict[str, Any], int]:
    """(header, number of bytes after it)."""
    total = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if len(start) < 8:
            raise ValueError(f"{total} bytes")
        (length,) = struct.unpack("<Q", start)
        if not 2 <= length <= min(_MOST_BYTES, total - 8):
            raise ValueError(f"a header of {length} bytes in a file of {total} bytes")
        data = opened.read(length)
    try:
        return parse_object(data), total - 8 - length
    except ValueError as error:
        raise ValueError(f"a header with {error}") from None


def _checked(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(number format, shape, first byte, end) of a tensor; raises ValueError for other content."""
    shown = shorten(name)
    if not name or not name.isprintable():
        raise ValueError(f"the tensor name {shown}, which cannot be printed")
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shorten(entry)} as the tensor {shown}")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"the number format {shorten(dtype)} of the tensor {shown}")
    if not _are_sizes(shape) or len(shape) > _MOST_AXES:
        raise ValueError(f"the shape {shorten(shape)} of the tensor {shown}")
    if not _are_sizes(place) or len(place) != 2 or place[0] > place[1]:
        raise ValueError(f"the place {shorten(place)} of the tensor {shown}")
    needed = math.prod(shape) * _DTYPES.get(dtype, 0)
    if dtype in _DTYPES and needed != place[1] - place[0]:
        raise ValueError(
            f"{place[1] - place[0]} bytes instead of {needed} for the tensor {shown} of the shape "
            f"{shorten(shape)}"
        )
    return dtype, tuple(shape), place[0], place[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 60 for v in values)


def _check_places(tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]], end: int) -> None:
    """Raises ValueError where the tensors overlap, leave gaps or end elsewhere than the file."""
    reached = 0
    for name, (_, _, first, last) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if first != reached:
            raise ValueError(f"the tensor {shorten(name)} at byte {first} instead of {reached}")
        reached = last
    if reached != end:
        raise ValueError(f"{end} bytes of weights instead of {reached}")
