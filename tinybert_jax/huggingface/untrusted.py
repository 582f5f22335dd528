"""Refuses model folders that name code, leave the folder, or are not what their file names say.

Only config.json and the small files of a tokenizer are opened here, and they are read as data.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"

_MOST_BYTES = 1 << 26  # of a JSON file; the largest of real folders have some megabytes
_MOST_LEVELS = 32  # of brackets in a JSON file
# Keys by which transformers and other programs run code that a folder names, or open other files.
_CODE_KEYS = frozenset(
    "auto_map custom_pipelines trust_remote_code fast_tokenizer_files configuration_files "
    "quantization_config compression_config".split()
)
_INTERNAL_KEY = re.compile(r"_.+_internal")
_NAMED_BY_USERS = frozenset({"id2label", "label2id"})  # their keys are labels
# Keys of tokenizer_config.json that name files. Others that end in _file are never read.
_FILE_KEYS = ("tokenizer_file", "vocab_file", "merges_file", "spm_file", "sp_model_file")
_NOTHING = (None, False, "", {}, [])  # values that make such a key harmless
# Implementations of attention that are part of transformers; others are downloaded and run.
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_ATTENTION = re.compile(r"[a-z0-9_]+")


def check_folder(folder: Path) -> None:
    """Raises ValueError for a folder with foreign links, special files or keys that name code."""
    check_entries(folder, folder)
    for name in (CONFIG, TOKENIZER_CONFIG, SPECIAL_TOKENS):
        file = folder / name
        if file.is_file():
            tree = read_json(file)
            _check_keys(tree, file)
            if name != CONFIG:
                _check_file_names(tree, file)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder}: expected a whole model, got adapter_config.json, which names another model "
            "that holds the weights; merge the adapter and save the whole model"
        )


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ValueError for anything else."""
    return _read(file, dict)


def read_json_list(file: Path) -> list[Any]:
    """The JSON list in a file; raises ValueError for anything else."""
    return _read(file, list)


