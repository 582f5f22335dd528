"""The objective of masked-LM training, optionally with BERT's loss on pairs of texts."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.batches.batch import Batch
from tinybert_jax.losses import pointwise, vocabulary
from tinybert_jax.models.params import copy_table_per_shard
from tinybert_jax.objectives import masking
from tinybert_jax.objectives.objective import (
    Counts,
    Metrics,
    Objective,
    count_units,
    encoder_inputs,
)

Mask = Callable[[Batch, jax.Array, Counts], tuple[Batch, Counts]]


def make_mask(
    *,
    mask_rate: float,
    mask_token_id: int,
    special_token_ids: tuple[int, ...],
    vocab_size: int,
    mask_rate_end: float | None = None,
    unit: masking.Unit = "token",
    is_continuation: np.ndarray | None = None,
) -> Mask:
    """mask(batch, key, counts): (the batch with masked inputs, counts of predictions).

    Targets of the new batch: `positions` int32 [batch, picked]; `tokens` int32 [batch, picked],
    IGNORED_LABEL for unused positions; `pair_labels` int32 [batch], -1 for rows without a label.

    With `mask_rate_end` the rate changes linearly from `mask_rate` over the stage.
    """
    highest_rate = masking.highest_rate(mask_rate, mask_rate_end)
    continues = None if is_continuation is None else jnp.asarray(is_continuation)

    def mask(batch: Batch, key: jax.Array, counts: Counts) -> tuple[Batch, Counts]:
        change = None if mask_rate_end is None else mask_rate_end - mask_rate
        ids, positions, tokens = masking.mask_rows(
            batch.inputs.input_ids,
            batch.real,
            key,
            rate=mask_rate if change is None else mask_rate + change * counts.share,
            special_token_ids=special_token_ids,
            max_predictions=masking.num_slots(highest_rate, batch.shape[1], unit),
            mask_token_id=mask_token_id,
            vocab_size=vocab_size,
            unit=unit,
            is_continuation=continues,
        )
        counts = counts._replace(
            predictions=jnp.sum(tokens != masking.IGNORED_LABEL, dtype=jnp.float32),
            labelled_rows=jnp.sum(batch.targets["labels"] >= 0, dtype=jnp.float32),
        )
        targets = {
            "positions": positions,
            "tokens": tokens,
            "pair_labels": batch.targets["labels"],
        }
        inputs = batch.inputs._replace(input_ids=ids)
        return batch._replace(inputs=inputs, targets=targets), counts

    return mask


def mlm_chunk_size(
    num_tokens: int,
    largest: int,
    *,
    mask_rate: float,
    mask_rate_end: float | None = None,
    unit: masking.Unit = "token",
) -> int:
    """A chunk size of at most `largest` that leaves few slots of the last chunk unused.

    Chunks of that size hold nearly every draw of masked tokens among `num_tokens` slots at the
    highest rate. Rows with padding, and a lower rate, fill the last chunk less.
    """
    rate = masking.highest_rate(mask_rate, mask_rate_end)
    num_expected = masking.num_slots(rate, num_tokens, unit, num_deviations=2)
    return vocabulary.even_chunk_size(num_expected, largest)


def make_mlm(
    apply: Callable,
    *,
    mask_rate: float,
    mask_rate_end: float | None = None,
    unit: masking.Unit = "token",
    max_chunk_size: int = 512,
    num_shards: int = 1,
    pair_weight: float = 0.0,
    **mask_options: Any,
) -> Objective:
    """BERT's masked-LM loss with masks from `make_mask`; logits only at masked positions.

    `pair_weight`: weight of the cross-entropy of the pair label of each row; rows with label -1 do
    not count. Logits exist for at most `max_chunk_size` predictions at a time on each of
    `num_shards` batch shards (`mlm_chunk_size`).
    """
    mask = make_mask(mask_rate=mask_rate, mask_rate_end=mask_rate_end, unit=unit, **mask_options)

    def prepare(batch: Batch, key: jax.Array, share: jax.Array) -> tuple[Batch, Counts]:
        return mask(batch, key, count_units(batch)._replace(share=share))

    def loss(params, batch, counts, key, targets):
        positions, tokens, pair_labels = (
            batch.targets[name] for name in ("positions", "tokens", "pair_labels")
        )
        params = copy_table_per_shard(params, num_shards)
        output = apply(params, *encoder_inputs(batch), key, positions=positions)
        size = mlm_chunk_size(
            batch.num_slots // num_shards,
            max_chunk_size,
            mask_rate=mask_rate,
            mask_rate_end=mask_rate_end,
            unit=unit,
        )
        sizes = {"chunk_size": size, "num_shards": num_shards, "count": counts.predictions}
        hidden = output.hidden.reshape(-1, output.hidden.shape[-1])
        parts: Metrics = {}
        with jax.named_scope("~loss masked_lm"):
            parts["loss/masked_lm"] = vocabulary.masked_lm(
                hidden, output.table, output.bias, tokens.reshape(-1), **sizes
            )
        if pair_weight:
            is_pair = (pair_labels >= 0).astype(jnp.float32)
            with jax.named_scope("~loss pair"):
                parts["loss/pair"] = pointwise.softmax_cross_entropy(
                    output.pair_logits, pair_labels, is_pair, count=counts.labelled_rows
                )
        return _weighted_sum(parts, {"loss/masked_lm": 1.0, "loss/pair": pair_weight}), parts

    return Objective(prepare, loss)


def _weighted_sum(parts: Metrics, weights: Mapping[str, float]) -> jax.Array:
    return jnp.stack([weights[name] * value for name, value in parts.items()]).sum()
