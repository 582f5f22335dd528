"""Makes text with an encoder-decoder: greedy, beam search and sampling, each one program.

Lengths are static, and keys and values of earlier tokens are kept. Tokens and scores are those of
`generate` in transformers, which the names of the settings are from.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinybert_jax.models.inputs import Text
from tinybert_jax.models.seq2seq import Cache, Seq2Seq
from tinybert_jax.settings.sizes import EncoderDecoderConfig

_IMPOSSIBLE = -1e9  # added to the scores of hypotheses that may not be chosen


class Decoding(NamedTuple):
    """How to choose tokens; static in a program."""

    max_new_tokens: int
    num_beams: int = 1
    length_penalty: float = 1.0  # scores are divided by the length to this power
    early_stopping: bool = False  # whether a source is done with `num_beams` finished hypotheses
    do_sample: bool = False  # draw tokens; of one hypothesis
    temperature: float = 1.0
    top_k: int = 0  # draw from so many of the likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the likeliest tokens that have this probability together


def generate(
    model: Seq2Seq,
    config: EncoderDecoderConfig,
    inputs: Text,
    attention_mask: Bool[Array, "batch source"],
    how: Decoding,
    key: jax.Array | None = None,
) -> Int[Array, "batch length"]:
    """Token ids from the start token on, up to `max_new_tokens` more, filled up with padding.

    A row without source tokens is filler, which is not decoded. The loop ends when all rows have
    ended.
    """
    assert how.num_beams == 1 or not how.do_sample, "beams are not drawn"
    is_real = attention_mask.any(axis=1)
    if how.num_beams > 1:
        return _search(model, config, inputs, attention_mask, is_real, how)
    return _choose(model, config, inputs, attention_mask, is_real, how, key)


def _choose(
    model: Seq2Seq,
    config: EncoderDecoderConfig,
    inputs: Text,
    attention_mask: Array,
    is_real: Array,
    how: Decoding,
    key: jax.Array | None,
) -> Array:
    """The likeliest token each time, or with `do_sample` one that is drawn."""
    memory, num_rows = model.remember(inputs, attention_mask), len(is_real)
    ids = jnp.full((num_rows, how.max_new_tokens + 1), config.pad_token_id, jnp.int32)
    ids = ids.at[:, 0].set(config.decoder_start_token_id)

    def is_open(state: tuple) -> Array:
        position, _, is_done, _ = state
        return (position < how.max_new_tokens) & ~is_done.all()

    def step(state: tuple) -> tuple:
        position, ids, is_done, cache = state
        last = jax.lax.dynamic_index_in_dim(ids, position, axis=1, keepdims=False)
        logits, cache = model.step(last, position, memory, cache)
        if how.do_sample:
            assert key is not None
            kept = likeliest(logits, how)
            chosen = jax.random.categorical(jax.random.fold_in(key, position), kept)
        else:
            chosen = top(logits, 1)[1][:, 0]
        chosen = jnp.where(is_done, config.pad_token_id, chosen).astype(jnp.int32)
        ids = jax.lax.dynamic_update_slice_in_dim(ids, chosen[:, None], position + 1, axis=1)
        return position + 1, ids, is_done | (chosen == config.eos_token_id), cache

    cache = model.empty_cache(memory, how.max_new_tokens)
    return jax.lax.while_loop(is_open, step, (jnp.int32(0), ids, ~is_real, cache))[1]


_BLOCK = 64  # columns


def top(
    values: Float[Array, "rows columns"], number: int
) -> tuple[Float[Array, "rows number"], Int[Array, "rows number"]]:
    """(values, columns) as of `jax.lax.top_k`.

    On CPUs the columns are looked for in the blocks of columns with the highest maxima: the 8 best
    of 64 rows of 32,000 take 0.4 ms in place of 3.0 (2 cores, jax 0.10.2).
    """

    def whole(values: Array) -> tuple[Array, ...]:
        return tuple(jax.lax.top_k(values, number))

    if values.shape[1] // _BLOCK <= 2 * number:
        return whole(values)
    by_blocks = functools.partial(_top_of_blocks, number=number)
    return jax.lax.platform_dependent(values, cpu=by_blocks, default=whole)


def _top_of_blocks(values: Array, *, number: int) -> tuple[Array, ...]:
    num_rows, num_columns = values.shape
    pads = ((0, 0), (0, -num_columns % _BLOCK))
    blocks = jnp.pad(values, pads, constant_values=-jnp.inf).reshape(num_rows, -1, _BLOCK)
    best = jnp.sort(jax.lax.top_k(blocks.max(axis=-1), number)[1], axis=-1)  # ties: first columns
    found = jnp.take_along_axis(blocks, best[:, :, None], axis=1).reshape(num_rows, -1)
    highest, places = jax.lax.top_k(found, number)
    block = jnp.take_along_axis(best, places // _BLOCK, axis=1)
    return highest, block * _BLOCK + places % _BLOCK


def likeliest(logits: Float[Array, "rows vocab"], how: Decoding) -> Float[Array, "rows vocab"]:
    """Logits at the temperature; −inf for tokens that `top_k` and `top_p` leave out."""
    logits = logits / how.temperature
    if 0 < how.top_k < logits.shape[-1]:
        least = top(logits, how.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if how.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        is_kept = jnp.cumsum(probs, axis=-1) - probs < how.top_p  # the first one always
        least = jnp.min(jnp.where(is_kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


class _Beams(NamedTuple):
    """The state of beam search."""

    position: jax.Array  # int32 []: of the last token of the open hypotheses
    ids: jax.Array  # int32 [batch, beams, length]: open hypotheses, best first
    scores: jax.Array  # fp32 [batch, beams]: sums of log-probabilities
    done_ids: jax.Array  # int32 [batch, beams, length]: finished hypotheses, best first
    done_scores: jax.Array  # fp32 [batch, beams]: with the length penalty
    is_done: jax.Array  # bool [batch, beams]: whether there is such a hypothesis
    is_open: jax.Array  # bool [batch]: whether an open hypothesis can still win
    cache: Cache
    origins: jax.Array  # int32 [batch, beams, length]: see `Seq2Seq.step`


def _search(
    model: Seq2Seq,
    config: EncoderDecoderConfig,
    inputs: Text,
    attention_mask: Array,
    is_real: Array,
    how: Decoding,
) -> Array:
    """The best hypothesis of each source."""
    memory, num_beams = model.remember(inputs, attention_mask), how.num_beams
    shape = (len(is_real), num_beams)
    ids = jnp.full((*shape, how.max_new_tokens + 1), config.pad_token_id, jnp.int32)
    ids = ids.at[:, :, 0].set(config.decoder_start_token_id)
    # All beams begin alike: only the first may be continued.
    first = jnp.where(jnp.arange(num_beams) == 0, 0.0, _IMPOSSIBLE)
    start = _Beams(
        position=jnp.int32(0),
        ids=ids,
        scores=jnp.broadcast_to(first[None], shape),
        done_ids=ids,
        done_scores=jnp.full(shape, _IMPOSSIBLE),
        is_done=jnp.zeros(shape, bool),
        is_open=is_real,
        cache=model.empty_cache(memory, how.max_new_tokens, num_beams),
        origins=jnp.zeros((*shape, how.max_new_tokens), jnp.int32),
    )
    numbers = jnp.arange(num_beams, dtype=jnp.int32)[None, :, None]
    beam_numbers = jnp.broadcast_to(numbers, (*shape, 1))

    def step(state: _Beams) -> _Beams:
        last = jax.lax.dynamic_index_in_dim(state.ids, state.position, axis=2, keepdims=False)
        place = state.position
        origins = jax.lax.dynamic_update_slice_in_dim(state.origins, beam_numbers, place, axis=2)
        logits, cache = model.step(last.reshape(-1), state.position, memory, state.cache, origins)
        log_probs = jax.nn.log_softmax(logits, axis=-1).reshape(*shape, -1)
        return _advance(state._replace(cache=cache, origins=origins), log_probs, config, how)

    def is_open(state: _Beams) -> Array:
        return (state.position < how.max_new_tokens) & state.is_open.any()

    return jax.lax.while_loop(is_open, step, start).done_ids[:, 0]


def _advance(
    state: _Beams, log_probs: Array, config: EncoderDecoderConfig, how: Decoding
) -> _Beams:
    """The beams after one more token; log_probs [batch, beams, vocab]."""
    num_beams, num_words = log_probs.shape[1:]
    length = state.position + 1  # of the hypotheses now, without the start token
    sums = (log_probs + state.scores[:, :, None]).reshape(len(log_probs), -1)
    # Twice as many as beams: if all of the best end here, as many are left to go on.
    scores, flat = top(sums, 2 * num_beams)
    beam, token = flat // num_words, (flat % num_words).astype(jnp.int32)
    ids = jnp.take_along_axis(state.ids, beam[:, :, None], axis=1)
    ids = jax.lax.dynamic_update_slice_in_dim(ids, token[:, :, None], length, axis=2)
    ends = (token == config.eos_token_id) | (length == how.max_new_tokens)

    open_scores, places = jax.lax.top_k(scores + _IMPOSSIBLE * ends, num_beams)
    open_ids = jnp.take_along_axis(ids, places[:, :, None], axis=1)
    parents = jnp.take_along_axis(beam, places, axis=1)

    # Only the best `num_beams` may end: the others are there to go on.
    ended = ends & (jnp.arange(2 * num_beams) < num_beams)[None]
    is_full = state.is_done.all(axis=1) if how.early_stopping else jnp.zeros_like(state.is_open)
    may_end = ended & (state.is_open & ~is_full)[:, None]
    by_length = scores / length.astype(jnp.float32) ** how.length_penalty
    merged = jnp.concatenate([state.done_scores, by_length + _IMPOSSIBLE * (1.0 - may_end)], axis=1)
    done_scores, best = jax.lax.top_k(merged, num_beams)
    done_ids = jnp.concatenate([state.done_ids, ids], axis=1)
    is_done = jnp.concatenate([state.is_done, may_end], axis=1)
    done_ids = jnp.take_along_axis(done_ids, best[:, :, None], axis=1)
    is_done = jnp.take_along_axis(is_done, best, axis=1)

    # An open hypothesis only loses probability. Its score at the present length is taken for the
    # best that it can reach, as in transformers.
    reachable = open_scores[:, 0] / length.astype(jnp.float32) ** how.length_penalty
    worst = jnp.where(is_done, done_scores.min(axis=1, keepdims=True), _IMPOSSIBLE)
    is_open = state.is_open & (reachable[:, None] > worst).any(axis=1)
    if how.early_stopping:
        is_open &= ~is_done.all(axis=1)
    return _Beams(
        position=length,
        ids=open_ids,
        scores=open_scores,
        done_ids=done_ids,
        done_scores=done_scores,
        is_done=is_done,
        is_open=is_open,
        cache=state.cache,
        origins=jnp.take_along_axis(state.origins, parents[:, :, None], axis=1),
    )
