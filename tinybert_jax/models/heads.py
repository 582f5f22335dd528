"""Task heads over the encoder, and the pure `apply` functions that training calls.

A model crosses into training as `(apply, params)`: `params` a plain nested dict of arrays,
`apply(params, batch fields…, key)` a pure function. No module travels further.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tinybert_jax.models.activations import ACTIVATIONS
from tinybert_jax.models.attention import at
from tinybert_jax.models.dropout import dropout
from tinybert_jax.models.encoder import EncoderOutput, first_tokens, pick_first
from tinybert_jax.models.families import family_of, make_family_encoder
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.linear import dense, is_quantised, make_linear
from tinybert_jax.models.norm import layer_norm, make_layer_norm
from tinybert_jax.models.params import Apply, Params, restack_layers
from tinybert_jax.settings.section import Pooling
from tinybert_jax.settings.sizes import ModelConfig


class ClassifierOutput(NamedTuple):
    logits: jax.Array  # fp32 [batch, classes]; packed: [batch, segments, classes]; of tokens:
    # [batch, seq, classes]; of a sentence encoder: the vectors [.., dim]
    encoder: EncoderOutput | None = None  # with taps


class MaskedLMOutput(NamedTuple):
    """A loss may make the logits itself, in parts: hidden·tableᵀ + bias."""

    logits: jax.Array  # [batch, picked, vocab], fp32
    hidden: jax.Array  # [batch, picked, dim]
    table: jax.Array  # [vocab, dim], fp32; [shards, vocab, dim] of `copy_table_per_shard`
    bias: jax.Array  # [vocab], fp32
    pair_logits: jax.Array | None = None  # [batch, 2], fp32
    encoder: EncoderOutput | None = None  # with taps


class Classifier(nnx.Module):
    """Dropout and a linear map to scores: of the pooled first token, or of every token."""

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        *,
        of_tokens: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.of_tokens = of_tokens
        self.encoder = make_family_encoder(config, has_pooler=not of_tokens, rngs=rngs, **options)
        rate = config.classifier_dropout
        if of_tokens and not family_of(config.model_type).has_token_classifier_dropout:
            rate = None
        self.dropout_rate = config.hidden_dropout_prob if rate is None else rate
        self.classifier = nnx.Linear(
            config.hidden_size,
            num_classes,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )

    def __call__(
        self,
        inputs: Text,
        attention_mask: Array,
        key: Array | None = None,
        num_segments: int | None = None,
        *,
        taps: bool = False,
    ) -> ClassifierOutput:
        """`taps` hands out what the encoder computes; its last layer then runs in full."""
        keys = (None, None) if key is None else jax.random.split(key)
        arguments = (inputs, attention_mask, keys[0])
        num_last_layer_tokens = attention_mask.shape[1] if self.of_tokens else num_segments or 1
        encoded = None
        if taps or not is_few(num_last_layer_tokens, attention_mask.shape[1]):
            encoded = self.encoder(*arguments, num_segments)
            features = encoded.hidden[-1] if self.of_tokens else encoded.pooled
            assert features is not None
        else:
            first = self.encoder.last_hidden(pick_first(attention_mask, num_segments), *arguments)
            features = self.encoder.pool(first[:, 0] if num_segments is None else first)
        with jax.named_scope("~head"):
            features = dropout(features, self.dropout_rate, keys[1])
            logits = self.classifier(features.astype(jnp.float32))
        return ClassifierOutput(logits, encoder=encoded if taps else None)


class SpanScorer(nnx.Module):
    """A linear map of every token to two scores: that an answer starts and that it ends there.

    Without dropout before the map, as BertForQuestionAnswering in transformers.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, **options: Any):
        self.encoder = make_family_encoder(config, has_pooler=False, rngs=rngs, **options)
        self.spans = make_linear(config.hidden_size, 2, config, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self,
        inputs: Text,
        attention_mask: Array,
        key: Array | None = None,
        num_segments: int | None = None,
        *,
        taps: bool = False,
    ) -> ClassifierOutput:
        """`taps` hands out what the encoder computes."""
        encoded = self.encoder(inputs, attention_mask, key, num_segments)
        with jax.named_scope("~head"):
            logits = self.spans(encoded.hidden[-1].astype(jnp.float32))
        return ClassifierOutput(logits, encoder=encoded if taps else None)


