"""Finds a Hugging Face folder, reads its tokenizer and checks that it belongs to a model."""

import json
import os
from pathlib import Path
from typing import Any

from tinybert_jax.settings.sizes import ModelConfig

_FILES = ("tokenizer.json", "vocab.txt")


def find_folder(path: str | Path) -> Path:
    """A local folder as it is; a hub id through the hub's cache (safetensors and text only)."""
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        return folder
    wanted = "a Hugging Face model folder (config.json, model.safetensors)"
    if folder.exists():
        raise ValueError(f"{path}: expected {wanted}, got a file; give the folder it is in")
    is_hub_id = str(path).count("/") <= 1 and not str(path).startswith((".", "/", "~"))
    if not is_hub_id:
        raise ValueError(f"{path}: expected {wanted}, found none; check the path")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json", "vocab.txt"])
        )
    except Exception as error:  # the hub's many network errors, retold with what to do
        raise ValueError(
            f"'{path}': expected a local model folder or a hub id; no such folder, and the hub "
            f"could not be read ({type(error).__name__}); check the name and the network"
        ) from error


def load_tokenizer(path: str | Path) -> Any:
    """The fast tokenizer of a folder; raises ValueError where it has none that suits a BERT."""
    folder = find_folder(path)
    if not has_tokenizer(folder):
        raise ValueError(
            f"{folder}: expected tokenizer.json or vocab.txt, found neither; "
            "copy the tokenizer files into the folder or set tokenizer.path"
        )
    try:
        tokenizer = _read(folder)
    except Exception as error:  # the many errors of two libraries, retold with what to do
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
    return any((Path(folder) / name).is_file() for name in _FILES)


def check_table(tokenizer: Any, config: ModelConfig, owner: str) -> None:
    """Refuses a tokenizer with ids beyond the model's word table: JAX would clamp them silently."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"vocabulary: expected a tokenizer of at most {config.vocab_size} pieces ({owner}'s "
            f"table), got {len(tokenizer)}; use the tokenizer that belongs to {owner}"
        )


def check_same_pieces(tokenizer: Any, path: str | Path, role: str) -> None:
    """Refuses a model folder whose own tokenizer, if any, numbers its pieces in another way."""
    folder = find_folder(path)
    if not has_tokenizer(folder):
        return
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(folder).get_vocab()
    different = sorted(ours.items() ^ theirs.items())
    if different:
        raise ValueError(
            f"vocabulary: expected the run's tokenizer to be that of the {role} {path}, they "
            f"differ in {len({piece for piece, _ in different})} pieces, such as "
            f"{different[0][0]!r}; use models of one vocabulary"
        )


def _read(folder: Path) -> Any:
    from transformers import AutoTokenizer, BertTokenizer

    if not (folder / "tokenizer.json").is_file():
        return BertTokenizer.from_pretrained(str(folder))
    return AutoTokenizer.from_pretrained(str(folder), use_fast=True)


def save_tokenizer(tokenizer: Any, folder: Path, config: ModelConfig) -> None:
    """Writes its files so that transformers gives the model the inputs that it reads.

    `truncation=True` leaves no more tokens than it has positions for, and there are token types
    just where it has a table of them.
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
