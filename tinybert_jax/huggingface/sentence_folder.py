"""The files by which sentence-transformers makes vectors of an encoder: pooling, normalisation.

They are read as data; modules that are no pooling or normalisation are refused, as their vectors
would differ.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from tinybert_jax.huggingface.untrusted import (
    TOKENIZER_CONFIG,
    check_entries,
    read_json,
    read_json_list,
    shorten,
)
from tinybert_jax.settings.section import Pooling

MODULES = "modules.json"
_SETTINGS, _SENTENCES = "config_sentence_transformers.json", "sentence_bert_config.json"
_MODES: Mapping[str, Pooling] = {"mean": "mean", "cls": "first"}
_OLD_KEYS = {  # of the pooling module before version 5
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class SentenceFolder(NamedTuple):
    """How the model of a folder makes a vector of a text."""

    pooling: Pooling
    normalise: bool
    max_length: int | None  # most tokens; None: the model's positions


def read_sentence_folder(folder: Path) -> SentenceFolder | None:
    """None for a folder that is not of sentence-transformers.

    Raises ValueError for one whose vectors are made in a way that is not supported.
    """
    if not (folder / MODULES).is_file():
        return None
    modules = [_module(entry, folder) for entry in read_json_list(folder / MODULES)]
    names = [name for name, _ in modules]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"{folder}: expected the modules Transformer, Pooling and, if any, Normalize in "
            f"{MODULES}, got {shorten(names)}; use another model"
        )
    if modules[0][1] not in ("", "."):
        raise ValueError(
            f"{folder}: expected the weights in the folder itself, got {shorten(modules[0][1])} in "
            f"{MODULES}; give that folder, with a copy of the other files"
        )
    _check_prompts(folder)
    if (folder / modules[1][1]).is_dir():
        check_entries(folder / modules[1][1], folder)
    pooling = _read_pooling(folder / modules[1][1] / "config.json", folder)
    return SentenceFolder(pooling, len(names) == 3, _read_length(folder))


def sentence_files(own: SentenceFolder, width: int, max_length: int) -> dict[str, Any]:
    """The JSON files, by name, of a folder whose vectors are `width` wide; all versions read them.

    `max_length`: the most tokens of a text, if `own` does not say.
    """
    kinds = ["Transformer", "Pooling", *(["Normalize"] if own.normalise else [])]
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{kind}" if number else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    used = {"mean": "pooling_mode_mean_tokens", "first": "pooling_mode_cls_token"}[own.pooling]
    modes = {key: key == used for key in list(_OLD_KEYS)[:4]}
    files: dict[str, Any] = {
        MODULES: modules,
        _SENTENCES: {"max_seq_length": own.max_length or max_length, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": width, **modes},
    }
    return files | ({"2_Normalize/config.json": {}} if own.normalise else {})


def _module(entry: Any, folder: Path) -> tuple[str, str]:
    """(name of the class, subfolder) of a module."""
    kind, path = (entry.get(key) if isinstance(entry, dict) else None for key in ("type", "path"))
    if not (isinstance(kind, str) and isinstance(path, str)):
        raise ValueError(
            f"{folder / MODULES}: expected objects with a type and a path, got {shorten(entry)}; "
            "copy it again"
        )
    if not kind.startswith("sentence_transformers."):
        raise ValueError(
            f"{folder / MODULES}: expected classes of sentence_transformers, got {shorten(kind)}, "
            "which is code of somebody else; use another model"
        )
    if "/" in path or "\\" in path or path.startswith("."):
        raise ValueError(
            f"{folder / MODULES}: expected a folder inside of this one as path, got "
            f"{shorten(path)}; correct it"
        )
    return kind.rpartition(".")[2], path


def _read_pooling(file: Path, folder: Path) -> Pooling:
    settings = read_json(file)
    modes = settings.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _OLD_KEYS.items() if settings.get(key)]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in _MODES:
        raise ValueError(
            f"{folder}: expected pooling by {' or '.join(_MODES)}, got {shorten(modes)} in "
            f"{file.relative_to(folder)}; use another model"
        )
    return cast(Pooling, _MODES[modes[0]])


def _check_prompts(folder: Path) -> None:
    """Raises ValueError for a model that puts a prompt before every text."""
    file = folder / _SETTINGS
    settings = read_json(file) if file.is_file() else {}
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts")
    if name is not None and isinstance(prompts, dict) and prompts.get(name):
        raise ValueError(
            f"{folder}: expected a model without a prompt before every text, got "
            f"{shorten(prompts[name])} in {_SETTINGS}; use another model"
        )


def _read_length(folder: Path) -> int | None:
    """The most tokens of a text: the first of the two files that says it."""
    for name, key in ((_SENTENCES, "max_seq_length"), (TOKENIZER_CONFIG, "model_max_length")):
        file = folder / name
        settings = read_json(file) if file.is_file() else {}
        if settings.get("do_lower_case") and name == _SENTENCES:
            raise ValueError(
                f"{folder}: expected a tokenizer that lowercases by itself, got do_lower_case in "
                f"{name}; use another model"
            )
        value = settings.get(key)
        if type(value) is int and value > 0:
            return value
    return None
