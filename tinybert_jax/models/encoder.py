"""The encoder of BERT and its kin: post-LayerNorm blocks, run by `scan` or one by one."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from tinybert_jax.models.activations import ACTIVATIONS
from tinybert_jax.models.attention import (
    AttentionTaps,
    Pick,
    SelfAttention,
    Visible,
    at,
    make_visible,
)
from tinybert_jax.models.dropout import dropout
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.linear import dense, make_linear
from tinybert_jax.models.norm import layer_norm, make_layer_norm
from tinybert_jax.parallel.sharding import shard_by_example
from tinybert_jax.settings.section import AttentionBackend, PositionInit
from tinybert_jax.settings.sizes import ModelConfig

# An array with a leading axis for the layers, or of an unrolled encoder one array for each.
Layers = jax.Array | tuple[jax.Array, ...]

# (hidden, (parameters, key) of a layer[, pick]) -> (hidden, taps)
Run = Callable[..., tuple[jax.Array, AttentionTaps]]


class EncoderOutput(NamedTuple):
    """Everything a head or a loss may read; under `jit` what nobody reads is never computed."""

    hidden: Layers  # [layers + 1, batch, seq, dim]; 0 = embeddings after LayerNorm
    queries: Layers  # [layers, batch, seq, heads, head_dim]
    keys: Layers  # [layers, batch, seq, heads, head_dim]
    values: Layers  # [layers, batch, seq, heads, head_dim]
    attention_scores: tuple[jax.Array | None, ...] | None  # of each layer [batch, heads, seq, seq],
    # fp32; None: scanned, or no map is built
    pooled: jax.Array | None  # [batch, dim] or, packed, [batch, segments, dim]; a function of a
    # linear map of the first token of a row or of each segment; None: an encoder without pooler


class Encoder(nnx.Module):
    """Token ids to hidden states. `dtype` is the compute dtype; parameters stay fp32.

    `product_dtype` is what the matrix products of the layers read, where it is not `dtype`.
    `position_init`: how a fresh position table starts; it is trained whichever way.
    `attention`: what computes attention, see `attend`. `has_pooler`: heads over tokens
    need none; `pooling` follows its linear map.
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
        self.layers = _stacked_blocks(
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
        """`key` turns dropout on; without one the pass is deterministic.

        An integer `attention_mask` holds segment ids of packed rows: 0 is padding, 1, 2, … the
        examples of a row. Each sees itself alone and has positions of its own; with `num_segments`
        each has its own `pooled` (of a segment that is not there: something finite).
        """
        embedded, (stacked, keys), run = self._start(inputs, attention_mask, key)

        hidden, taps = (self._one_by_one if self.unroll else self._scanned)(
            embedded, stacked, keys, run
        )
        pooled = None
        if self.pooler is not None:
            pooled = self.pool(first_tokens(hidden[-1], attention_mask, num_segments))
        return EncoderOutput(hidden=hidden, pooled=pooled, **taps._asdict())

    @staticmethod
    def _one_by_one(embedded: Array, stacked: Any, keys: Array | None, run: Run) -> tuple[Any, Any]:
        """Hidden states and taps as tuples over layers."""
        hidden, taps = [embedded], []
        for layer in _each_layer(stacked, keys):
            state, own = run(hidden[-1], layer)
            hidden.append(state)
            taps.append(own)
        by_kind: Any = zip(*taps, strict=True)
        return tuple(hidden), AttentionTaps(*by_kind)

    @staticmethod
    def _scanned(embedded: Array, stacked: Any, keys: Array | None, run: Run) -> tuple[Any, Any]:
        """Hidden states and taps with a leading axis for layers."""

        def layer(hidden, params_and_key):
            hidden, taps = run(hidden, params_and_key)
            # A stack of maps would hold those of layers that nobody reads, too.
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
        """The last hidden states that `pick` takes, with no more of the last layer than they need.

        That is keys and values of all tokens, and the rest where `pick` does. Without dropout they
        are those of `__call__`.
        """
        embedded, (stacked, keys), run = self._start(inputs, attention_mask, key)
        if self.unroll:
            hidden, (*lower, last) = embedded, _each_layer(stacked, keys)
            for each in lower:
                hidden, _ = run(hidden, each)
            return run(hidden, last, pick)[0]

        # XLA copies a part of a stack for its loop. Read layer by layer it needs no copy, but then
        # each layer's gradient is as large as the stack: only where nothing is trained.
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
        """`EncoderOutput.pooled` of the first tokens' last hidden states."""
        assert self.pooler is not None
        with jax.named_scope("~head"):
            return self.pooling(self.pooler(first))

    def _start(
        self, inputs: Text, attention_mask: Array, key: jax.Array | None
    ) -> tuple[Array, Any, Run]:
        """Embeddings, (parameters, key) of all layers stacked, and what runs one such layer."""
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
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacked)


