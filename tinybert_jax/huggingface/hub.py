"""Finds Hugging Face folders; reads, checks and saves tokenizers."""

import json
import os
from pathlib import Path
from typing import Any

from tinybert_jax.settings.sizes import ModelConfig

_FILES = ("tokenizer.json", "vocab.txt")


def find_folder(path: str | Path) -> Path:
    """The local folder `path`, or the cached download of a hub id (safetensors and text only).

    Raises ValueError where there is no such folder or the hub cannot be read.
    """
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        return folder
    wanted = "a Hugging Face model folder (config.json, model.safetensors)"
    if folder.exists():
        raise ValueError(f"{path}: expected {wanted}, got a file; give the folder of the file")
    is_hub_id = str(path).count("/") <= 1 and not str(path).startswith((".", "/", "~"))
    if not is_hub_id:
        raise ValueError(f"{path}: expected {wanted}, found none; check the path")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json", "vocab.txt"])
        )
    except Exception as error:  # the hub client raises many kinds of errors
        raise ValueError(
            f"'{path}': expected a local model folder or a hub id; no such folder, and the hub "
            f"could not be read ({type(error).__name__}); check the name and the network"
        ) from error


def load_tokenizer(path: str | Path) -> Any:
    """The fast tokenizer of a folder; raises ValueError if it lacks one for BERT models."""
    folder = find_folder(path)
    if not has_tokenizer(folder):
        raise ValueError(
            f"{folder}: expected tokenizer.json or vocab.txt, found neither; "
            "copy the tokenizer files into the folder or set tokenizer.path"
        )
    try:
        tokenizer = _read(folder)
    except Exception as error:  # transformers and tokenizers raise many kinds of errors
        raise ValueError(
            f"{folder}: expected tokenizer files that can be read, got {type(error).__name__} "
            f"({error}); copy them again"
        ) from error
    needed = ("pad_token", "cls_token", "sep_token")
    absent = [name for name in needed if getattr(tokenizer, name) is None]
    if absent:
        raise ValueError(
            f"{folder}: expected a tokenizer with {', '.join(needed)}, got one without "
            f"{', '.join(absent)}; name them in tokenizer_config.json or use a BERT tokenizer"
        )
    return tokenizer


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has tokenizer files."""
    return any((Path(folder) / name).is_file() for name in _FILES)


def check_table(tokenizer: Any, config: ModelConfig, owner: str) -> None:
    """Raises ValueError for a tokenizer with ids beyond the word table, which JAX would clamp.

    `owner`: the model in the message.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"vocabulary: expected a tokenizer of at most {config.vocab_size} pieces ({owner}'s "
            f"table), got {len(tokenizer)}; use the tokenizer that belongs to {owner}"
        )


def check_same_pieces(tokenizer: Any, path: str | Path, role: str) -> None:
    """Raises ValueError for a model folder whose tokenizer has other pieces or other ids."""
    folder = find_folder(path)
    if not has_tokenizer(folder):
        return
    vocabulary = load_tokenizer(folder).get_vocab()
    different = sorted(tokenizer.get_vocab().items() ^ vocabulary.items())
    if different:
        raise ValueError(
            f"vocabulary: expected the run's tokenizer to be that of the {role} {path}, got "
            f"{len({piece for piece, _ in different})} pieces that differ, such as "
            f"{different[0][0]!r}; use models with the same vocabulary"
        )


def _read(folder: Path) -> Any:
    from transformers import AutoTokenizer, BertTokenizer

    if not (folder / "tokenizer.json").is_file():
        return BertTokenizer.from_pretrained(str(folder))
    return AutoTokenizer.from_pretrained(str(folder), use_fast=True)


def save_tokenizer(tokenizer: Any, folder: Path, config: ModelConfig) -> None:
    """Writes the tokenizer's files, with settings that fit the model.

    `truncation=True` then cuts to at most the model's positions, and the tokenizer returns token
    types only if the model has token types.
    """
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    num_positions = config.max_position_embeddings
    most = settings.get("model_max_length", num_positions)
    settings["model_max_length"] = min(most, num_positions)
    has_types = "token_type_ids" in tokenizer.model_input_names
    if has_types != (config.type_vocab_size > 0):
        types = [] if has_types else ["token_type_ids"]
        settings["model_input_names"] = ["input_ids", *types, "attention_mask"]
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
