"""Masking for masked LMs, on the device.

It chooses the masked tokens, replaces them and gathers their positions. The loss is elsewhere.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

IGNORED_LABEL = -100
MAX_SPAN = 10  # most words of a span, as in SpanBERT
SPAN_STOP = 0.2  # parameter of the geometric distribution of span lengths, as in SpanBERT

Unit = Literal["token", "whole_word", "span"]

# Upper bounds of the variance of the number of masked tokens in a row, divided by the variance for
# independent tokens. Words of 1.3 pieces and spans of 3.8 words stay well below.
_CLUSTER = {"token": 1, "whole_word": 3, "span": 12}


def mask_rows(
    input_ids: Int[Array, "batch seq"],
    real: Bool[Array, "batch seq"],
    key: PRNGKeyArray,
    *,
    rate: float | Float[Array, ""],
    special_token_ids: Sequence[int],
    max_predictions: int,
    mask_token_id: int,
    vocab_size: int,
    unit: Unit = "token",
    is_continuation: Bool[Array, " vocab"] | None = None,
) -> tuple[
    Int[Array, "batch seq"],
    Int[Array, "batch max_predictions"],
    Int[Array, "batch max_predictions"],
]:
    """(inputs, positions, labels): masks any tokens except padding and special tokens.

    At most `max_predictions` tokens of a row are predicted (`gather_masked`).
    """
    inputs, labels = mask_tokens(
        input_ids,
        real & ~jnp.isin(input_ids, jnp.asarray(special_token_ids)),
        key,
        rate=rate,
        mask_token_id=mask_token_id,
        vocab_size=vocab_size,
        unit=unit,
        is_continuation=is_continuation,
    )
    return inputs, *gather_masked(labels, max_predictions)


def mask_tokens(
    input_ids: Int[Array, "batch seq"],
    maskable: Bool[Array, "batch seq"],
    key: PRNGKeyArray,
    *,
    rate: float | Float[Array, ""],
    mask_token_id: int,
    vocab_size: int,
    unit: Unit = "token",
    is_continuation: Bool[Array, " vocab"] | None = None,
) -> tuple[Int[Array, "batch seq"], Int[Array, "batch seq"]]:
    """Chooses each maskable token with probability `rate`; returns (inputs, labels).

    `unit` is the group of tokens that is chosen together. "token": single tokens. "whole_word": a
    piece and the pieces after it that `is_continuation` marks (Devlin's update of May 2019).
    "span": consecutive words, whose number is geometric up to `MAX_SPAN` (Joshi et al. 2020,
    section 3.1); two spans may touch.

    80 % of the chosen tokens become `mask_token_id`, 10 % a uniformly random id below `vocab_size`,
    and 10 % do not change (Devlin et al. 2019, section 3.1). The draw is per token, or per span.
    Labels hold the original id where chosen, else -100. Row r depends only on its content, `key`
    and r, not on the batch size or the sharding. Raises ValueError for a rate outside 0..1, unless
    the rate is traced. Rate 0 masks nothing.
    """
    if isinstance(rate, int | float) and not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a probability in 0..1, got {rate}; for 15 % write 0.15")
    batch, seq = input_ids.shape

    def draw_row(row: Array) -> tuple[Array, ...]:
        choice_key, token_key = jax.random.split(jax.random.fold_in(key, row))
        kind_key, before_key = jax.random.split(jax.random.fold_in(choice_key, 1))
        random_ids = jax.random.randint(token_key, (seq,), 0, vocab_size, input_ids.dtype)
        draws = (choice_key, (seq,)), (kind_key, (seq,)), (before_key, (MAX_SPAN - 1,))
        return random_ids, *(jax.random.uniform(key, shape) for key, shape in draws)

    random_ids, choice, kind, before = jax.vmap(draw_row)(jnp.arange(batch))
    if unit == "token":
        # One draw decides both: draws below `rate` are uniform, so their quantiles give 80/10/10.
        is_chosen, kind = maskable & (choice < rate), choice
    else:
        assert is_continuation is not None, "words need the table of continuing pieces"
        words = _word_index(is_continuation[input_ids], maskable)
        covered = choice < rate if unit == "whole_word" else _cover(before, choice, rate)
        is_chosen = jnp.take_along_axis(covered, words, axis=-1)
        if unit == "span":
            kind = jnp.take_along_axis(kind, _run_index(is_chosen), axis=-1)
        is_chosen, kind = maskable & is_chosen, kind * rate
    corrupted = jnp.where(kind < 0.8 * rate, mask_token_id, random_ids)
    corrupted = jnp.where(kind < 0.9 * rate, corrupted, input_ids)
    inputs = jnp.where(is_chosen, corrupted, input_ids)
    labels = jnp.where(is_chosen, input_ids, IGNORED_LABEL)
    return inputs, labels


def highest_rate(rate: float, end: float | None) -> float:
    """The highest of a rate that changes from `rate` to `end`; None: it does not change."""
    return max(rate, end or 0.0)


def num_slots(rate: float, num_tokens: int, unit: Unit = "token", num_deviations: int = 4) -> int:
    """Number of slots for the masked tokens of `num_tokens`: the mean and some deviations.

    At least 1 and at most `num_tokens`.
    """
    mean = rate * num_tokens
    spread = math.sqrt(_CLUSTER[unit] * mean * (1 - rate))
    return min(num_tokens, math.ceil(mean + num_deviations * spread) or 1)


def gather_masked(
    labels: Int[Array, "batch seq"], max_predictions: int
) -> tuple[Int[Array, "batch max_predictions"], Int[Array, "batch max_predictions"]]:
    """Positions and labels of the first `max_predictions` masked tokens of each row, in order.

    The LM head then runs only at those positions. Unused slots have position 0 and label -100.
    Masked tokens after the first `max_predictions` are not predicted. `max_predictions` is static;
    raises ValueError if it is not in 1..seq.
    """
    seq = labels.shape[1]
    if not 1 <= max_predictions <= seq:
        raise ValueError(
            f"max_predictions: expected 1..{seq} (the sequence length), got {max_predictions}; "
            "about 1.3 × rate × sequence length drops almost no token"
        )
    candidates = jnp.where(labels != IGNORED_LABEL, jnp.arange(seq)[None, :], seq)
    positions = jnp.sort(candidates, axis=-1)[:, :max_predictions]
    is_used = positions < seq
    positions = jnp.where(is_used, positions, 0)
    picked = jnp.take_along_axis(labels, positions, axis=-1)
    return positions, jnp.where(is_used, picked, IGNORED_LABEL)


def _word_index(continues: Array, maskable: Array) -> Array:
    """The index of each token's word in its row; a token that is not maskable ends a word."""
    after_maskable = jnp.pad(maskable[:, :-1], ((0, 0), (1, 0)))
    is_first = ~(continues & maskable & after_maskable)
    return jnp.cumsum(is_first, axis=-1) - 1


def _cover(before: Array, draws: Array, rate: float | Array) -> Array:
    """bool [batch, words]: words in a span. A word is in a span with probability `rate`.

    A Poisson number of spans begins at every word. The length of the longest of these spans has a
    closed form, so that one draw per word is enough. A word is in no span with probability
    exp(−mean spans · mean length) = 1 − rate. Spans that begin `before` the row reach into the row,
    so that its first words are covered as often as the others.
    """
    num_words = draws.shape[-1]
    stay = 1 - SPAN_STOP
    # P(length > n) of the clipped geometric distribution, n = 0, 1, …
    survival = (stay ** jnp.arange(MAX_SPAN) - stay**MAX_SPAN) / (1 - stay**MAX_SPAN)
    num_spans = -jnp.log1p(-rate) / survival.sum()
    draws = jnp.concatenate([before, draws], axis=-1)[None]
    # [n, batch, before + words]: a span of more than n words begins there
    is_longer = draws >= jnp.exp(-num_spans * survival)[:, None, None]
    reached = [is_longer[n, :, MAX_SPAN - 1 - n :][:, :num_words] for n in range(MAX_SPAN)]
    return jnp.stack(reached).any(0)


def _run_index(is_chosen: Array) -> Array:
    """The index of the last group of consecutive chosen tokens that begins at or before a token."""
    begins = is_chosen & ~jnp.pad(is_chosen[:, :-1], ((0, 0), (1, 0)))
    return jnp.maximum(jnp.cumsum(begins, axis=-1) - 1, 0)
