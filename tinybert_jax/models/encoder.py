"""The encoder of BERT-like models: post-LayerNorm blocks, run by `jax.lax.scan` or unrolled."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from tinybert_jax.models.activations import ACTIVATIONS
from tinybert_jax.models.attention import (
    Attention,
    AttentionTaps,
    Pick,
    Visible,
    at,
    make_visible,
)
from tinybert_jax.models.dropout import dropout
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.linear import dense, make_linear, map_pooled
from tinybert_jax.models.norm import layer_norm, make_layer_norm
from tinybert_jax.parallel.sharding import shard_by_example
from tinybert_jax.settings.section import AttentionBackend, PositionInit
from tinybert_jax.settings.sizes import ModelConfig

# An array with a leading axis for the layers, or from an unrolled encoder a tuple over layers.
Layers = jax.Array | tuple[jax.Array, ...]

# Runs one layer: (hidden, (parameters, key)[, pick]) -> (hidden, taps).
Run = Callable[..., tuple[jax.Array, AttentionTaps]]


class EncoderOutput(NamedTuple):
    """The arrays that a head or a loss may read; under `jit`, unused arrays are not computed."""

    hidden: Layers  # [layers + 1, batch, seq, dim]; 0 = embeddings after LayerNorm
    queries: Layers  # [layers, batch, seq, heads, head_dim]
    keys: Layers  # [layers, batch, seq, heads, head_dim]
    values: Layers  # [layers, batch, seq, heads, head_dim]
    # Score maps per layer, fp32 [batch, heads, seq, seq]; None for a layer that builds no map, and
    # for a scanned encoder.
    attention_scores: tuple[jax.Array | None, ...] | None
    # `pooling` of a linear map of the first token of each row, [batch, dim], or of each segment of
    # packed rows, [batch, segments, dim]; None: an encoder without pooler.
    pooled: jax.Array | None


class Encoder(nnx.Module):
    """Token ids to hidden states. `dtype` is the compute dtype; parameters are fp32.

    `product_dtype`: dtype of the inputs of the layers' matrix products; None: `dtype`. `unroll`:
    run the layers one by one instead of in a scan. `position_init`: initial position table, which
    is trained in any case. `attention`: backend, see `attend`. `has_pooler`: heads over tokens need
    no pooler. `pooling`: function after the linear map of the pooler.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        product_dtype: DTypeLike | None = None,
        unroll: bool = False,
        position_init: PositionInit = "normal",
        attention: AttentionBackend = "auto",
        has_pooler: bool = True,
        pooling: Callable[[Array], Array] = jnp.tanh,
        rngs: nnx.Rngs,
    ):
        self.unroll, self.pooling = unroll, pooling
        self.embeddings = Embeddings(config, dtype=dtype, position_init=position_init, rngs=rngs)
        self.layers = stacked_blocks(
            config, rngs, dtype=dtype, product_dtype=product_dtype, attention=attention
        )
        width = config.hidden_size
        if has_pooler:
            self.pooler = make_linear(width, width, config, dtype=dtype, rngs=rngs)
        else:
            self.pooler = None

    def __call__(
        self,
        inputs: Text,
        attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"],
        key: jax.Array | None = None,
        num_segments: int | None = None,
    ) -> EncoderOutput:
        """The outputs of all layers. With `key` dropout is on; without, the pass is deterministic.

        An integer `attention_mask` holds segment ids of packed rows: 0 for padding, 1, 2, … for the
        examples of a row. A token attends only to its segment, and positions restart with every
        segment. With `num_segments`, `pooled` has one entry per segment, which is finite and
        meaningless for a segment that the row does not have.
        """
        embedded, (stacked, keys), run = self._start(inputs, attention_mask, key)

        hidden, taps = (self._unrolled if self.unroll else self._scanned)(
            embedded, stacked, keys, run
        )
        pooled = None
        if self.pooler is not None:
            pooled = self.pool(first_tokens(hidden[-1], attention_mask, num_segments))
        return EncoderOutput(hidden=hidden, pooled=pooled, **taps._asdict())

    @staticmethod
    def _unrolled(embedded: Array, stacked: Any, keys: Array | None, run: Run) -> tuple[Any, Any]:
        """Hidden states and taps as tuples over layers."""
        hidden, taps = [embedded], []
        for layer in each_layer(stacked, keys):
            state, layer_taps = run(hidden[-1], layer)
            hidden.append(state)
            taps.append(layer_taps)
        by_kind: Any = zip(*taps, strict=True)
        return tuple(hidden), AttentionTaps(*by_kind)

    @staticmethod
    def _scanned(embedded: Array, stacked: Any, keys: Array | None, run: Run) -> tuple[Any, Any]:
        """Hidden states and taps with a leading axis for layers."""

        def layer(hidden, params_and_key):
            hidden, taps = run(hidden, params_and_key)
            # A scan would also stack the maps of layers that no loss reads.
            return hidden, (hidden, taps._replace(attention_scores=None))

        _, (states, taps) = jax.lax.scan(layer, embedded, (stacked, keys))
        return jnp.concatenate([embedded[None], states]), taps

    def last_hidden(
        self,
        pick: Pick,
        inputs: Text,
        attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"],
        key: jax.Array | None = None,
    ) -> Float[Array, "batch picked dim"]:
        """The last hidden states of the tokens that `pick` selects.

        The last layer computes keys and values at all tokens and everything else only at the
        selected tokens. Without dropout the result equals that of `__call__`.
        """
        embedded, (stacked, keys), run = self._start(inputs, attention_mask, key)
        if self.unroll:
            hidden, (*lower, last) = embedded, each_layer(stacked, keys)
            for lower_layer in lower:
                hidden, _ = run(hidden, lower_layer)
            return run(hidden, last, pick)[0]

        # To scan over a part of a stack, XLA copies that part. Indexing layer by layer needs no
        # copy, but then the gradient of every layer is as large as the stack, so this is only for
        # passes without training (no key).
        if keys is None:
            below: Any = jnp.arange(len(jax.tree.leaves(stacked)[0]) - 1)
            last = _layer_at(stacked, -1), None
        else:
            below, last = _without_last(stacked)
            below, last = (below, keys[:-1]), (last, keys[-1])

        def layer(hidden, x):
            return run(hidden, (_layer_at(stacked, x), None) if keys is None else x)[0], None

        hidden, _ = jax.lax.scan(layer, embedded, below)
        return run(hidden, last, pick)[0]

    def pool(self, first: Float[Array, "*dims dim"]) -> Float[Array, "*dims dim"]:
        """`EncoderOutput.pooled` from the last hidden states of first tokens."""
        assert self.pooler is not None
        with jax.named_scope("~head"):
            return self.pooling(map_pooled(self.pooler, first))

    def _start(
        self, inputs: Text, attention_mask: Array, key: jax.Array | None
    ) -> tuple[Array, Any, Run]:
        """(embeddings, (stacked parameters, keys) of all layers, function that runs one layer)."""
        visible = make_visible(attention_mask)
        graphdef, stacked = nnx.split(self.layers, nnx.Param)
        num_layers = jax.tree.leaves(stacked)[0].shape[0]
        keys = None if key is None else jax.random.split(key, num_layers + 1)
        with jax.named_scope("~embeddings"):
            embedded = self.embeddings(inputs, attention_mask, None if keys is None else keys[0])
            embedded = shard_by_example(embedded)

        def run(hidden, params_and_key, pick=None):
            params, layer_key = params_and_key
            hidden, taps = nnx.merge(graphdef, params)(hidden, visible, layer_key, pick)
            return shard_by_example(hidden), taps

        return embedded, (stacked, None if keys is None else keys[1:]), run


