"""Masked-LM corruption on the device.

This module owns which tokens are masked, with what, and where the masked positions are. It does not
own which tokens may be masked at all (the data pipeline marks them) nor the loss.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

IGNORED_LABEL = -100


def mask_tokens(
    input_ids: Int[Array, "batch seq"],
    maskable: Bool[Array, "batch seq"],
    key: PRNGKeyArray,
    *,
    rate: float,
    mask_token_id: int,
    vocab_size: int,
) -> tuple[Int[Array, "batch seq"], Int[Array, "batch seq"]]:
    """Choose each maskable token with probability `rate`; return (inputs, labels).

    Of the chosen ones 80 % become `mask_token_id`, 10 % a uniformly random id below `vocab_size`,
    10 % stay (Devlin et al. 2019, section 3.1). Labels hold the original id where chosen, else
    -100. Row r depends only on its content, `key` and r, not on the batch size or the sharding.
    Raises ValueError for a rate outside 0..1. Rate 0 masks nothing.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a probability in 0..1, got {rate}; for 15 % write 0.15")
    batch, seq = input_ids.shape

    def draw_row(row: Array) -> tuple[Array, Array]:
        choice_key, token_key = jax.random.split(jax.random.fold_in(key, row))
        choice = jax.random.uniform(choice_key, (seq,))
        return choice, jax.random.randint(token_key, (seq,), 0, vocab_size, input_ids.dtype)

    choice, random_ids = jax.vmap(draw_row)(jnp.arange(batch))
    # One draw decides both: below `rate` it is uniform there, so its quantiles are the 80/10/10.
    is_chosen = maskable & (choice < rate)
    corrupted = jnp.where(choice < 0.8 * rate, mask_token_id, random_ids)
    corrupted = jnp.where(choice < 0.9 * rate, corrupted, input_ids)
    inputs = jnp.where(is_chosen, corrupted, input_ids)
    labels = jnp.where(is_chosen, input_ids, IGNORED_LABEL)
    return inputs, labels


def gather_masked(
    labels: Int[Array, "batch seq"], max_predictions: int
) -> tuple[Int[Array, "batch max_predictions"], Int[Array, "batch max_predictions"]]:
    """Positions and labels of the first `max_predictions` masked tokens of each row, in order.

    Lets the LM head run on those positions alone. Unused slots have position 0 and label -100;
    masked tokens beyond `max_predictions` are dropped from the end of the row. `max_predictions`
    is static. Raises ValueError when it is not in 1..seq.
    """
    seq = labels.shape[1]
    if not 1 <= max_predictions <= seq:
        raise ValueError(
            f"max_predictions: expected 1..{seq} (the sequence length), got {max_predictions}; "
            "about 1.3 × rate × sequence length drops next to nothing"
        )
    candidates = jnp.where(labels != IGNORED_LABEL, jnp.arange(seq)[None, :], seq)
    positions = jnp.sort(candidates, axis=-1)[:, :max_predictions]
    is_used = positions < seq
    positions = jnp.where(is_used, positions, 0)
    picked = jnp.take_along_axis(labels, positions, axis=-1)
    return positions, jnp.where(is_used, picked, IGNORED_LABEL)
