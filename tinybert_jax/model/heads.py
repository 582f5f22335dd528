"""Task heads over the encoder, and the pure `apply` functions that training calls.

A model crosses into training as `(apply, params)`: `params` a plain nested dict of arrays,
`apply(params, batch fields…, key)` a pure function. No module travels further.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from tinybert_jax.config.models import ModelConfig
from tinybert_jax.model.activations import ACTIVATIONS
from tinybert_jax.model.attention import at
from tinybert_jax.model.dropout import dropout
from tinybert_jax.model.encoder import Encoder, EncoderOutput, pick_first
from tinybert_jax.model.linear import dense, is_int8, make_linear, rounded_kernels
from tinybert_jax.model.norm import layer_norm, make_layer_norm

Params = dict[str, Any]
Apply = Callable[..., Any]


class ClassifierOutput(NamedTuple):
    logits: jax.Array  # [batch, num_labels] or, packed, [batch, segments, num_labels], fp32
    encoder: EncoderOutput | None = None  # with taps


class MaskedLMOutput(NamedTuple):
    """A loss may make the logits itself, in parts: hidden·tableᵀ + bias."""

    logits: jax.Array  # [batch, picked, vocab], fp32
    hidden: jax.Array  # [batch, picked, dim]
    table: jax.Array  # [vocab, dim], fp32
    bias: jax.Array  # [vocab], fp32
    pair_logits: jax.Array | None = None  # [batch, 2], fp32
    encoder: EncoderOutput | None = None  # with taps


class SequenceClassifier(nnx.Module):
    """Dropout and a linear map over the pooled first token; one output for regression."""

    def __init__(self, config: ModelConfig, num_labels: int, *, rngs: nnx.Rngs, **options):
        self.encoder = Encoder(config, rngs=rngs, **options)
        self.dropout_rate = config.hidden_dropout_prob
        self.classifier = nnx.Linear(
            config.hidden_size,
            num_labels,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )

    def __call__(
        self,
        input_ids,
        attention_mask,
        token_type_ids,
        key=None,
        num_segments=None,
        *,
        taps: bool = False,
    ) -> ClassifierOutput:
        """`taps` hands out what the encoder computes; its last layer then runs in full."""
        keys = (None, None) if key is None else jax.random.split(key)
        inputs = (input_ids, attention_mask, token_type_ids, keys[0])
        encoded = None
        if taps or not is_few(num_segments or 1, input_ids.shape[1]):
            encoded = self.encoder(*inputs, num_segments)
            pooled = encoded.pooled
        else:
            first = self.encoder.last_hidden(pick_first(attention_mask, num_segments), *inputs)
            pooled = self.encoder.pool(first[:, 0] if num_segments is None else first)
        with jax.named_scope("~head"):
            pooled = dropout(pooled, self.dropout_rate, keys[1])
            logits = self.classifier(pooled.astype(jnp.float32))
        return ClassifierOutput(logits, encoder=encoded if taps else None)


class MaskedLM(nnx.Module):
    """BERT's masked-LM head. The decoder is the word table itself, passed as an argument.

    With `pair_head` also its next-sentence head, a linear map of the pooled first token.
    """

    def __init__(self, config: ModelConfig, *, pair_head: bool = False, rngs: nnx.Rngs, **options):
        dtype, product_dtype = options.get("dtype", jnp.float32), options.get("product_dtype")
        if is_int8(product_dtype):  # of the layers alone
            product_dtype = None
        self.encoder = Encoder(config, rngs=rngs, **options)
        width, dtypes = config.hidden_size, {"dtype": dtype, "product_dtype": product_dtype}
        self.transform = make_linear(width, width, config, rngs=rngs, **dtypes)
        self.decoded_dtype = product_dtype or dtype
        self.norm = make_layer_norm(config, dtype, rngs)
        self.decoder = TiedDecoder(config.vocab_size)
        if pair_head:
            self.pair = make_linear(width, 2, config, dtype=jnp.float32, rngs=rngs)
        else:
            self.pair = None
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(
        self,
        input_ids,
        attention_mask,
        token_type_ids,
        key=None,
        *,
        positions: Int[Array, "batch picked"] | None = None,
        taps: bool = False,
    ) -> MaskedLMOutput:
        """Logits at `positions`, or at every position (costly: [batch, seq, vocab]).

        `taps` hands out what the encoder computes; its last layer then runs in full.
        """
        inputs = (input_ids, attention_mask, token_type_ids, key)
        encoded, num_first = None, 0 if self.pair is None else 1  # the pair head reads that token
        seq = input_ids.shape[1]
        num_read = seq if positions is None else num_first + positions.shape[1]
        if positions is None or taps or not is_few(num_read, seq):
            encoded = self.encoder(*inputs)
            hidden = encoded.hidden[-1]
            first = hidden[:, 0]
            hidden = hidden if positions is None else at(positions)(hidden)
        else:
            read = at(jnp.pad(positions, ((0, 0), (num_first, 0))))
            hidden = self.encoder.last_hidden(read, *inputs)
            first, hidden = hidden[:, 0], hidden[:, num_first:]
        with jax.named_scope("~head"):
            hidden = layer_norm(self.norm, self.activation(dense(self.transform, hidden)))
            hidden = hidden.astype(self.decoded_dtype)  # what the products with the table read
            table = self.encoder.embeddings.word.embedding[...]
            logits = self.decoder(hidden, table)
            pair = None
            if self.pair is not None:
                pair = self.pair(self.encoder.pool(first).astype(jnp.float32))
        return MaskedLMOutput(
            logits,
            hidden,
            table,
            self.decoder.bias[...],
            pair_logits=pair,
            encoder=encoded if taps else None,
        )


def is_few(num_read: int, seq_len: int) -> bool:
    """Whether heads that read so many tokens of a row have the last layer run for those alone.

    With more, what is left out is not worth the gathering, nor flash attention.
    """
    return 2 * num_read <= seq_len


class TiedDecoder(nnx.Module):
    def __init__(self, vocab_size: int):
        self.bias = nnx.Param(jnp.zeros(vocab_size))

    def __call__(self, hidden, table):
        logits = jnp.einsum(
            "btd,vd->btv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        return logits + self.bias[...][None, None]


def make_encoder(config: ModelConfig, **options) -> tuple[Apply, Callable[[jax.Array], Params]]:
    return _functional(functools.partial(Encoder, config), options)


def make_classifier(
    config: ModelConfig, num_labels: int, **options
) -> tuple[Apply, Callable[[jax.Array], Params]]:
    """`(apply, init_params)` of a sequence classifier; options: those of `Encoder`."""
    return _functional(functools.partial(SequenceClassifier, config, num_labels), options)


def make_masked_lm(config: ModelConfig, **options) -> tuple[Apply, Callable[[jax.Array], Params]]:
    return _functional(functools.partial(MaskedLM, config), options)


def _functional(
    build: Callable[..., nnx.Module], options: dict[str, Any]
) -> tuple[Apply, Callable[[jax.Array], Params]]:
    """Parameters start and are loaded in fp32; with int8 `apply` takes `frozen_params` of them."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0), **options)))
    started = dict(options)
    if is_int8(options.get("product_dtype")):
        del started["product_dtype"]

    def init_params(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(rngs=nnx.Rngs(key), **started), nnx.Param))

    def apply(params: Params, *args, **kwargs):
        return nnx.merge(graphdef, layers_joined(params))(*args, **kwargs)

    return apply, init_params


