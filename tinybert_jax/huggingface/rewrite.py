"""Rewrites model folders: in the current format, or with more words in the vocabulary."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinybert_jax.data.errors import listed
from tinybert_jax.data.wordpiece import check_extendable, split_words, with_words
from tinybert_jax.huggingface.families import format_of
from tinybert_jax.huggingface.folder import HfModel, convert_params, read_model, save_model
from tinybert_jax.huggingface.hub import check_table, load_tokenizer
from tinybert_jax.huggingface.untrusted import check_convertible
from tinybert_jax.huggingface.weights import config_shapes, our_shapes
from tinybert_jax.models.params import unflatten

_WORD_TABLE, _WORD_BIAS = "encoder/embeddings/word/embedding", "decoder/bias"


def convert(source: str | Path, target: str | Path) -> Path:
    """Writes the model folder or hub id `source` under current names, with the same weights.

    Raises ValueError where a weight would be lost or is missing (except the pooler), where weights,
    tokenizer and config.json do not fit, where the source has files that could run code, or where
    the target exists.
    """
    model, flat, tokenizer = _read_whole(source, target)
    return _save(target, model, flat, tokenizer)


def extend_vocabulary(
    source: str | Path,
    texts: Iterable[str],
    target: str | Path,
    *,
    num_words: int,
    min_count: int = 5,
) -> tuple[str, ...]:
    """Writes `source` with new pieces for the most frequent words of `texts` that it splits.

    Returns the new words. The embedding of a word, and its bias in a masked-LM head, is the mean
    over the word's pieces, or that of [UNK] for a word without pieces; pretraining can continue
    from there. Their ids follow the tokenizer's last id: they use spare rows of the word table, or
    new rows. All other weights stay the same. `texts` is read once, after all other checks. Raises
    ValueError as `convert` does, for a tokenizer that cannot be extended, and where no word occurs
    often enough.
    """
    for name, value in (("--words", num_words), ("--min-count", min_count)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}; raise it")
    model, flat, tokenizer = _read_whole(source, target)
    check_extendable(tokenizer)
    words = split_words(tokenizer, texts, num_words=num_words, min_count=min_count)
    if not words:
        raise ValueError(
            f"--words: expected words that {source} splits, {min_count} times or more in the text, "
            "found none; check the text (--text names its column), add more text, or lower "
            "--min-count"
        )
    numbers = {word: len(tokenizer) + place for place, word in enumerate(words)}
    for path in (_WORD_TABLE, _WORD_BIAS):
        if path in flat:
            flat[path] = _with_means(flat[path], len(tokenizer), list(words.values()))
    config = model.config.model_copy(update={"vocab_size": len(flat[_WORD_TABLE])})
    _save(target, model._replace(config=config), flat, with_words(tokenizer, numbers))
    return tuple(words)


def _with_means(rows: np.ndarray, first: int, pieces: Sequence[Sequence[int]]) -> np.ndarray:
    """`rows` [n, …] with rows from `first` on replaced by means of rows; `pieces`: their ids."""
    new = np.stack([rows[list(ids)].mean(axis=0) for ids in pieces])
    return np.concatenate([rows[:first], new, rows[first + len(new) :]])


def _read_whole(
    source: str | Path, target: str | Path
) -> tuple[HfModel, dict[str, np.ndarray], Any]:
    """(model, flat parameters, tokenizer) of `source`; raises ValueError if any weight is lost."""
    if Path(target).expanduser().exists():
        raise ValueError(
            f"{target}: expected a folder that does not exist yet; nothing is replaced: choose "
            "another folder"
        )
    model = read_model(source)
    check_convertible(model.folder)
    tokenizer, form = load_tokenizer(source), format_of(model.config.model_type)
    check_table(tokenizer, model.config, f"the model in {source}")
    held = our_shapes(form, model.tensors, model.config.num_hidden_layers)
    if not form.holds_pooler(model.head.kind if model.head else None):  # it would not be written
        held = {path: shape for path, shape in held.items() if "/pooler/" not in path}
    flat, missing, surplus = convert_params(model, config_shapes(form, model.config, held))
    if missing:
        raise ValueError(
            f"{source}: expected every weight that config.json implies, got none for "
            f"{listed(missing)}; copy the folder again; nothing was written"
        )
    if surplus:
        raise ValueError(
            f"{source}: expected only weights of {model.config.model_type} and its heads, got also "
            f"{list(surplus)}; use another folder; nothing was written"
        )
    return model, flat, tokenizer


def _save(target: str | Path, model: HfModel, flat: dict[str, np.ndarray], tokenizer: Any) -> Path:
    return save_model(
        target,
        unflatten(flat),
        model.config,
        tokenizer,
        head=model.head,
    )
