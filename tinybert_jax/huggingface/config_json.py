"""Reads the sizes in config.json, and writes config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tinybert_jax.huggingface.families import format_of
from tinybert_jax.huggingface.head import Head, head_part, write_head
from tinybert_jax.huggingface.untrusted import CONFIG, shorten
from tinybert_jax.huggingface.weights import Format
from tinybert_jax.settings.sizes import ModelConfig

# Keys of config.json that change the outputs, with the only supported value.
_FIXED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
# Larger sizes are refused, because memory and time would be used up before the weights are looked
# at. No published model comes near.
_MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 16,
    "num_hidden_layers": 512,
    "num_attention_heads": 1 << 12,
    "intermediate_size": 1 << 20,
    "max_position_embeddings": 1 << 20,
    "type_vocab_size": 1 << 16,
}


def read_config(raw: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The sizes in config.json; raises ValueError for a model that is not supported."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str | None):
        raise ValueError(
            f"{folder / CONFIG}: expected text as model_type, got {shorten(model_type)}; use "
            "another model"
        )
    if model_type == "encoder-decoder":
        raise ValueError(
            f"{folder}: expected an encoder, got an encoder-decoder; use it with tinybert "
            "translate, or TinyBertForConditionalGeneration"
        )
    try:
        form = format_of(model_type)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    for name, expected in _FIXED.items():
        if raw.get(name) not in (None, expected):
            raise ValueError(
                f"{folder}: expected {name} {expected!r}, got {shorten(raw[name])}; use another "
                "model"
            )
    known = form.read_config(raw)
    if known.get("pad_token_id", 0) is None:  # transformers allows null here
        del known["pad_token_id"]
    try:
        config = ModelConfig(**known)
    except ValidationError as error:
        details = [
            f"{e['loc'][0]}: {e['msg']}, got {shorten(e['input'])}" if e["loc"] else e["msg"]
            for e in error.errors()
        ]
        raise ValueError(
            f"{folder / CONFIG}: expected a supported {form.class_prefix}; {'; '.join(details)}"
        ) from None
    for name, most in _MOST.items():
        if (size := getattr(config, name)) > most:
            raise ValueError(
                f"{folder / CONFIG}: expected a {name} of at most {most}, got {shorten(size)}; "
                "correct it"
            )
    if config.pad_token_id >= config.vocab_size:
        raise ValueError(
            f"{folder / CONFIG}: expected a pad_token_id below the vocab_size "
            f"{config.vocab_size}, got {config.pad_token_id}; correct it"
        )
    return config


def write_config(
    form: Format, flat: Mapping[str, Any], config: ModelConfig, head: Head | None
) -> dict[str, Any]:
    part = head_part(flat)
    assert (head is None) == (part is None), "a head needs its weights, and the weights their head"
    settings = {
        "architectures": [f"{form.class_prefix}{_class_suffix(flat, head)}"],
        **form.write_config(config),
    }
    settings |= {"dtype": "float32", "tie_word_embeddings": True}
    if head is not None:
        settings |= write_head(head, flat[f"{part}/kernel"].shape[1])
    return settings


def _class_suffix(flat: Mapping[str, Any], head: Head | None) -> str:
    """The end of the class name in transformers for these parameters; a task head goes first."""
    if head is not None:
        return f"For{head.kind}"
    if "pair/kernel" in flat:
        return "ForPreTraining" if "decoder/bias" in flat else "ForNextSentencePrediction"
    return "ForMaskedLM" if "decoder/bias" in flat else "Model"