class SentenceEncoder(nnx.Module):
    """A vector per text: the mean of the states of its tokens, or the state of the first.

    It has no weights beside those of the encoder. The vectors are not normalised.
    """

    def __init__(
        self, config: ModelConfig, pooling: Pooling = "mean", *, rngs: nnx.Rngs, **options: Any
    ):
        self.pooling = pooling
        self.encoder = make_family_encoder(config, has_pooler=False, rngs=rngs, **options)

    def __call__(
        self,
        inputs: Text,
        attention_mask: Array,
        key: Array | None = None,
        num_segments: int | None = None,
        *,
        taps: bool = False,
    ) -> ClassifierOutput:
        """`taps` hands out what the encoder computes."""
        encoded = self.encoder(inputs, attention_mask, key, num_segments)
        with jax.named_scope("~head"):
            pool = mean_tokens if self.pooling == "mean" else first_tokens
            vectors = pool(encoded.hidden[-1].astype(jnp.float32), attention_mask, num_segments)
        return ClassifierOutput(vectors, encoder=encoded if taps else None)


def mean_tokens(
    hidden: Float[Array, "batch seq dim"], attention_mask: Array, num_segments: int | None
) -> Float[Array, "batch dim"] | Float[Array, "batch segments dim"]:
    """The mean state of the tokens of each row or, with `num_segments`, of each segment."""
    numbers = jnp.arange(1, (num_segments or 1) + 1)[None, :, None]
    is_own = attention_mask.astype(jnp.int32)[:, None] == numbers  # [batch, segments, seq]
    sums = jnp.einsum("bgs,bsd->bgd", is_own.astype(hidden.dtype), hidden, precision="highest")
    means = sums / jnp.maximum(is_own.sum(-1, keepdims=True), 1)
    return means[:, 0] if num_segments is None else means


class MaskedLM(nnx.Module):
    """BERT's masked-LM head. The decoder is the word table itself, passed as an argument.

    With `pair_head` also its next-sentence head, a linear map of the pooled first token.
    """

    def __init__(self, config: ModelConfig, *, pair_head: bool = False, rngs: nnx.Rngs, **options):
        dtype, product_dtype = options.get("dtype", jnp.float32), options.get("product_dtype")
        if is_quantised(product_dtype):  # of the layers alone
            product_dtype = None
        self.encoder = make_family_encoder(config, rngs=rngs, **options)
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
        inputs: Text,
        attention_mask: Array,
        key=None,
        num_segments: int | None = None,
        *,
        positions: Int[Array, "batch picked"] | None = None,
        taps: bool = False,
    ) -> MaskedLMOutput:
        """Logits at `positions`, or at every position (costly: [batch, seq, vocab]).

        `taps` hands out what the encoder computes; its last layer then runs in full.
        """
        arguments = (inputs, attention_mask, key)
        encoded, num_first = None, 0 if self.pair is None else 1  # the pair head reads that token
        seq = attention_mask.shape[1]
        num_last_layer_tokens = seq if positions is None else num_first + positions.shape[1]
        if positions is None or taps or not is_few(num_last_layer_tokens, seq):
            encoded = self.encoder(*arguments, num_segments)
            hidden = encoded.hidden[-1]
            first = hidden[:, 0]
            hidden = hidden if positions is None else at(positions)(hidden)
        else:
            read = at(jnp.pad(positions, ((0, 0), (num_first, 0))))
            hidden = self.encoder.last_hidden(read, *arguments)
            first, hidden = hidden[:, 0], hidden[:, num_first:]
        with jax.named_scope("~head"):
            hidden = layer_norm(self.norm, self.activation(dense(self.transform, hidden)))
            hidden = hidden.astype(self.decoded_dtype)  # what the products with the table read
            table = self.encoder.embeddings.word.embedding[...]
            logits = self.decoder(hidden, table if table.ndim == 2 else table[0])
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


