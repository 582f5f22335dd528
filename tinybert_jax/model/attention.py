"""Multi-head self-attention that hands out its queries, keys and values as taps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tinybert_jax.fields import AttentionBackend
from tinybert_jax.model.dropout import dropout
from tinybert_jax.model.linear import dense, make_linear
from tinybert_jax.sections import ModelConfig


class AttentionTaps(NamedTuple):
    """What distillation reads of one layer: each [batch, seq, heads, head_dim], before softmax."""

    queries: jax.Array
    keys: jax.Array
    values: jax.Array


class SelfAttention(nnx.Module):
    def __init__(self, config: ModelConfig, *, backend: AttentionBackend = "auto", **options: Any):
        width = config.hidden_size

        def linear() -> nnx.Linear:
            return make_linear(width, width, config, **options)

        self.num_heads = config.num_attention_heads
        self.query, self.key, self.value = linear(), linear(), linear()
        self.output = linear()
        self.dropout_rate = config.attention_probs_dropout_prob
        self.backend: AttentionBackend = backend

    def __call__(
        self,
        hidden: Float[Array, "batch seq dim"],
        mask: Bool[Array, "batch one_or_seq seq"],
        key: jax.Array | None,
    ) -> tuple[Float[Array, "batch seq dim"], AttentionTaps]:
        """`mask[b, t, s]`: may query t read key s; the middle axis is 1 where all may alike."""
        heads = (*hidden.shape[:2], self.num_heads, hidden.shape[-1] // self.num_heads)
        taps = AttentionTaps(
            dense(self.query, hidden).reshape(heads),
            dense(self.key, hidden).reshape(heads),
            dense(self.value, hidden).reshape(heads),
        )
        context = attend(*taps, mask, self.dropout_rate, key, backend=self.backend)
        return dense(self.output, context.reshape(hidden.shape)), taps


def attend(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch seq heads head_dim"],
    values: Float[Array, "batch seq heads head_dim"],
    mask: Bool[Array, "batch one_or_seq seq"],
    dropout_rate: float,
    key: jax.Array | None,
    *,
    backend: AttentionBackend = "auto",
) -> Float[Array, "batch seq heads head_dim"]:
    """softmax(QKᵀ/√head_dim)·V over the keys that `mask` allows, softmax in fp32.

    `backend`: xla builds the score map; cudnn, on NVIDIA GPUs in bfloat16 or float16 and without
    dropout, keeps none; auto takes cudnn wherever it can (on an H200 it halves the time of 128
    tokens and takes a third of it at 512: benchmarks/attention.py), otherwise xla. Raises
    ValueError where cudnn is asked for and cannot.
    """
    if backend != "xla":
        missing = _missing_for_cudnn(queries, 0.0 if key is None else dropout_rate)
        if missing is None:
            return _cudnn_attention(queries, keys, values, mask)
        if backend == "cudnn":
            raise ValueError(f"attention: cudnn expects {missing}; set compute.attention=auto")
    scores = attention_scores(queries, keys)
    probs = jax.nn.softmax(jnp.where(mask[:, None], scores, _MASKED), axis=-1)
    probs = dropout(probs.astype(values.dtype), dropout_rate, key)
    return jnp.einsum("bhts,bshk->bthk", probs, values)


def _missing_for_cudnn(queries: jax.Array, dropout_rate: float) -> str | None:
    if queries.dtype not in (jnp.bfloat16, jnp.float16):
        return f"activations in bfloat16 or float16, got {queries.dtype}"
    if queries.shape[1] % _CUDNN_TILE:
        return f"rows of a multiple of {_CUDNN_TILE} tokens, got {queries.shape[1]}"
    if dropout_rate:
        return f"no dropout of attention, got a rate of {dropout_rate}"
    device = jax.local_devices()[0]
    is_nvidia = "cuda" in device.client.platform_version.lower()
    if not is_nvidia or float(device.compute_capability) < 8:
        return f"an NVIDIA GPU of compute capability 8 or more, got {device.device_kind}"
    return None


def _cudnn_attention(queries, keys, values, mask) -> jax.Array:
    """cuDNN's flash attention; head dims are filled up with zeros to a multiple of 8: exact."""
    head_dim, seq = queries.shape[-1], queries.shape[1]
    spare = (0, -head_dim % 8)
    pads = ((0, 0), (0, 0), (0, 0), spare)
    context = jax.nn.dot_product_attention(
        *(jnp.pad(x, pads) for x in (queries, keys, values)),
        mask=jnp.broadcast_to(mask, (mask.shape[0], seq, seq))[:, None],
        scale=head_dim**-0.5,
        implementation="cudnn",
    )
    return context[..., :head_dim]


def attention_scores(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch seq heads head_dim"],
) -> Float[Array, "batch heads seq seq"]:
    """QKᵀ/√head_dim in fp32, before masking and softmax (arXiv 1909.10351, equation 1)."""
    scaled = queries * jnp.asarray(queries.shape[-1] ** -0.5, queries.dtype)
    return jnp.einsum("bthk,bshk->bhts", scaled, keys, preferred_element_type=jnp.float32)


# At 64 tokens its gradient was NaN where a mask was given (cuDNN with jax 0.11.2), and no faster.
_CUDNN_TILE = 128

# Far below any score, finite: a row whose keys are all masked gives uniform weights, never NaN.
_MASKED = -1e30