def _read(file: Path, kind: type) -> Any:
    if not file.is_file():
        raise ValueError(
            f"{file.parent}: expected {file.name}, found none; give a folder that save_pretrained "
            "wrote"
        )
    if (size := file.stat().st_size) > _MOST_BYTES:
        raise ValueError(
            f"{file}: expected at most {_MOST_BYTES} bytes of JSON, got {size}; copy it again"
        )
    try:
        return _parse(file.read_bytes(), kind)
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got: {error}; copy it again") from error


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`; raises ValueError, also for a key that an object has twice."""
    return _parse(data, dict)


def _parse(data: bytes, kind: type) -> Any:
    try:
        tree = json.loads(data.decode("utf-8"), object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError("brackets that are nested too deep") from None
    if not isinstance(tree, kind):
        names = {dict: "object", list: "list"}
        raise ValueError(f"{type(tree).__name__}, not a JSON {names[kind]}")
    level: list[Any] = [tree]
    for _ in range(_MOST_LEVELS):
        inner = [node.values() if isinstance(node, dict) else node for node in level]
        level = [child for node in inner for child in node if isinstance(child, dict | list)]
    if level:
        raise ValueError("brackets that are nested too deep")
    return tree


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"a key that stands twice in one object: {shorten(twice)}")
    return tree


def shorten(value: Any, most: int = 120) -> str:
    """`repr(value)`, cut to `most` characters; repr escapes what a terminal would obey."""
    if isinstance(value, str | list | tuple):
        value = value[: most + 1]  # the repr of a large file's content takes long
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]} …"


def check_entries(folder: Path, root: Path) -> None:
    """Raises ValueError for an entry of `folder` that is no folder or plain file within `root`."""
    home = root.resolve()
    # The hub's cache holds the files of a snapshot, and of folders in it, as links to `blobs`.
    snapshot = next((own for own in (home, home.parent) if own.parent.name == "snapshots"), None)
    blobs = home if snapshot is None else snapshot.parent.parent / "blobs"
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = folder / entry.name
        if entry.is_symlink():
            target = _target(path)
            if not target.is_relative_to(home) and target.parent != blobs:
                raise ValueError(
                    f"{folder}: expected plain files, got the link {entry.name!r} to "
                    f"{shorten(str(target))}, outside of the folder; copy the file into the folder"
                )
        if not (path.is_file() or path.is_dir()):
            raise ValueError(
                f"{folder}: expected plain files, got {entry.name!r}, which is neither a file nor "
                "a folder; remove it"
            )


def _target(link: Path) -> Path:
    try:
        return link.resolve()
    except (OSError, RuntimeError):  # a link to itself; Python's versions raise one or the other
        raise ValueError(
            f"{link.parent}: expected plain files, got the link {link.name!r}, which leads to "
            "itself; remove it"
        ) from None


def _check_keys(tree: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError for a key, at any depth, by which a program could run code."""
    for key, value in _keys(tree):
        is_code = key in _CODE_KEYS or _INTERNAL_KEY.fullmatch(key) is not None
        if is_code and value not in _NOTHING:
            raise ValueError(
                f"{file}: expected no {shorten(key)}, got {shorten(value)}: code, files or number "
                "formats that it names are not supported, and are never run or opened; remove the "
                "key, or use another model"
            )
        if key in _ATTENTION_KEYS and not all(map(_ATTENTION.fullmatch, _texts(value))):
            raise ValueError(
                f"{file}: expected an implementation in transformers as {key}, got "
                f"{shorten(value)}, a repository of code; remove the key"
            )


def _keys(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of a tree of JSON, except those of mappings whose keys are labels."""
    rest = [tree]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            yield from node.items()
            rest += [value for key, value in node.items() if key not in _NAMED_BY_USERS]
        elif isinstance(node, list):
            rest += node


def _texts(tree: Any) -> Iterator[str]:
    """Every text in a tree of JSON, keys not included."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _texts(child)


def _check_file_names(settings: Mapping[str, Any], file: Path) -> None:
    for key in _FILE_KEYS:
        name = settings.get(key)
        if name is None:
            continue
        if not is_plain_name(name) or not (file.parent / name).is_file():
            raise ValueError(
                f"{file}: expected the name of a file in the folder as {key}, got "
                f"{shorten(name)}; remove the key"
            )


def is_plain_name(name: Any) -> bool:
    """Whether `name` is the name of a file, without folders and control characters."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and Path(name).name == name
        and "\\" not in name
        and name not in ("", ".", "..")
    )


# What a converter refuses, by name and by the first bytes.
_FOREIGN_ENDINGS = {
    ending: kind
    for kind, endings in {
        "a pickle": ".bin .pt .pth .ckpt .pkl .pickle .joblib .npz .ot",
        "a Keras or TensorFlow model": ".h5 .hdf5 .keras .pb .index .tflite",
        "an archive": ".zip .tar .gz .tgz .bz2 .xz .7z .rar .whl",
        "code": ".py .pyc .pyd .so .dll .sh .exe",
        "a GGUF model": ".gguf",
    }.items()
    for ending in endings.split()
}
_FOREIGN_STARTS = {
    b"PK\x03\x04": "an archive",
    b"\x1f\x8b": "an archive",
    b"BZh": "an archive",
    b"\xfd7zXZ\x00": "an archive",
    b"7z\xbc\xaf\x27\x1c": "an archive",
    b"\x89HDF\r\n\x1a\n": "a Keras or TensorFlow model",
    b"\x7fELF": "code",
    b"#!": "code",
    b"GGUF": "a GGUF model",
    b"\x93NUMPY": "an array of NumPy, which can be a pickle",
    b"version https://git-lfs": "a pointer of Git LFS instead of the file",
}
_PICKLE = re.compile(rb"\x80[\x02-\x05][^\x00]", re.DOTALL)


def kind_of_content(start: bytes) -> str | None:
    """What the first bytes of a file say that it is; None for text and safetensors."""
    kinds = [kind for magic, kind in _FOREIGN_STARTS.items() if start.startswith(magic)]
    return kinds[0] if kinds else "a pickle" if _PICKLE.match(start) else None


def check_convertible(folder: Path) -> None:
    """Raises ValueError for a folder with files beside the model that could run code.

    They would not be opened, but who converts a folder wants one that is safe to pass on. Hidden
    folders, such as .git, are not searched.
    """
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        check_entries(Path(place), folder)
        for name in sorted(files):
            path = Path(place) / name
            kind = _FOREIGN_ENDINGS.get(path.suffix.lower())
            if kind is None and path.suffix != ".safetensors":  # those are checked when opened
                with path.open("rb") as file:
                    kind = kind_of_content(file.read(32))
            if kind:
                raise ValueError(
                    f"{folder}: expected config, tokenizer and safetensors files, got "
                    f"{shorten(str(path.relative_to(folder)))}, which is {kind}; copy the folder "
                    "without it"
                )
