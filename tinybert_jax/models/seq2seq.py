"""An encoder and a causal decoder with cross-attention: `EncoderDecoderModel` of transformers.

The decoder is BERT's, with its masked-LM head over the next token; the output table is the
decoder's word table. `models.decoding` makes text with it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from tinybert_jax.models.activations import ACTIVATIONS
from tinybert_jax.models.attention import (
    Attention,
    AttentionTaps,
    Visible,
    attend_cached,
    make_visible,
)
from tinybert_jax.models.dropout import dropout
from tinybert_jax.models.encoder import (
    Block,
    Embeddings,
    EncoderOutput,
    Layers,
    each_layer,
    stacked_blocks,
)
from tinybert_jax.models.families import make_family_encoder
from tinybert_jax.models.heads import Model, TiedDecoder, binder, functional
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.linear import dense, is_quantised, make_linear
from tinybert_jax.models.norm import layer_norm, make_layer_norm
from tinybert_jax.parallel.sharding import shard_by_example
from tinybert_jax.settings.section import AttentionBackend
from tinybert_jax.settings.sizes import EncoderDecoderConfig, ModelConfig


class DecoderOutput(NamedTuple):
    """The arrays of a decoder that a loss may read; layouts are those of `EncoderOutput`."""

    hidden: Layers  # [layers + 1, batch, target, dim]; 0 = embeddings after LayerNorm
    # By layer, as in `EncoderOutput`; the scores are None in a scanned decoder.
    self_attention: AttentionTaps  # of target tokens to target tokens
    cross_attention: AttentionTaps  # of target tokens to source tokens


class Seq2SeqOutput(NamedTuple):
    """A loss may make the logits itself, in parts: hidden·tableᵀ + bias."""

    logits: jax.Array  # [batch, target, vocab], fp32
    hidden: jax.Array  # [batch, target, dim]
    table: jax.Array  # [vocab, dim], fp32; [shards, vocab, dim] of `copy_table_per_shard`
    bias: jax.Array  # [vocab], fp32
    encoder: EncoderOutput | None = None  # with taps
    decoder: DecoderOutput | None = None  # with taps


class Sees(NamedTuple):
    """What the tokens of a target attend to."""

    target: Visible  # earlier tokens of the same target
    source: Visible  # all tokens of its source


class LayerCache(NamedTuple):
    """Keys and values of one layer in the layout of `attend_cached`."""

    keys: jax.Array  # [batch, heads, head_dim, seq]
    values: jax.Array  # [batch, heads, seq, head_dim]


class Memory(NamedTuple):
    """An encoded source, as every step of decoding reads it."""

    layers: tuple[LayerCache, ...]  # of the cross-attention, by layer
    is_source: jax.Array  # bool [batch, 1, 1, source]


# Of the self-attention, by layer; [batch, …, length × hypotheses, …]. The hypotheses of a source
# write keys and values of a position one after the other, and these stay where they were written.
Cache = tuple[LayerCache, ...]


class DecoderBlock(Block):
    """One layer: causal self-attention, cross-attention and feed-forward."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        product_dtype: DTypeLike | None,
        attention: AttentionBackend,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = dict(dtype=dtype, product_dtype=product_dtype, rngs=rngs)
        super().__init__(config, attention=attention, **options)
        self.cross_attention = Attention(config, backend=attention, **options)
        self.cross_norm = make_layer_norm(config, dtype, rngs)

    def decode(
        self,
        hidden: Float[Array, "batch target dim"],
        memory: Float[Array, "batch source dim"],
        sees: Sees,
        key: jax.Array | None,
    ) -> tuple[Float[Array, "batch target dim"], tuple[AttentionTaps, AttentionTaps]]:
        """(output, (taps of self-attention, taps of cross-attention)) of all target tokens."""
        keys = (None,) * 5 if key is None else jax.random.split(key, 5)
        with jax.named_scope("~attention"):
            attended, own = self.attention(hidden, sees.target, keys[0])
            attended = dropout(attended, self.dropout_rate, keys[1])
            hidden = layer_norm(self.attention_norm, hidden + attended)
        with jax.named_scope("~cross-attention"):
            attended, cross = self.cross_attention(hidden, sees.source, keys[2], memory=memory)
            attended = dropout(attended, self.dropout_rate, keys[3])
            hidden = layer_norm(self.cross_norm, hidden + attended)
        return self.feed_forward(hidden, keys), (own, cross)

    def step(
        self,
        hidden: Float[Array, "rows 1 dim"],
        memory: LayerCache,
        is_source: Bool[Array, "batch 1 1 source"],
        cache: LayerCache,
        is_seen: Bool[Array, "#batch 1 #hypotheses seq"],
        start: Int[Array, ""],
    ) -> tuple[Float[Array, "rows 1 dim"], LayerCache]:
        """The outputs for the next tokens, and the cache with their keys and values at `start`.

        Rows are those of the sources times a whole number of hypotheses for each. `is_seen`: the
        keys that a hypothesis sees.
        """

        def by_source(x: Array) -> Array:
            # The hypotheses of a source are queries of one row, so that its keys are read once.
            return x.reshape(len(is_source), -1, *x.shape[2:])

        key, value = map(by_source, self.attention.keys_and_values(hidden))
        cache = LayerCache(
            jax.lax.dynamic_update_slice_in_dim(
                cache.keys, key.transpose(0, 2, 3, 1), start, axis=3
            ),
            jax.lax.dynamic_update_slice_in_dim(
                cache.values, value.transpose(0, 2, 1, 3), start, axis=2
            ),
        )
        queries = by_source(self.attention.split_heads(self.attention.query, hidden))
        context = attend_cached(queries, cache.keys, cache.values, is_seen)
        attended = dense(self.attention.output, context.reshape(hidden.shape))
        hidden = layer_norm(self.attention_norm, hidden + attended)

        queries = self.cross_attention.split_heads(self.cross_attention.query, hidden)
        queries = by_source(queries)
        context = attend_cached(queries, memory.keys, memory.values, is_source)
        attended = dense(self.cross_attention.output, context.reshape(hidden.shape))
        hidden = layer_norm(self.cross_norm, hidden + attended)
        return self.feed_forward(hidden, (None,)), cache


