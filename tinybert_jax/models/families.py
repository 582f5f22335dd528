"""The families of encoders. A new one is a file with its encoder and a line in the table here."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tinybert_jax.models.bert import make_bert
from tinybert_jax.models.distilbert import FIXED, make_distilbert
from tinybert_jax.models.encoder import Encoder
from tinybert_jax.settings.sizes import ModelConfig


class Family(NamedTuple):
    """A kind of encoder: how it is built, and the sizes that the kind alone decides."""

    make: Callable[..., Encoder]  # (sizes, options of `Encoder`)
    fixed: Mapping[str, Any]  # fields of `ModelConfig` of a fresh model
    has_token_classifier_dropout: bool = True  # False: a head over tokens has hidden_dropout_prob


# By Hugging Face's model_type; the first is the default.
FAMILIES: dict[str, Family] = {
    "bert": Family(make_bert, {"type_vocab_size": 2, "classifier_dropout": None}),
    "distilbert": Family(make_distilbert, FIXED, has_token_classifier_dropout=False),
}
DEFAULT = next(iter(FAMILIES))


def family_of(model_type: str | None) -> Family:
    """Raises ValueError for a family that is not in the table."""
    name = model_type or DEFAULT
    if name not in FAMILIES:
        raise ValueError(
            f"model_type: expected one of {', '.join(FAMILIES)}, got '{name}'; choose one of them"
        )
    return FAMILIES[name]


def make_family_encoder(config: ModelConfig, **options: Any) -> Encoder:
    """An encoder of the family that the sizes name; options: those of `Encoder`."""
    return family_of(config.model_type).make(config, **options)
