"""Multi-head attention that also returns queries, keys, values and scores (taps)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tinybert_jax.models.attention_kernel import dropout_seeds, triton_attention
from tinybert_jax.models.dropout import dropout
from tinybert_jax.models.linear import Linear, from_heads, make_linear, to_heads
from tinybert_jax.models.score_kernel import score_distance
from tinybert_jax.parallel.sharding import shard_map_over_batch
from tinybert_jax.settings.section import AttentionBackend
from tinybert_jax.settings.sizes import ModelConfig


class AttentionTaps(NamedTuple):
    """Intermediate arrays of one layer that distillation reads; scores before mask and softmax.

    The queries are those of all tokens or of the picked tokens.
    """

    queries: jax.Array  # [batch, queries, heads, head_dim]
    keys: jax.Array  # [batch, seq, heads, head_dim]
    values: jax.Array  # [batch, seq, heads, head_dim]
    attention_scores: jax.Array | None  # [batch, heads, queries, seq] fp32; None: backend has none


class Visible(NamedTuple):
    """The keys that a query attends to, in two forms; a backend reads one, `jit` drops the other.

    Every query attends to at least one key, because a softmax over no key is NaN in one kernel and
    has a wrong gradient in another. Padding attends to padding; those outputs are never used.
    """

    pairs: jax.Array  # bool [batch, 1 or queries, seq]: query t attends to key s; 1: every query
    query_ids: jax.Array  # int32 [batch, queries]: a query attends to the keys with the same id
    key_ids: jax.Array  # int32 [batch, seq]


# Selects tokens of every row: [batch, seq, …] to [batch, picked, …].
Pick = Callable[[Array], Array]


def at(positions: Int[Array, "batch picked"]) -> Pick:
    """Makes a function that picks the tokens at these positions of every row."""

    def pick(x: Array) -> Array:
        index = positions.reshape(*positions.shape, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")

    return pick


def make_visible(
    attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"],
) -> Visible:
    """Queries attend to real tokens; in packed rows (segment ids, 0: padding) to the same segment.

    A row of padding alone attends to all its tokens.
    """
    if attention_mask.dtype == bool:
        is_key = attention_mask | ~attention_mask.any(axis=-1, keepdims=True)
        ids = is_key.astype(jnp.int32)
        return Visible(is_key[:, None, :], jnp.ones_like(ids), ids)
    pairs = attention_mask[:, :, None] == attention_mask[:, None, :]
    return Visible(pairs, attention_mask, attention_mask)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, *, backend: AttentionBackend = "auto", **options: Any):
        width = config.hidden_size

        def linear() -> Linear:
            return make_linear(width, width, config, **options)

        self.num_heads = config.num_attention_heads
        self.query, self.key, self.value = linear(), linear(), linear()
        self.output = linear()
        self.dropout_rate = config.attention_probs_dropout_prob
        self.backend: AttentionBackend = backend

    def __call__(
        self,
        hidden: Float[Array, "batch seq dim"],
        visible: Visible,
        key: jax.Array | None,
        pick: Pick | None = None,
        *,
        memory: Float[Array, "batch keys dim"] | None = None,
    ) -> tuple[Float[Array, "batch picked dim"], AttentionTaps]:
        """Output and taps for the tokens that `pick` selects (default: all), attending to all.

        With `memory` to those of another sequence: cross-attention. Picked queries use the xla
        backend: their score map is small, and fused backends need a multiple of 128 queries.
        """
        queried, backend = hidden, self.backend
        if pick is not None:
            queried, backend = pick(hidden), "xla"
            pairs, query_ids, key_ids = visible
            pairs = pick(pairs) if pairs.shape[1] > 1 else pairs
            visible = Visible(pairs, pick(query_ids), key_ids)

        queries = self.split_heads(self.query, queried)
        keys, values = self.keys_and_values(hidden if memory is None else memory)
        context, scores = attend(
            queries, keys, values, visible, self.dropout_rate, key, backend=backend
        )
        attended = from_heads(self.output, context)
        return attended, AttentionTaps(queries, keys, values, scores)

    def keys_and_values(
        self, hidden: Float[Array, "batch seq dim"]
    ) -> tuple[Float[Array, "batch seq heads head_dim"], Float[Array, "batch seq heads head_dim"]]:
        return self.split_heads(self.key, hidden), self.split_heads(self.value, hidden)

    def split_heads(
        self, linear: Linear, x: Float[Array, "batch seq dim"]
    ) -> Float[Array, "batch seq heads head_dim"]:
        return to_heads(linear, x, self.num_heads)


def attend(
    queries: Float[Array, "batch picked heads head_dim"],
    keys: Float[Array, "batch seq heads head_dim"],
    values: Float[Array, "batch seq heads head_dim"],
    visible: Visible,
    dropout_rate: float,
    key: jax.Array | None,
    *,
    backend: AttentionBackend = "auto",
) -> tuple[
    Float[Array, "batch picked heads head_dim"], Float[Array, "batch heads picked seq"] | None
]:
    """softmax(QKᵀ/√head_dim)·V over the visible keys, softmax in fp32.

    Also returns the scores QKᵀ/√head_dim of all keys if the backend is xla, else None.

    `backend`: xla builds the score map; triton and cudnn (NVIDIA GPUs, bfloat16) and splash (TPUs)
    build none. cudnn and splash have no dropout, and need rows of a multiple of 128 tokens; triton
    drops the same entries as xla. auto takes cudnn where it can run (on an H200, with the gradient,
    0.55 to 0.72 of the time of xla at 128 tokens and a third at 512: benchmarks/attention.py), else
    xla; triton takes cudnn where it can run too, else the kernel of `attention_kernel`, which is
    compiled for an H200 and not measured on one (docs/scale.md). Raises ValueError if the given
    backend cannot run.
    """
    rate, missing = 0.0 if key is None else dropout_rate, None
    for fused in _ORDER.get(backend, (backend,)):
        missing = None if fused == "xla" else _missing_requirement(fused, queries, keys, rate)
        if missing is None and fused == "triton":
            return _by_triton(queries, keys, values, visible, rate, key), None
        if missing is None and fused != "xla":
            return shard_map_over_batch(_FUSED[fused])(queries, keys, values, visible), None
    if missing is not None and backend != "auto":
        raise ValueError(f"attention: {backend} expects {missing}; set compute.attention=auto")
    scores = attention_scores(queries, keys)
    probs = jax.nn.softmax(jnp.where(visible.pairs[:, None], scores, _MASKED_SCORE), axis=-1)
    probs = dropout(probs.astype(values.dtype), dropout_rate, key)
    return _context(probs, values), scores


def attend_cached(
    queries: Float[Array, "batch picked heads head_dim"],
    keys: Float[Array, "batch heads head_dim seq"],
    values: Float[Array, "batch heads seq head_dim"],
    is_seen: Bool[Array, "#batch 1 #picked seq"],
) -> Float[Array, "batch picked heads head_dim"]:
    """`attend` without dropout, over keys and values in the layout that its products read."""
    scaled = queries * jnp.asarray(queries.shape[-1] ** -0.5, queries.dtype)
    scores = _dot(_by_head(scaled), keys)
    probs = jax.nn.softmax(jnp.where(is_seen, scores, _MASKED_SCORE), axis=-1)
    return _by_head(_dot(probs.astype(values.dtype), values)).astype(values.dtype)


def _by_triton(
    queries: Array,
    keys: Array,
    values: Array,
    visible: Visible,
    dropout_rate: float,
    key: jax.Array | None,
) -> Array:
    num_rows, seq, num_heads, _ = queries.shape
    run = functools.partial(triton_attention, dropout_rate=dropout_rate)
    seeds = dropout_seeds(key, num_rows, num_heads, seq)
    ids = visible.query_ids, visible.key_ids
    return shard_map_over_batch(run)(queries, keys, values, *ids, seeds)


def _missing_requirement(
    backend: AttentionBackend, queries: jax.Array, keys: jax.Array, dropout_rate: float
) -> str | None:
    """What a fused backend expects and the inputs or devices do not offer; None: it can run."""
    most_dims = MOST_DIMS.get(backend)
    if most_dims and queries.dtype != jnp.bfloat16:
        return f"activations in bfloat16, got {queries.dtype}"
    if most_dims and queries.shape[-1] > most_dims:
        return f"heads of at most {most_dims} dims, got {queries.shape[-1]}"
    if backend == "triton" and queries.shape[1] != keys.shape[1]:
        return f"as many queries as keys, got {queries.shape[1]} and {keys.shape[1]}"
    if backend != "triton" and queries.shape[1] % _TILE:
        return f"rows of a multiple of {_TILE} tokens, got {queries.shape[1]}"
    if backend != "triton" and dropout_rate:
        return f"no attention dropout, got a rate of {dropout_rate}"
    return missing_device(backend)


def fused_score_distance(*taps: Array) -> Callable[..., Array] | None:
    """`score_distance` of such queries and keys of two models; None where it cannot run."""
    most_dims = MOST_DIMS["triton"]
    fits = all(x.dtype == jnp.bfloat16 and x.shape[-1] <= most_dims for x in taps)
    if not fits or missing_device("triton") is not None:
        return None
    return shard_map_over_batch(score_distance)


def missing_device(backend: AttentionBackend) -> str | None:
    """The device that a fused backend expects and the mesh does not have; None: it has.

    The mesh is that of `jax.set_mesh`, whose devices may be those of another machine that a program
    is compiled for; without one, this process has the devices.
    """
    local = jax.local_devices()[0]
    target = jax.sharding.get_abstract_mesh().abstract_device or local
    if backend == "splash":
        return None if target.platform == "tpu" else f"a TPU, got {target.device_kind}"
    is_here = target.platform == local.platform and "cuda" in _version(local)
    if backend == "triton" and not is_here and target.device_kind.startswith("NVIDIA"):
        return None
    # JAX asks the local GPU for its capability when it traces cuDNN's attention.
    if not is_here or float(local.compute_capability) < 8:
        return f"an NVIDIA GPU of compute capability 8 or more, got {target.device_kind}"
    return None


def _version(device: Any) -> str:
    return device.client.platform_version.lower()


def cudnn_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, visible: Visible
) -> jax.Array:
    """cuDNN's flash attention; zeros pad head dims to a multiple of 8, which changes no result."""
    head_dim, seq = queries.shape[-1], queries.shape[1]
    pads = ((0, 0), (0, 0), (0, 0), (0, -head_dim % 8))
    context = jax.nn.dot_product_attention(
        *(jnp.pad(x, pads) for x in (queries, keys, values)),
        mask=jnp.broadcast_to(visible.pairs, (len(queries), seq, seq))[:, None],
        scale=head_dim**-0.5,
        implementation="cudnn",
    )
    return context[..., :head_dim]