class Decoder(nnx.Module):
    """Target ids and encoder states to hidden states; options: those of `Encoder`.

    Attention builds its score maps: no fused kernel here is causal.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        product_dtype: DTypeLike | None = None,
        unroll: bool = False,
        rngs: nnx.Rngs,
    ):
        self.unroll = unroll
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        options: dict[str, Any] = dict(dtype=dtype, product_dtype=product_dtype, attention="xla")
        self.layers = stacked_blocks(config, rngs, kind=DecoderBlock, **options)

    def __call__(
        self,
        input_ids: Int[Array, "batch target"],
        attention_mask: Bool[Array, "batch target"] | Int[Array, "batch target"],
        memory: Float[Array, "batch source dim"],
        source_mask: Bool[Array, "batch source"] | Int[Array, "batch source"],
        key: jax.Array | None = None,
    ) -> DecoderOutput:
        """The outputs of all layers; integer masks hold the segment ids of packed pairs."""
        graphdef, stacked = nnx.split(self.layers, nnx.Param)
        num_layers = len(jax.tree.leaves(stacked)[0])
        keys = None if key is None else jax.random.split(key, num_layers + 1)
        sees = make_sees(attention_mask, source_mask)
        with jax.named_scope("~embeddings"):
            text = Text(input_ids, jnp.zeros_like(input_ids))
            embedded = self.embeddings(text, attention_mask, None if keys is None else keys[0])
            embedded = shard_by_example(embedded)

        def run(hidden: Array, params_and_key: Any) -> tuple[Array, Any]:
            params, layer_key = params_and_key
            hidden, taps = nnx.merge(graphdef, params).decode(hidden, memory, sees, layer_key)
            return shard_by_example(hidden), taps

        layer_keys = None if keys is None else keys[1:]
        if self.unroll:
            states, both = [embedded], []
            for layer in each_layer(stacked, layer_keys):
                state, taps = run(states[-1], layer)
                states.append(state)
                both.append(taps)
            by_kind: Any = [zip(*taps, strict=True) for taps in zip(*both, strict=True)]
            own, cross = (AttentionTaps(*arrays) for arrays in by_kind)
            return DecoderOutput(tuple(states), own, cross)

        def scanned(hidden: Array, params_and_key: Any) -> tuple[Array, Any]:
            hidden, taps = run(hidden, params_and_key)
            # A scan would also stack the maps of layers that no loss reads.
            return hidden, (hidden, *(own._replace(attention_scores=None) for own in taps))

        _, (states, own, cross) = jax.lax.scan(scanned, embedded, (stacked, layer_keys))
        return DecoderOutput(jnp.concatenate([embedded[None], states]), own, cross)

    def blocks(self) -> list[DecoderBlock]:
        """The layers, one by one."""
        graphdef, stacked = nnx.split(self.layers, nnx.Param)
        return [nnx.merge(graphdef, params) for params, _ in each_layer(stacked, None)]


def make_sees(
    attention_mask: Bool[Array, "batch target"] | Int[Array, "batch target"],
    source_mask: Bool[Array, "batch source"] | Int[Array, "batch source"],
) -> Sees:
    """Targets see earlier tokens of the target and all tokens of the source of the same pair.

    A token of padding also sees itself, so that no softmax is over nothing.
    """
    place = jnp.arange(attention_mask.shape[1])
    is_before = (place[:, None] >= place[None, :])[None]
    target, source = make_visible(attention_mask), make_visible(source_mask)
    is_self = (place[:, None] == place[None, :])[None]
    target = target._replace(pairs=target.pairs & is_before | is_self)
    if attention_mask.dtype != bool:
        pairs = attention_mask[:, :, None] == source_mask[:, None, :]
        source = source._replace(pairs=pairs)
    return Sees(target, source)


class Seq2Seq(nnx.Module):
    """Encoder, decoder and output; options: those of `Encoder`.

    `bridge` maps encoder states to the width of the decoder where the widths differ. The encoder's
    pooler is a part of the form that nothing reads.
    """

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs, **options: Any):
        own, width = config.decoder, config.decoder.hidden_size
        product_dtype = options.get("product_dtype")
        dtypes: dict[str, Any] = {
            "dtype": options.get("dtype", jnp.float32),
            # Quantised are the layers alone.
            "product_dtype": None if is_quantised(product_dtype) else product_dtype,
        }
        self.encoder = make_family_encoder(config.encoder, rngs=rngs, **options)
        read = config.encoder.hidden_size
        if read != width:
            self.bridge = make_linear(read, width, own, rngs=rngs, **dtypes)
        else:
            self.bridge = None
        layers = dtypes | {"product_dtype": product_dtype}
        self.decoder = Decoder(own, unroll=options.get("unroll", False), rngs=rngs, **layers)
        self.transform = make_linear(width, width, own, rngs=rngs, **dtypes)
        self.norm = make_layer_norm(own, dtypes["dtype"], rngs)
        self.output = TiedDecoder(own.vocab_size)
        self.decoded_dtype = dtypes["product_dtype"] or dtypes["dtype"]
        self.activation = ACTIVATIONS[own.hidden_act]

    def __call__(
        self,
        inputs: Text,
        attention_mask: Bool[Array, "batch source"] | Int[Array, "batch source"],
        key: jax.Array | None = None,
        num_segments: int | None = None,
        *,
        decoder_input_ids: Int[Array, "batch target"],
        decoder_attention_mask: Bool[Array, "batch target"] | Int[Array, "batch target"],
        taps: bool = False,
    ) -> Seq2SeqOutput:
        """The logits of the token after each token of the target; `taps` hands out both sides.

        With `key` dropout is on. Integer masks hold segment ids: a target reads its own source.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        encoded = self.encoder(inputs, attention_mask, keys[0])
        decoded = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            self._bridged(encoded.hidden[-1]),
            attention_mask,
            keys[1],
        )
        hidden, logits = self._head(decoded.hidden[-1])
        return Seq2SeqOutput(
            logits,
            hidden,
            self.decoder.embeddings.word.embedding[...],
            self.output.bias[...],
            encoder=encoded if taps else None,
            decoder=decoded if taps else None,
        )

    def remember(self, inputs: Text, attention_mask: Bool[Array, "batch source"]) -> Memory:
        """Encodes the sources for `step`."""
        states = self._bridged(self.encoder(inputs, attention_mask).hidden[-1])
        layers = []
        for block in self.decoder.blocks():
            keys, values = block.cross_attention.keys_and_values(states)
            layers.append(LayerCache(keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)))
        is_source = attention_mask | ~attention_mask.any(axis=-1, keepdims=True)
        return Memory(tuple(layers), is_source[:, None, None])

    def empty_cache(self, memory: Memory, length: int, num_hypotheses: int = 1) -> Cache:
        """The cache of targets of `length` tokens, before the first token."""
        found = []
        for keys, values in memory.layers:
            size = length * num_hypotheses
            empty = jnp.zeros((*keys.shape[:3], size), keys.dtype)
            found.append(LayerCache(empty, empty.astype(values.dtype).swapaxes(2, 3)))
        return tuple(found)

    def step(
        self,
        ids: Int[Array, " rows"],
        position: Int[Array, ""],
        memory: Memory,
        cache: Cache,
        origins: Int[Array, "batch hypotheses length"] | None = None,
    ) -> tuple[Float[Array, "rows vocab"], Cache]:
        """(logits of the token after that at `position`, the cache with it).

        Rows are those of the sources times a number of hypotheses for each. `origins`: which
        hypothesis of the source has written the key of each position of a hypothesis; it is
        needed, at positions up to this one, where there are several.
        """
        embeddings = self.decoder.embeddings
        row = jax.lax.dynamic_slice_in_dim(embeddings.position.embedding[...], position, 1)
        text = Text(ids[:, None], jnp.zeros_like(ids)[:, None])
        num_hypotheses, size = len(ids) // len(memory.is_source), cache[0].keys.shape[-1]
        is_seen = (jnp.arange(size) // num_hypotheses <= position)[None, None, None]
        if origins is not None:
            is_own = origins[..., None] == jnp.arange(num_hypotheses)[None, None, None]
            is_seen &= is_own.reshape(*origins.shape[:2], -1)[:, None]
        start = position * num_hypotheses
        hidden, found = embeddings.at(text, row[None]), []
        for block, own, layer in zip(self.decoder.blocks(), memory.layers, cache, strict=True):
            hidden, layer = block.step(hidden, own, memory.is_source, layer, is_seen, start)
            found.append(layer)
        return self._head(hidden)[1][:, 0], tuple(found)

    def _bridged(self, states: Array) -> Array:
        return states if self.bridge is None else dense(self.bridge, states)

    def _head(self, hidden: Array) -> tuple[Array, Array]:
        """(the states that the word table reads, logits)."""
        with jax.named_scope("~head"):
            hidden = layer_norm(self.norm, self.activation(dense(self.transform, hidden)))
            hidden = hidden.astype(self.decoded_dtype)
            table = self.decoder.embeddings.word.embedding[...]
            return hidden, self.output(hidden, table if table.ndim == 2 else table[0])


def make_seq2seq(config: EncoderDecoderConfig, **options: Any) -> Model:
    """An encoder-decoder; options: those of `Encoder`."""
    return functional(Seq2Seq, config, **options)


def bind_seq2seq(config: EncoderDecoderConfig, params: Any, **options: Any) -> Seq2Seq:
    """The module that reads these parameters."""
    return binder(Seq2Seq, (config,), tuple(sorted(options.items())))(params)
