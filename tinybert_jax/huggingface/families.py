"""The formats of the families, by transformers' model_type. A new family is a line here."""

from tinybert_jax.huggingface.bert import BERT
from tinybert_jax.huggingface.distilbert import DISTILBERT
from tinybert_jax.huggingface.weights import Format
from tinybert_jax.models.families import DEFAULT

FORMATS: dict[str, Format] = {"bert": BERT, "distilbert": DISTILBERT}


def format_of(model_type: str | None) -> Format:
    """Raises ValueError for a family that is not in the table."""
    name = model_type or DEFAULT  # the released TinyBERT folders name none
    if name not in FORMATS:
        raise ValueError(f"expected model_type {' or '.join(map(repr, FORMATS))}, got '{name}'")
    return FORMATS[name]
