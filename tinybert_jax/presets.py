"""Named encoder sizes: plain data under Hugging Face's `BertConfig` names."""


def _sizes(num_layers: int, hidden: int, intermediate: int, heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
    }


PRESETS: dict[str, dict[str, int]] = {
    # TinyBERT, arXiv 1909.10351, section 4.1
    "tinybert-4l-312d": _sizes(4, 312, 1200, 12),
    "tinybert-6l-768d": _sizes(6, 768, 3072, 12),
    # BERT, arXiv 1810.04805, and Google's miniatures, arXiv 1908.08962
    "bert-base": _sizes(12, 768, 3072, 12),
    "bert-large": _sizes(24, 1024, 4096, 16),
    "bert-tiny": _sizes(2, 128, 512, 2),
    "bert-mini": _sizes(4, 256, 1024, 4),
    "bert-small": _sizes(4, 512, 2048, 8),
    "bert-medium": _sizes(8, 512, 2048, 8),
    # Widths that fill a TPU's 128-wide matrix unit; 12 heads, so that a BERT-base teacher fits.
    "tpu-4l-384d": _sizes(4, 384, 1536, 12),
    "tpu-6l-768d": _sizes(6, 768, 3072, 12),
}