def frozen_params(
    params: Params,
    *,
    dtype: DTypeLike,
    product_dtype: DTypeLike | None = None,
    unroll: bool = False,
) -> Params:
    """Those of a model that is not trained, as its passes read them: the same bits but for int8.

    Kernels are rounded once (`rounded_kernels`); layers that are unrolled are `layers_apart`.
    """
    rounded = rounded_kernels(params, dtype=dtype, product_dtype=product_dtype)
    return layers_apart(rounded) if unroll else rounded


def layers_apart(params: Params) -> Params:
    """Parameters with a tuple of layers, each a stack of one, instead of a stack of all.

    Of one model, or of a dict that holds one, such as {student, projection}. `apply` takes both
    forms. Of a stack XLA:CPU copies every layer that an unrolled encoder reads, and puts its
    gradient together: a fine-tuning step of benchmarks/finetune.py took 1.04 times as long.
    """

    def apart(stacked: Any) -> tuple[Any, ...]:
        def one(i: int) -> Any:
            return jax.tree.map(lambda x: x[i : i + 1], stacked)

        return tuple(one(i) for i in range(len(jax.tree.leaves(stacked)[0])))

    return _with_layers(params, apart)


def layers_joined(params: Params) -> Params:
    """The inverse of `layers_apart`; in a program XLA takes the parts where they are.

    Of arrays of NumPy it makes arrays of NumPy.
    """

    def joined(layers: Any) -> Any:
        if not isinstance(layers, tuple):
            return layers
        is_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(layers))
        xp = np if is_host else jnp
        return jax.tree.map(lambda *parts: xp.concatenate(parts), *layers)

    return _with_layers(params, joined)


def _with_layers(params: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(params, Mapping):
        return params
    return {
        name: change(own) if name == "layers" else _with_layers(own, change)
        for name, own in params.items()
    }