def splash_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    visible: Visible,
    *,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention for TPUs, at any head dim; `interpret` runs it on any device."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (  # slow to load
        splash_attention_kernel,
        splash_attention_mask,
    )

    num_heads, (seq, head_dim) = queries.shape[2], queries.shape[1::2]
    full_mask = splash_attention_mask.FullMask((seq, seq))
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([full_mask] * num_heads), interpret=interpret
    )
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (queries * head_dim**-0.5, keys, values))
    ids = splash_attention_kernel.SegmentIds(visible.query_ids, visible.key_ids)
    # Any, because the type of a kernel includes residuals, which this kernel does not return.
    context: Any = jax.vmap(kernel)(*heads_first, ids)
    return jnp.swapaxes(context, 1, 2)


_FUSED = {"cudnn": cudnn_attention, "splash": splash_attention}
# What a setting takes: the first that can run.
_ORDER: dict[AttentionBackend, tuple[AttentionBackend, ...]] = {
    "auto": ("cudnn",),
    "triton": ("cudnn", "triton"),
}
MOST_DIMS = {"cudnn": 128, "triton": 64}  # of a head


def attention_scores(
    queries: Float[Array, "batch picked heads head_dim"],
    keys: Float[Array, "batch seq heads head_dim"],
) -> Float[Array, "batch heads picked seq"]:
    """QKᵀ/√head_dim in fp32, before masking and softmax (arXiv 1909.10351, equation 1)."""
    scaled = queries * jnp.asarray(queries.shape[-1] ** -0.5, queries.dtype)
    return _scores(scaled, keys)


