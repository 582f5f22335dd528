"""Finds Hugging Face folders; reads, checks and saves tokenizers."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tinybert_jax.huggingface.untrusted import (
    CONFIG,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    check_folder,
    read_json,
    shorten,
)
from tinybert_jax.settings.sizes import ModelConfig, Sizes

_FILES = ("tokenizer.json", "vocab.txt")


def find_folder(path: str | Path) -> Path:
    """The local folder `path`, or the cached download of a hub id (safetensors and text only).

    `owner/name` is the newest revision, `owner/name@hash` the one of that commit. Raises ValueError
    where there is no such folder or the hub cannot be read.
    """
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        _refuse_run(folder)
        return folder
    wanted = "a Hugging Face model folder (config.json, model.safetensors)"
    if folder.exists():
        raise ValueError(f"{path}: expected {wanted}, got a file; give the folder of the file")
    if not _is_hub_id(str(path)):
        raise ValueError(f"{path}: expected {wanted}, found none; check the path")
    from huggingface_hub import constants, snapshot_download

    name, _, revision = str(path).partition("@")
    wanted_files = ["*.safetensors", "*.json", "*vocab.txt", "README.md"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted_files))
    except Exception as error:  # the hub client raises many kinds of errors
        host = constants.ENDPOINT.partition("://")[2]
        told = _NOT_READ.get(type(error).__name__, "could not be read")
        raise ValueError(
            f"'{path}': expected a model folder or a hub id; there is no folder '{path}' here, and "
            f"the hub {host} {told} ({type(error).__name__}); give the path of a folder, such as "
            "one that was downloaded elsewhere, or check the name and the network and run the "
            "command again: it goes on with what was downloaded"
        ) from error


def _refuse_run(folder: Path) -> None:
    """Raises ValueError for the folder of a run, naming its exported models."""
    exported = folder / "hf"
    if (folder / "config.json").exists() or not exported.is_dir():
        return
    folders = [exported] if (exported / "config.json").is_file() else exported.iterdir()
    models = sorted(str(own) for own in folders if (own / "config.json").is_file())
    if models:
        raise ValueError(
            f"{folder}: expected a model folder, got that of a run; give the model that it "
            f"exported: {', or '.join(models)}"
        )


_NOT_READ = {
    "LocalEntryNotFoundError": "cannot be reached",
    "OfflineModeIsEnabled": "cannot be reached",
    "RepositoryNotFoundError": "has no such model, or none for you",
}
_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_HUB_ID = re.compile(rf"{_NAME}(/{_NAME})?(@[0-9a-f]{{40}})?", re.ASCII)


def _is_hub_id(path: str) -> bool:
    """Whether `path` is a possible hub id and does not look like a path on this machine.

    What has an ending of a file, or begins with a folder that is there, is a path that was
    mistyped.
    """
    first = path.split("/")[0]
    is_file = path.endswith((".safetensors", ".json", ".bin", ".pt", ".txt", ".yaml"))
    is_local = is_file or ".." in path or ("/" in path and Path(first).exists())
    return _HUB_ID.fullmatch(path) is not None and not is_local


def pin_revision(path: str, pins: dict[str, str]) -> str:
    """`path` with the hash of a revision if it is a hub id; a local path stays as it is.

    The hash is that of `pins`, a mapping from hub ids; else the newest, which is added to `pins`.
    A hub id that cannot be read stays too: whoever reads it raises.
    """
    is_local = Path(os.path.expanduser(path)).exists() or not _is_hub_id(path)
    if is_local or "@" in path:
        return path
    if path not in pins:
        try:
            pins[path] = find_folder(path).name  # snapshots/<hash>
        except ValueError:
            return path
    return f"{path}@{pins[path]}"


def load_tokenizer(path: str | Path) -> Any:
    """The fast tokenizer of a folder; raises ValueError if it lacks one for BERT models."""
    folder = find_folder(path)
    if not has_tokenizer(folder):
        raise ValueError(
            f"{folder}: expected tokenizer.json or vocab.txt, found neither; "
            "copy the tokenizer files into the folder or set tokenizer.path"
        )
    check_folder(folder)
    try:
        tokenizer = _read(folder)
    except BaseException as error:  # transformers and tokenizers raise many kinds of errors
        # tokenizers, which is written in Rust, derives its PanicException from BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
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


def check_table(tokenizer: Any, config: Sizes, owner: str) -> None:
    """Raises ValueError for a tokenizer with ids beyond the word table, which JAX would clamp.

    `owner`: the model in the message.
    """
    highest = max([*tokenizer.get_vocab().values(), *_ids_of_templates(tokenizer)])
    if highest >= config.vocab_size:
        raise ValueError(
            f"vocabulary: expected a tokenizer with pieces up to the id {config.vocab_size - 1} "
            f"({owner}'s table has {config.vocab_size} rows), got the id {highest} in "
            f"{len(tokenizer)} pieces; use the tokenizer that belongs to {owner}"
        )


def _ids_of_templates(tokenizer: Any) -> list[int]:
    """Ids of a pair of texts: some come from templates of tokenizer.json, not from pieces.

    The Rust tokenizer does not change by this; a call of `tokenizer` would reset its padding.
    """
    return tokenizer.backend_tokenizer.encode("a", "b").ids


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


# Keys of tokenizer_config.json and special_tokens_map.json that a tokenizer may depend on. All
# others are left out, as some are names of files, programs or templates.
_SETTINGS = frozenset(
    "do_lower_case do_basic_tokenize never_split tokenize_chinese_chars strip_accents lowercase "
    "unk_token sep_token pad_token cls_token mask_token bos_token eos_token add_prefix_space "
    "additional_special_tokens extra_special_tokens added_tokens_decoder split_special_tokens "
    "clean_up_tokenization_spaces model_max_length max_length padding_side truncation_side "
    "truncation_strategy stride pad_to_multiple_of pad_token_type_id pad_token_type "
    "model_input_names tokenizer_class add_bos_token add_eos_token trim_offsets "
    "keep_accents remove_space wordpieces_prefix legacy backend".split()
)
_CONFIG_KEYS = frozenset({"model_type", "tokenizer_class"})


def _read(folder: Path) -> Any:
    """The tokenizer as transformers reads it from a folder of known files and known keys alone."""
    from transformers import AutoTokenizer, BertTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for name in (*_FILES, "added_tokens.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, copy / name)
        kept = {TOKENIZER_CONFIG: _SETTINGS, SPECIAL_TOKENS: _SETTINGS, CONFIG: _CONFIG_KEYS}
        for name, keys in kept.items():
            if (folder / name).is_file():
                known = {k: v for k, v in read_json(folder / name).items() if k in keys}
                (copy / name).write_text(json.dumps(known), encoding="utf-8")
        if (copy / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)
        else:
            tokenizer = BertTokenizer.from_pretrained(scratch)
    most = tokenizer.model_max_length
    if not isinstance(most, int | float) or not most > 0:
        raise ValueError(f"expected a number above 0 as model_max_length, got {shorten(most)}")
    _ids_of_templates(tokenizer)  # raises where the file's parts do not fit each other
    tokenizer.name_or_path = str(folder)
    return tokenizer


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
