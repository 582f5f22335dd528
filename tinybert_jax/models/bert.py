"""BERT (arXiv 1810.04805): two token types, and a tanh over the map of the first token."""

from typing import Any

import jax.numpy as jnp

from tinybert_jax.models.encoder import Encoder
from tinybert_jax.settings.sizes import ModelConfig


def make_bert(config: ModelConfig, **options: Any) -> Encoder:
    return Encoder(config, pooling=jnp.tanh, **options)