# XLA:CPU multiplies many small matrices fastest if it contracts the last axis of the left and the
# first axis of the right matrix, and the rows of the result are long: at 128 tokens and a head_dim
# of 26 up to 2.5 times as fast as the products of an einsum and its derivatives.


def _dot(left: Array, right: Array) -> Float[Array, "batch heads rows columns"]:
    """[b, h, m, k] · [b, h, k, n] with fp32 sums."""
    dims = (((3,), (2,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _by_head(x: Array) -> Array:
    """[b, t, h, d] to [b, h, t, d]."""
    return x.transpose(0, 2, 1, 3)


def _by_dim(x: Array) -> Array:
    """[b, t, h, d] to [b, h, d, t]."""
    return x.transpose(0, 2, 3, 1)


def _apply_maps(maps: Array, x: Array) -> Array:
    """[b, h, t, s] · [b, s, h, d] to [b, t, h, d]."""
    if x.shape[-1] % 16 == 0:
        return _apply_maps_by_head(maps, x)
    return jax.lax.platform_dependent(maps, x, cpu=_apply_maps_by_dim, default=_apply_maps_by_head)


def _apply_maps_by_head(maps: Array, x: Array) -> Array:
    return _dot(maps, _by_head(x)).transpose(0, 2, 1, 3)


def _apply_maps_by_dim(maps: Array, x: Array) -> Array:
    # The barrier keeps XLA from folding the transpose into the product.
    transposed = jax.lax.optimization_barrier(maps.swapaxes(2, 3))
    return _dot(_by_dim(x), transposed).transpose(0, 3, 1, 2)


def _apply_transposed_maps(maps: Array, x: Array) -> Array:
    """[b, h, t, s]ᵀ · [b, t, h, d] to [b, s, h, d]."""
    return _dot(_by_dim(x), maps).transpose(0, 3, 1, 2)


@jax.custom_vjp
def _scores(queries: Array, keys: Array) -> Array:
    return _dot(_by_head(queries), _by_dim(keys))


def _scores_backward(residuals: tuple, cotangent: Array) -> tuple[Array, Array]:
    queries, keys = residuals
    cotangent = cotangent.astype(queries.dtype)
    return (
        _apply_maps(cotangent, keys).astype(queries.dtype),
        _apply_transposed_maps(cotangent, queries).astype(keys.dtype),
    )


_scores.defvjp(lambda q, k: (_scores(q, k), (q, k)), _scores_backward)


@jax.custom_vjp
def _context(probs: Array, values: Array) -> Array:
    return _apply_maps(probs, values).astype(values.dtype)


def _context_backward(residuals: tuple, cotangent: Array) -> tuple[Array, Array]:
    probs, values = residuals
    by_probs = _dot(_by_head(cotangent), _by_dim(values)).astype(probs.dtype)
    return by_probs, _apply_transposed_maps(probs, cotangent).astype(values.dtype)


_context.defvjp(lambda p, v: (_context(p, v), (p, v)), _context_backward)


# Block size of splash. cuDNN's gradient of 64 masked tokens was NaN (jax 0.11.2), and no faster.
_TILE = 128

_MASKED_SCORE = -1e30  # far below any score, and finite
