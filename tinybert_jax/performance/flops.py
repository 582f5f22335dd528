"""Owns the arithmetic of model size and speed: parameters, FLOPs and what the hardware can do.

Plain Python: jax is imported only by `measure_gemm_peak`, so launchers and --help stay instant.
A FLOP count is two per multiply-add of the matrix products; softmax, LayerNorm, GELU, biases and
the embedding look-up are left out, as in every published model-FLOPs-utilisation figure.
"""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable


@runtime_checkable
class BertShape(Protocol):
    """The size fields of a BERT under Hugging Face's `BertConfig` names."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def type_vocab_size(self) -> int: ...


def num_parameters(config: BertShape, *, pooler: bool = True) -> int:
    """All parameters without a task head: embeddings, layers and (by default) the pooler.

    BERT-base (arXiv 1810.04805) 109,482,240, TinyBERT4 (arXiv 1909.10351) 14,350,248.
    """
    d = config.hidden_size
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    embeddings = rows * d + 2 * d
    return embeddings + num_encoder_parameters(config) + (d * d + d if pooler else 0)


def num_encoder_parameters(config: BertShape) -> int:
    """Parameters of the layers alone: what sets the speed, since an embedding is a look-up."""
    d, f = config.hidden_size, config.intermediate_size
    attention = 4 * (d * d + d)
    feed_forward = 2 * d * f + f + d
    layer_norms = 4 * d
    return config.num_hidden_layers * (attention + feed_forward + layer_norms)


def forward_flops_per_token(
    config: BertShape, seq_len: int, *, projection_dim: int = 0, num_read: int | None = None
) -> float:
    """FLOPs of one forward pass divided by its tokens, padding counted as tokens.

    Counts the six weight matrices of a layer and the two products of attention (scores, and
    probabilities times values: 2·seq_len·hidden_size multiply-adds per token). No task head.
    `projection_dim` adds the student's share of hidden-state distillation: every entry of `hidden`
    (num_hidden_layers + 1) projected to a teacher of that width. `num_read`: at how many tokens of
    a row the last layer runs, but for its keys and values; default: at every one.

    At T = 128: BERT-base 174.6 M; TinyBERT4 9.7 M, and 12.1 M with projection_dim=768, a third of
    the 36.4 M of a trained token.
    """
    d, f, num_layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    layer = 4 * d * d + 2 * d * f + 2 * seq_len * d
    projection = projection_flops_per_token(config, projection_dim, num_layers + 1)
    share_left_out = 0 if num_read is None else 1 - num_read / seq_len
    left_out = share_left_out * (layer - 2 * d * d)
    return float(2 * (num_layers * layer - left_out) + projection)


def projection_flops_per_token(config: BertShape, projection_dim: int, num_entries: int) -> int:
    """FLOPs of mapping so many entries of a student's `hidden` to its teacher's width, forward."""
    return 2 * num_entries * config.hidden_size * projection_dim


def masked_lm_flops(config: BertShape, num_mapped: int, num_predicted: int) -> int:
    """FLOPs of the masked-LM head of a batch, forward.

    Its dense map runs at `num_mapped` tokens, the product with the word table at `num_predicted`.
    """
    d = config.hidden_size
    return 2 * d * (num_mapped * d + num_predicted * config.vocab_size)


def training_flops_per_token(
    trained: Iterable[BertShape],
    seq_len: int,
    *,
    projection_dim: int = 0,
    teacher: BertShape | None = None,
    num_read: int | None = None,
) -> float:
    """FLOPs of one training step per token: three forward passes of each model, one of a teacher.

    All read the same batch and share the teacher's pass, if there is one; `num_read` as above.
    The backward pass costs two forward passes: a gradient for the weights and one for the inputs.
    Recomputation (remat) is not counted: it is a cost of the machine, not of the model.
    """
    forward = sum(
        forward_flops_per_token(config, seq_len, projection_dim=projection_dim, num_read=num_read)
        for config in trained
    )
    taught = forward_flops_per_token(teacher, seq_len, num_read=num_read) if teacher else 0
    return float(3 * forward + taught)