def _layer_at(stacked: Any, i: int | Array) -> Any:
    """The parameters of layer i of a stack."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacked)


def each_layer(stacked: Any, keys: jax.Array | None) -> list[tuple[Any, jax.Array | None]]:
    """(parameters, key) of each layer."""
    layers = enumerate(_unstacked(stacked))
    return [(layer, None if keys is None else keys[i]) for i, layer in layers]


@jax.custom_vjp
def _unstacked(stacked: Any) -> tuple[Any, ...]:
    """The layers of a stack; the gradient is one `jnp.stack` instead of a sum of padded parts."""
    num_layers = len(jax.tree.leaves(stacked)[0])
    return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_layers))


def _stacked(_: None, layers: tuple[Any, ...]) -> tuple[Any]:
    return (jax.tree.map(lambda *parts: jnp.stack(parts), *layers),)


_unstacked.defvjp(lambda stacked: (_unstacked(stacked), None), _stacked)


@jax.custom_vjp
def _without_last(stacked: Any) -> tuple[Any, Any]:
    """(all layers but the last, the last layer); the gradient is one `jnp.concatenate`."""
    return jax.tree.map(lambda x: x[:-1], stacked), jax.tree.map(lambda x: x[-1], stacked)


def _with_last(_: None, parts: tuple[Any, Any]) -> tuple[Any]:
    return (jax.tree.map(lambda below, last: jnp.concatenate([below, last[None]]), *parts),)


_without_last.defvjp(lambda stacked: (_without_last(stacked), None), _with_last)


class Embeddings(nnx.Module):
    """Sum of word, position and token-type embeddings, then LayerNorm and dropout."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        position_init: PositionInit = "normal",
        rngs: nnx.Rngs,
    ):
        normal = nnx.initializers.normal(config.initializer_range)

        def table(num_rows: int, init: nnx.Initializer = normal) -> nnx.Embed:
            return nnx.Embed(num_rows, config.hidden_size, embedding_init=init, rngs=rngs)

        waves = functools.partial(sinusoids, stddev=config.initializer_range)
        is_normal = position_init == "normal"
        self.word = table(config.vocab_size)
        self.position = table(config.max_position_embeddings, normal if is_normal else waves)
        if config.type_vocab_size:
            self.token_type = table(config.type_vocab_size)
        else:
            self.token_type = None
        self.norm = make_layer_norm(config, dtype, rngs)
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(self, inputs: Text, attention_mask: Array, key: jax.Array | None) -> Array:
        if attention_mask.dtype == bool:
            positions = self.position.embedding[: inputs.input_ids.shape[1]][None]
        else:
            positions = self.position(_restarted_positions(attention_mask))
        return self.at(inputs, positions, key)

    def at(self, inputs: Text, positions: ArrayLike, key: jax.Array | None = None) -> Array:
        """The embeddings of tokens with these rows [batch or 1, seq, dim] of the position table."""
        input_ids, token_type_ids = inputs
        table = self.word.embedding[...]
        words = self.word(input_ids) if table.ndim == 2 else _look_up_by_shard(table, input_ids)
        summed = words + positions
        if self.token_type is not None:
            summed = summed + self.token_type(token_type_ids)
        return dropout(layer_norm(self.norm, summed), self.dropout_rate, key)


