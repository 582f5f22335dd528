"""The names of BERT's weights and settings in transformers."""

from collections.abc import Mapping
from typing import Any

from tinybert_jax.huggingface.weights import Entry, Format, linear, norm
from tinybert_jax.settings.sizes import ModelConfig

_LAYER = "bert.encoder.layer.{i}"
_TABLE = (
    Entry("encoder/embeddings/word/embedding", "bert.embeddings.word_embeddings.weight"),
    Entry("encoder/embeddings/position/embedding", "bert.embeddings.position_embeddings.weight"),
    Entry(
        "encoder/embeddings/token_type/embedding", "bert.embeddings.token_type_embeddings.weight"
    ),
    *norm("encoder/embeddings/norm", "bert.embeddings.LayerNorm"),
    *linear("encoder/layers/attention/query", f"{_LAYER}.attention.self.query"),
    *linear("encoder/layers/attention/key", f"{_LAYER}.attention.self.key"),
    *linear("encoder/layers/attention/value", f"{_LAYER}.attention.self.value"),
    *linear("encoder/layers/attention/output", f"{_LAYER}.attention.output.dense"),
    *norm("encoder/layers/attention_norm", f"{_LAYER}.attention.output.LayerNorm"),
    *linear("encoder/layers/intermediate", f"{_LAYER}.intermediate.dense"),
    *linear("encoder/layers/output", f"{_LAYER}.output.dense"),
    *norm("encoder/layers/output_norm", f"{_LAYER}.output.LayerNorm"),
    *linear("encoder/pooler", "bert.pooler.dense"),
    *linear("classifier", "classifier"),
    *linear("spans", "qa_outputs"),
    *linear("transform", "cls.predictions.transform.dense"),
    *norm("norm", "cls.predictions.transform.LayerNorm"),
    Entry("decoder/bias", "cls.predictions.bias"),
    *linear("pair", "cls.seq_relationship"),
)


def _read_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig`, which have the names of BERT's config.json."""
    fields = {name: raw[name] for name in ModelConfig.model_fields if name in raw}
    return {**fields, "model_type": None}  # None: the default family, BERT


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {**config.model_dump(), "model_type": "bert"}


BERT = Format(
    class_prefix="Bert",
    base_prefix="bert.",
    table=_TABLE,
    read_config=_read_config,
    write_config=_write_config,
    decoder="cls.predictions.decoder",
    pair_head="cls.seq_relationship",
    pooler_in=("*",),
)