def is_few(num_last_layer_tokens: int, seq_len: int) -> bool:
    """Whether heads that read so many tokens of a row have the last layer run for those alone.

    With more, what is left out is not worth the gathering, nor flash attention.
    """
    return 2 * num_last_layer_tokens <= seq_len


class TiedDecoder(nnx.Module):
    def __init__(self, vocab_size: int):
        self.bias = nnx.Param(jnp.zeros(vocab_size))

    def __call__(self, hidden, table):
        logits = jnp.einsum(
            "btd,vd->btv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        return logits + self.bias[...][None, None]


class Model(NamedTuple):
    """A model as training calls it."""

    apply: Apply
    init: Callable[[jax.Array], Params]  # key -> parameters


MakeHead = Callable[..., Model]  # (sizes, number of classes, options of `Encoder`)


def make_encoder(config: ModelConfig, **options: Any) -> Model:
    """An encoder without a head; options: those of `Encoder`."""
    return functional(make_family_encoder, config, **options)


def make_classifier(config: ModelConfig, num_classes: int, **options: Any) -> Model:
    """A classifier of whole examples; options: those of `Encoder`."""
    return functional(Classifier, config, num_classes, **options)


def make_token_classifier(config: ModelConfig, num_classes: int, **options: Any) -> Model:
    """A classifier of tokens; options: those of `Encoder`."""
    return functional(Classifier, config, num_classes, of_tokens=True, **options)


def make_span_scorer(config: ModelConfig, num_classes: int = 2, **options: Any) -> Model:
    """A model of starts and ends of answers: two outputs a token; options: those of `Encoder`."""
    assert num_classes == 2, num_classes
    return functional(SpanScorer, config, **options)


def make_sentence_encoder(
    config: ModelConfig, num_classes: int = 0, *, pooling: Pooling = "mean", **options: Any
) -> Model:
    """A model of sentence vectors as wide as its states; options: those of `Encoder`."""
    return functional(SentenceEncoder, config, pooling, **options)


def make_masked_lm(config: ModelConfig, **options: Any) -> Model:
    """A masked LM; options: `pair_head` and those of `Encoder`."""
    return functional(MaskedLM, config, **options)


def functional(build: Callable[..., nnx.Module], *arguments: Any, **options: Any) -> Model:
    """The same `Model` for equal arguments: its structure is traced, its `init` compiled once."""
    return _built(build, arguments, tuple(sorted(options.items())))


@functools.lru_cache(maxsize=256)
def _built(
    build: Callable[..., nnx.Module], arguments: tuple, sorted_options: tuple[tuple[str, Any], ...]
) -> Model:
    """Parameters start and are loaded in fp32; with int8 or float8 products `apply` takes
    `frozen_params`."""
    started = dict(sorted_options)
    if is_quantised(started.get("product_dtype")):
        del started["product_dtype"]

    def init_params(key: jax.Array) -> Params:
        model = build(*arguments, rngs=nnx.Rngs(key), **started)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    bind = binder(build, arguments, sorted_options)

    def apply(params: Params, *args, **kwargs):
        return bind(params)(*args, **kwargs)

    return Model(apply, init_params)


@functools.lru_cache(maxsize=256)
def binder(
    build: Callable[..., nnx.Module], arguments: tuple, sorted_options: tuple[tuple[str, Any], ...]
) -> Callable[[Params], Any]:
    """Makes a function: parameters -> the module that reads them."""
    options = dict(sorted_options)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(*arguments, rngs=nnx.Rngs(0), **options)))
    return lambda params: nnx.merge(graphdef, restack_layers(params))
