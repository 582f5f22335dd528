"""Pretrain, distil, fine-tune and ship compact Transformer encoders on JAX."""

import importlib

__version__ = "0.2.0"

_PUBLIC = {
    "TinyBertModel": "tinybert_jax.inference.pretrained",
    "TinyBertForMaskedLM": "tinybert_jax.inference.pretrained",
    "TinyBertForSequenceClassification": "tinybert_jax.inference.pretrained",
    "TinyBertForTokenClassification": "tinybert_jax.inference.pretrained",
    "TinyBertForConditionalGeneration": "tinybert_jax.inference.seq2seq",
    "distill": "tinybert_jax.recipes.api",
    "pipeline": "tinybert_jax.inference.pipeline",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    """Imports public names on first use, so that `tinybert --help` never waits for JAX."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tinybert_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """The public names too, which are imported on first use."""
    return sorted({*globals(), *__all__})
