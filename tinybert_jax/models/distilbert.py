"""DistilBERT (arXiv 1910.01108): no token types, and a ReLU over the map of the first token."""

from typing import Any

import jax

from tinybert_jax.models.encoder import Encoder
from tinybert_jax.settings.sizes import ModelConfig

LAYER_NORM_EPS = 1e-12
HEAD_DROPOUT = 0.2  # transformers' default, of a head over the pooled first token
FIXED = {
    "type_vocab_size": 0,
    "layer_norm_eps": LAYER_NORM_EPS,
    "classifier_dropout": HEAD_DROPOUT,
}


def make_distilbert(config: ModelConfig, **options: Any) -> Encoder:
    """Raises ValueError for sizes that a DistilBERT does not have."""
    for name in ("type_vocab_size", "layer_norm_eps"):
        if getattr(config, name) != FIXED[name]:
            raise ValueError(
                f"{name}: expected {FIXED[name]} in a DistilBERT, got {getattr(config, name)}; "
                f"set it to {FIXED[name]}, or use the family bert"
            )
    return Encoder(config, pooling=jax.nn.relu, **options)
