"""Parameters and FLOPs of a BERT, computed from the config's sizes.

Plain Python without JAX, so that launchers and --help start at once. FLOPs are two per multiply-add
of the matrix products; softmax, LayerNorm, GELU, biases and the embedding look-up are left out, as
in published figures of model-FLOPs utilisation.
"""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable


@runtime_checkable
class BertShape(Protocol):
    """The sizes of a BERT under the names of Hugging Face's `BertConfig`."""

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


@runtime_checkable
class TwoSided(Protocol):
    """An encoder and a decoder, which also attends to the encoder and predicts words."""

    @property
    def encoder(self) -> BertShape: ...
    @property
    def decoder(self) -> BertShape: ...


def _num_cross_parameters(decoder: BertShape) -> int:
    """Parameters of the attention to the encoder and its LayerNorms."""
    d = decoder.hidden_size
    return decoder.num_hidden_layers * (4 * (d * d + d) + 2 * d)


def num_parameters(config: BertShape, *, pooler: bool = True) -> int:
    """All parameters without a task head: embeddings, layers and (by default) the pooler.

    BERT-base (arXiv 1810.04805) 109,482,240, TinyBERT4 (arXiv 1909.10351) 14,350,248.
    """
    if isinstance(config, TwoSided):
        both = num_parameters(config.encoder) + num_parameters(config.decoder, pooler=False)
        d, vocab = config.decoder.hidden_size, config.decoder.vocab_size
        return both + _num_cross_parameters(config.decoder) + d * d + 3 * d + vocab
    d = config.hidden_size
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    embeddings = rows * d + 2 * d
    return embeddings + num_encoder_parameters(config) + (d * d + d if pooler else 0)


def num_encoder_parameters(config: BertShape) -> int:
    """Parameters of the layers alone; they set the speed, since an embedding is a look-up."""
    if isinstance(config, TwoSided):
        both = num_encoder_parameters(config.encoder) + num_encoder_parameters(config.decoder)
        return both + _num_cross_parameters(config.decoder)
    d, f = config.hidden_size, config.intermediate_size
    attention = 4 * (d * d + d)
    feed_forward = 2 * d * f + f + d
    layer_norms = 4 * d
    return config.num_hidden_layers * (attention + feed_forward + layer_norms)


def forward_flops_per_token(
    config: BertShape,
    seq_len: int,
    *,
    projection_dim: int = 0,
    num_last_layer_tokens: int | None = None,
) -> float:
    """FLOPs of one forward pass divided by the number of tokens, padding included.

    Counts the six weight matrices of a layer and the two products of attention (scores, and
    probabilities times values: 2·seq_len·hidden_size multiply-adds per token). No task head.
    `projection_dim` adds the projection of every student hidden state (num_hidden_layers + 1) to a
    teacher of that width. `num_last_layer_tokens`: number of tokens of a row at which the last
    layer runs, except for keys and values, which run at all tokens; None: all tokens.

    Of an encoder-decoder a token is one of the source and one of the target, with the product with
    the word table.

    At seq_len = 128: BERT-base 174.6 M; TinyBERT4 9.7 M, or 12.1 M with projection_dim=768, a third
    of the 36.4 M of one trained token.
    """
    if isinstance(config, TwoSided):
        decoder = config.decoder
        d = decoder.hidden_size
        cross = decoder.num_hidden_layers * (4 * d * d + 2 * seq_len * d)
        sides = [
            forward_flops_per_token(config.encoder, seq_len, projection_dim=projection_dim),
            forward_flops_per_token(decoder, seq_len),
        ]
        return sum(sides) + float(2 * cross + masked_lm_flops(decoder, 1, 1))
    d, f, num_layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    layer = 4 * d * d + 2 * d * f + 2 * seq_len * d
    projection = projection_flops_per_token(config, projection_dim, num_layers + 1)
    share_left_out = 0 if num_last_layer_tokens is None else 1 - num_last_layer_tokens / seq_len
    left_out = share_left_out * (layer - 2 * d * d)
    return float(2 * (num_layers * layer - left_out) + projection)


def useful_tile_share(config: BertShape, seq_len: int, tile: int) -> float:
    """The share of a matrix unit's work that is no padding, 0 to 1, in one forward pass.

    A unit multiplies by blocks of `tile` × `tile`: the dims of a weight, of a head and of a row are
    filled up to a multiple of it.
    """
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads

    def up(size: int) -> int:
        return -(-size // tile) * tile

    useful = 4 * d * d + 2 * d * f + 2 * seq_len * d
    done = 4 * up(d) ** 2 + 2 * up(d) * up(f) + 2 * heads * up(d // heads) * up(seq_len)
    return useful / done


def projection_flops_per_token(config: BertShape, projection_dim: int, num_entries: int) -> int:
    """Forward FLOPs per token of projecting `num_entries` hidden states to `projection_dim`."""
    return 2 * num_entries * config.hidden_size * projection_dim


def masked_lm_flops(config: BertShape, num_mapped: int, num_predicted: int) -> int:
    """Forward FLOPs of the masked-LM head for one batch.

    The dense layer runs at `num_mapped` tokens, the product with the word table at `num_predicted`.
    """
    d = config.hidden_size
    return 2 * d * (num_mapped * d + num_predicted * config.vocab_size)


def training_flops_per_token(
    trained: Iterable[BertShape],
    seq_len: int,
    *,
    projection_dim: int = 0,
    teacher: BertShape | None = None,
    num_last_layer_tokens: int | None = None,
) -> float:
    """FLOPs per token of one step: three forward passes per trained model, one of the teacher.

    The trained models read the same batch and share the teacher's pass. `num_last_layer_tokens` is
    as in `forward_flops_per_token`. A backward pass costs two forward passes: the gradient of the
    weights and the gradient of the inputs. Recomputation (remat) is not counted: model FLOPs leave
    it out.
    """
    forward = sum(
        forward_flops_per_token(
            config,
            seq_len,
            projection_dim=projection_dim,
            num_last_layer_tokens=num_last_layer_tokens,
        )
        for config in trained
    )
    teacher_pass = (
        forward_flops_per_token(teacher, seq_len, num_last_layer_tokens=num_last_layer_tokens)
        if teacher
        else 0
    )
    return float(3 * forward + teacher_pass)
