"""The sizes of an encoder under Hugging Face's `BertConfig` names, and named presets of them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tinybert_jax.settings.section import Positive, PositiveInt, Probability, Section


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


class ModelConfig(Section):
    """An encoder's sizes under Hugging Face's `BertConfig` names.

    `model_type` is the family, as Hugging Face names it; None is the first of `models.families`.
    """

    model_type: str | None = None
    vocab_size: PositiveInt = 30522
    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    intermediate_size: PositiveInt = 3072
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"] = "gelu"
    max_position_embeddings: PositiveInt = 512
    type_vocab_size: Annotated[int, Field(ge=0)] = 2  # 0: no table of token types
    layer_norm_eps: Positive = 1e-12
    hidden_dropout_prob: Probability = 0.1
    attention_probs_dropout_prob: Probability = 0.1
    classifier_dropout: Probability | None = None  # of a task's head; None: hidden_dropout_prob
    initializer_range: Positive = 0.02
    pad_token_id: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"expected hidden_size to be a multiple of num_attention_heads, "
                f"got {self.hidden_size} and {self.num_attention_heads}"
            )
        return self


class EncoderDecoderConfig(Section):
    """The sizes of an encoder and a decoder, and the ids of tokens that decoding needs."""

    encoder: ModelConfig
    decoder: ModelConfig
    decoder_start_token_id: Annotated[int, Field(ge=0)]
    eos_token_id: Annotated[int, Field(ge=0)]
    pad_token_id: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _ids_are_in_the_vocabulary(self) -> "EncoderDecoderConfig":
        for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
            if (got := getattr(self, name)) >= self.decoder.vocab_size:
                raise ValueError(
                    f"{name}: expected an id below the decoder's vocab_size "
                    f"{self.decoder.vocab_size}, got {got}"
                )
        return self

    # What readers of `Sizes` ask of any model; of the two sides where they may differ, the encoder.

    @property
    def model_type(self) -> str | None:
        return self.encoder.model_type

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.encoder.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.encoder.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.encoder.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        return self.encoder.intermediate_size

    @property
    def max_position_embeddings(self) -> int:
        """Of both sides."""
        return min(side.max_position_embeddings for side in (self.encoder, self.decoder))

    @property
    def type_vocab_size(self) -> int:
        return self.encoder.type_vocab_size

    @property
    def attention_probs_dropout_prob(self) -> float:
        return max(side.attention_probs_dropout_prob for side in (self.encoder, self.decoder))


Sizes = ModelConfig | EncoderDecoderConfig
# Layers that a loss compares: those of an encoder, the decoder's with its self-attention, or the
# decoder's with its attention to the encoder.
Side = Literal["encoder", "decoder", "cross"]


def depths(sizes: Sizes) -> tuple[int, int]:
    """Numbers of layers of the encoder and of the decoder; 0 without one."""
    if isinstance(sizes, ModelConfig):
        return sizes.num_hidden_layers, 0
    return sizes.encoder.num_hidden_layers, sizes.decoder.num_hidden_layers


def side_of(sizes: Sizes, side: Side) -> ModelConfig:
    """The sizes of the layers of one side."""
    if isinstance(sizes, ModelConfig):
        assert side == "encoder", "the config check refuses a side that a model lacks"
        return sizes
    return sizes.encoder if side == "encoder" else sizes.decoder
