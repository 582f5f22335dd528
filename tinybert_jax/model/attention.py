"""Multi-head self-attention that hands out its queries, keys and values as taps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tinybert_jax.model.dropout import dropout
from tinybert_jax.model.linear import dense, make_linear
from tinybert_jax.sections import ModelConfig


class AttentionTaps(NamedTuple):
    """What distillation reads of one layer: each [batch, seq, heads, head_dim], before softmax."""

    queries: jax.Array
    keys: jax.Array
    values: jax.Array


class SelfAttention(nnx.Module):
    def __init__(self, config: ModelConfig, **options: Any):
        width = config.hidden_size

        def linear() -> nnx.Linear:
            return make_linear(width, width, config, **options)

        self.num_heads = config.num_attention_heads
        self.query, self.key, self.value = linear(), linear(), linear()
        self.output = linear()
        self.dropout_rate = config.attention_probs_dropout_prob

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
        scores = attention_scores(taps.queries, taps.keys)
        probs = jax.nn.softmax(jnp.where(mask[:, None], scores, _MASKED), axis=-1)
        probs = dropout(probs.astype(hidden.dtype), self.dropout_rate, key)
        context = jnp.einsum("bhts,bshk->bthk", probs, taps.values)
        return dense(self.output, context.reshape(hidden.shape)), taps


def attention_scores(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch seq heads head_dim"],
) -> Float[Array, "batch heads seq seq"]:
    """QKᵀ/√head_dim in fp32, before masking and softmax (arXiv 1909.10351, equation 1)."""
    scaled = queries * jnp.asarray(queries.shape[-1] ** -0.5, queries.dtype)
    return jnp.einsum("bthk,bshk->bhts", scaled, keys, preferred_element_type=jnp.float32)


# Far below any score, finite: a row whose keys are all masked gives uniform weights, never NaN.
_MASKED = -1e30
