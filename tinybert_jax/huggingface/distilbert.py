"""The names of DistilBERT's weights and settings in transformers."""

from collections.abc import Mapping
from typing import Any

from tinybert_jax.huggingface.weights import Entry, Format, linear, norm
from tinybert_jax.models.distilbert import HEAD_DROPOUT, LAYER_NORM_EPS
from tinybert_jax.settings.sizes import ModelConfig

_EMBEDDINGS = "distilbert.embeddings"
_LAYER = "distilbert.transformer.layer.{i}"
_TABLE = (
    Entry("encoder/embeddings/word/embedding", f"{_EMBEDDINGS}.word_embeddings.weight"),
    Entry("encoder/embeddings/position/embedding", f"{_EMBEDDINGS}.position_embeddings.weight"),
    *norm("encoder/embeddings/norm", f"{_EMBEDDINGS}.LayerNorm"),
    *linear("encoder/layers/attention/query", f"{_LAYER}.attention.q_lin"),
    *linear("encoder/layers/attention/key", f"{_LAYER}.attention.k_lin"),
    *linear("encoder/layers/attention/value", f"{_LAYER}.attention.v_lin"),
    *linear("encoder/layers/attention/output", f"{_LAYER}.attention.out_lin"),
    *norm("encoder/layers/attention_norm", f"{_LAYER}.sa_layer_norm"),
    *linear("encoder/layers/intermediate", f"{_LAYER}.ffn.lin1"),
    *linear("encoder/layers/output", f"{_LAYER}.ffn.lin2"),
    *norm("encoder/layers/output_norm", f"{_LAYER}.output_layer_norm"),
    *linear("encoder/pooler", "pre_classifier"),
    *linear("classifier", "classifier"),
    *linear("spans", "qa_outputs"),
    *linear("transform", "vocab_transform"),
    *norm("norm", "vocab_layer_norm"),
    Entry("decoder/bias", "vocab_projector.bias"),
)

# Field of `ModelConfig` -> key of DistilBERT's config.json.
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
    "initializer_range": "initializer_range",
    "pad_token_id": "pad_token_id",
}
# Defaults of transformers that differ from those of `ModelConfig`.
_DEFAULTS = {"num_hidden_layers": 6, "classifier_dropout": HEAD_DROPOUT}


def _read_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    fields = {field: raw[key] for field, key in _NAMES.items() if key in raw}
    fixed = {"type_vocab_size": 0, "layer_norm_eps": LAYER_NORM_EPS}
    return {**_DEFAULTS, **fields, **fixed, "model_type": "distilbert"}


def _write_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; raises ValueError without `classifier_dropout`, which it needs."""
    if config.classifier_dropout is None:
        raise ValueError(
            f"classifier_dropout: expected a number for a DistilBERT, got none; set {HEAD_DROPOUT}"
        )
    fields = {key: getattr(config, field) for field, key in _NAMES.items()}
    return {**fields, "model_type": "distilbert"}


DISTILBERT = Format(
    class_prefix="DistilBert",
    base_prefix="distilbert.",
    table=_TABLE,
    read_config=_read_config,
    write_config=_write_config,
    decoder="vocab_projector",
    pooler_in=("SequenceClassification",),
)
