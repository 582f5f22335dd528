"""The formats of all families, by the model_type of transformers. A new family adds a line."""

from tinybert_jax.huggingface.bert import BERT
from tinybert_jax.huggingface.distilbert import DISTILBERT
from tinybert_jax.huggingface.weights import Format
from tinybert_jax.models.families import DEFAULT

FORMATS: dict[str, Format] = {"bert": BERT, "distilbert": DISTILBERT}


def format_of(model_type: str | None) -> Format:
    """The format of a family (None: BERT); raises ValueError for an unknown family."""
    name = model_type or DEFAULT  # the released TinyBERT folders have no model_type
    if name not in FORMATS:
        raise ValueError(f"expected model_type {' or '.join(map(repr, FORMATS))}, got {name!r}")
    return FORMATS[name]