def _each_layer(stacked: Any, keys: jax.Array | None) -> list[tuple[Any, jax.Array | None]]:
    """(parameters, key) of each layer."""
    return [(own, None if keys is None else keys[i]) for i, own in enumerate(_unstacked(stacked))]


@jax.custom_vjp
def _unstacked(stacked: Any) -> tuple[Any, ...]:
    """Each layer's part of a stack; the gradient is put together in one go."""
    num_layers = len(jax.tree.leaves(stacked)[0])
    return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_layers))


def _stacked(_: None, layers: tuple[Any, ...]) -> tuple[Any]:
    return (jax.tree.map(lambda *parts: jnp.stack(parts), *layers),)


_unstacked.defvjp(lambda stacked: (_unstacked(stacked), None), _stacked)


@jax.custom_vjp
def _without_last(stacked: Any) -> tuple[Any, Any]:
    """All but the last of a stack, and the last; the gradient is put together in one go."""
    return jax.tree.map(lambda x: x[:-1], stacked), jax.tree.map(lambda x: x[-1], stacked)


def _with_last(_: None, parts: tuple[Any, Any]) -> tuple[Any]:
    return (jax.tree.map(lambda below, last: jnp.concatenate([below, last[None]]), *parts),)


_without_last.defvjp(lambda stacked: (_without_last(stacked), None), _with_last)


class Embeddings(nnx.Module):
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
        input_ids, token_type_ids = inputs
        if attention_mask.dtype == bool:
            positions = self.position.embedding[: input_ids.shape[1]][None]
        else:
            positions = self.position(_restarted_positions(attention_mask))
        summed = self.word(input_ids) + positions
        if self.token_type is not None:
            summed = summed + self.token_type(token_type_ids)
        return dropout(layer_norm(self.norm, summed), self.dropout_rate, key)


def sinusoids(
    key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32, *, stddev: float
) -> jax.Array:
    """[positions, dim]: sines, then cosines, of wave lengths from 2π to 10000·2π.

    Scaled to a root mean square of `stddev`; `key` draws nothing. Source: arXiv 1706.03762, 3.5.
    """
    num_positions, dim = shape
    num_waves = -(-dim // 2)
    angles = np.arange(num_positions)[:, None] * 10000.0 ** (-np.arange(num_waves) / num_waves)
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :dim]
    return jnp.asarray(table * stddev * 2**0.5, dtype)


class Block(nnx.Module):
    """Attention and feed-forward, each with a residual and a LayerNorm after it."""

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
        self.attention = SelfAttention(config, backend=attention, **options)
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
        """Its output for those tokens that `pick` takes, or for all."""
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        with jax.named_scope("~attention"):
            attended, taps = self.attention(hidden, visible, keys[0], pick)
            attended = dropout(attended, self.dropout_rate, keys[1])
            residual = hidden if pick is None else pick(hidden)
            hidden = layer_norm(self.attention_norm, residual + attended)
        with jax.named_scope("~feed-forward"):
            inner = self.activation(dense(self.intermediate, hidden))
            outer = dropout(dense(self.output, inner), self.dropout_rate, keys[2])
            return layer_norm(self.output_norm, hidden + outer), taps


def first_tokens(
    hidden: Float[Array, "batch seq dim"], attention_mask: Array, num_segments: int | None
) -> Float[Array, "batch dim"] | Float[Array, "batch segments dim"]:
    """The first token of each row or, with `num_segments`, of each segment of packed rows."""
    first = pick_first(attention_mask, num_segments)(hidden)
    return first[:, 0] if num_segments is None else first


def pick_first(attention_mask: Array, num_segments: int | None) -> Pick:
    """Takes the first token of each row, or of each segment; of one that is not there: token 0."""
    if num_segments is None:
        return lambda x: x[:, :1]
    wanted = jnp.arange(1, num_segments + 1)[None, :, None]
    return at(jnp.argmax(attention_mask[:, None, :] == wanted, axis=-1))


def _restarted_positions(segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Positions that begin at 0 with every segment."""
    index = jnp.arange(segment_ids.shape[1])[None]
    is_start = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return index - jax.lax.cummax(jnp.where(is_start, index, 0), axis=1)


def _stacked_blocks(config: ModelConfig, rngs: nnx.Rngs, **options: Any) -> Block:
    """One `Block` whose every parameter has a leading [layers] axis."""

    def block(key: jax.Array) -> Block:
        return Block(config, rngs=nnx.Rngs(key), **options)

    keys = jax.random.split(rngs.params(), config.num_hidden_layers)
    graphdef = nnx.graphdef(nnx.eval_shape(block, keys[0]))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(block(key), nnx.Param))(keys))