@jax.custom_vjp
def _look_up_by_shard(table: Array, input_ids: Array) -> Array:
    """The rows for ids [batch, seq] of a table [shards, vocab, dim], whose copies are equal.

    A copy gets the gradient of the words of its shard of the batch.
    """
    return jnp.take(table[0], input_ids, axis=0)


def _look_up_backward(operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    table, input_ids = operands
    own = input_ids.reshape(len(table), -1, input_ids.shape[-1])

    def by_shard(table: Array) -> Array:
        words = jax.vmap(lambda table, ids: jnp.take(table, ids, axis=0))(table, own)
        return words.reshape(cotangent.shape)

    return jax.vjp(by_shard, table)[1](cotangent)[0], None


_look_up_by_shard.defvjp(
    lambda *operands: (_look_up_by_shard(*operands), operands), _look_up_backward
)


def sinusoids(
    key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32, *, stddev: float
) -> jax.Array:
    """[positions, dim]: sines, then cosines, of wave lengths from 2π to 10000·2π.

    The root mean square is `stddev`. `key` is not used. Source: arXiv 1706.03762, section 3.5.
    """
    num_positions, dim = shape
    num_waves = -(-dim // 2)
    angles = np.arange(num_positions)[:, None] * 10000.0 ** (-np.arange(num_waves) / num_waves)
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :dim]
    return jnp.asarray(table * stddev * 2**0.5, dtype)


class Block(nnx.Module):
    """One layer: attention and feed-forward, each followed by a residual and a LayerNorm."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        product_dtype: DTypeLike | None,
        attention: AttentionBackend,
        rngs: nnx.Rngs,
    ):
        width, inner = config.hidden_size, config.intermediate_size
        options: dict[str, Any] = dict(dtype=dtype, product_dtype=product_dtype, rngs=rngs)
        self.attention = Attention(config, backend=attention, **options)
        self.attention_norm = make_layer_norm(config, dtype, rngs)
        self.intermediate = make_linear(width, inner, config, **options)
        self.output = make_linear(inner, width, config, **options)
        self.output_norm = make_layer_norm(config, dtype, rngs)
        self.dropout_rate = config.hidden_dropout_prob
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(
        self,
        hidden: Float[Array, "batch seq dim"],
        visible: Visible,
        key: jax.Array | None,
        pick: Pick | None = None,
    ) -> tuple[Float[Array, "batch picked dim"], AttentionTaps]:
        """(output, taps); the output only at the tokens that `pick` selects (None: all tokens)."""
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        with jax.named_scope("~attention"):
            attended, taps = self.attention(hidden, visible, keys[0], pick)
            attended = dropout(attended, self.dropout_rate, keys[1])
            residual = hidden if pick is None else pick(hidden)
            hidden = layer_norm(self.attention_norm, residual + attended)
        return self.feed_forward(hidden, keys), taps

    def feed_forward(
        self, hidden: Float[Array, "batch seq dim"], keys: jax.Array | tuple[None, ...]
    ) -> Float[Array, "batch seq dim"]:
        """The second part of a layer; the last of the layer's keys is for its dropout."""
        with jax.named_scope("~feed-forward"):
            inner = self.activation(dense(self.intermediate, hidden))
            outer = dropout(dense(self.output, inner), self.dropout_rate, keys[-1])
            return layer_norm(self.output_norm, hidden + outer)


def first_tokens(
    hidden: Float[Array, "batch seq dim"], attention_mask: Array, num_segments: int | None
) -> Float[Array, "batch dim"] | Float[Array, "batch segments dim"]:
    """The state of the first token of each row or, with `num_segments`, of each segment."""
    first = pick_first(attention_mask, num_segments)(hidden)
    return first[:, 0] if num_segments is None else first


def pick_first(attention_mask: Array, num_segments: int | None) -> Pick:
    """Selects the first token of each row or segment; token 0 for a segment that is not there."""
    if num_segments is None:
        return lambda x: x[:, :1]
    wanted = jnp.arange(1, num_segments + 1)[None, :, None]
    return at(jnp.argmax(attention_mask[:, None, :] == wanted, axis=-1))


def _restarted_positions(segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Positions that restart at 0 with every segment."""
    index = jnp.arange(segment_ids.shape[1])[None]
    is_start = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return index - jax.lax.cummax(jnp.where(is_start, index, 0), axis=1)


def stacked_blocks(
    config: ModelConfig, rngs: nnx.Rngs, *, kind: type[Block] = Block, **options: Any
) -> Any:
    """A block of a kind whose parameters have a leading axis [layers]."""

    def block(key: jax.Array) -> Block:
        return kind(config, rngs=nnx.Rngs(key), **options)

    keys = jax.random.split(rngs.params(), config.num_hidden_layers)
    graphdef = nnx.graphdef(nnx.eval_shape(block, keys[0]))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(block(key), nnx.Param))(keys))
