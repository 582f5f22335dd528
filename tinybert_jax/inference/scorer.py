"""Runs a model over a whole data set, without training."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinybert_jax.batches.batch import Batch, Plan, TokenRows, make_batch, token_places
from tinybert_jax.batches.bucketing import plan_epoch
from tinybert_jax.batches.packing import packed_epochs
from tinybert_jax.losses import vocabulary
from tinybert_jax.models.params import Apply, Params
from tinybert_jax.objectives import masking
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import num_batch_shards
from tinybert_jax.tasks.task import Scored

Scorer = Callable[[Any, TokenRows], np.ndarray]  # (params, rows) -> logits
# The same rate for all runs, whatever rate they train with, so that their figures are comparable.
EVAL_MASK_RATE = 0.15


class Evaluator(NamedTuple):
    """Computes metrics of parameters on text that is not trained on."""

    measure: Callable[[Any], dict[str, float]]  # (params) -> metrics by name
    fingerprint: str  # SHA-256 of the rows


def make_scorer(
    apply: Apply,
    *,
    buckets: Sequence[int],
    pad_token_id: int,
    packed: bool = False,
    mesh: Mesh | None = None,
) -> Scorer:
    """score(params, rows): fp32 logits [rows, classes], or [tokens, classes] if units are tokens.

    Examples are padded to their buckets or, with `packed`, packed into rows of the widest bucket.
    With a mesh, its devices share each batch; parameters in the host's memory are placed there.
    """

    @jax.jit
    def forward(params: Params, batch: Batch) -> jax.Array:
        inputs = batch.inputs, batch.attention_mask
        return apply(params, *inputs, num_segments=batch.num_segments).logits

    def score(params: Params, rows: TokenRows, *, global_batch_size: int = 64) -> np.ndarray:
        if mesh is None:
            params = jax.device_put(params)  # once, not once per batch
        elif any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)):
            params = sharding.place_params(params, mesh)
        pending = []
        for plan in _plans(rows, buckets, packed, global_batch_size, mesh):
            batch = _place_batch(make_batch(rows, plan, pad_token_id), mesh)
            with _context(mesh):
                pending.append((plan, forward(params, batch)))
        logits = np.zeros((rows.num_scored, pending[0][1].shape[-1]), np.float32)
        for plan, values in pending:
            _put(logits, rows, plan, sharding.fetch(values))
        return logits

    return score


def _put(logits: np.ndarray, rows: TokenRows, plan: Plan, values: np.ndarray) -> None:
    """Writes the logits of a batch to the rows, or tokens, of the whole data set."""
    if rows.is_unit is None:
        real = plan.rows >= 0
        logits[plan.rows[real]] = values[real]
    else:
        places = token_places(rows.offsets, plan)
        logits[places.source] = values[places.row, places.column]


def make_masked_lm_scorer(
    apply: Apply,
    *,
    key: jax.Array,
    mask_token_id: int,
    special_token_ids: tuple[int, ...],
    vocab_size: int,
    buckets: Sequence[int],
    pad_token_id: int,
    packed: bool = False,
    chunk_size: int = 256,
    mesh: Mesh | None = None,
) -> Callable[[Any, TokenRows], dict[str, float]]:
    """score(params, rows): {loss, perplexity, masked_accuracy[, pair_accuracy]} of a masked LM.

    Perplexity is exp(loss). 15 % of the tokens are masked, token by token, 80/10/10; the same
    tokens for the same `key`, buckets and batching. A model with a pair head also has
    `pair_accuracy` on the rows with a pair label (0 or 1), if there are any. With `packed`, all
    batches have one shape, so that one program is compiled instead of one per bucket; a model with
    a pair head cannot be packed. `mesh` as in `make_scorer`. Raises ValueError without masked
    tokens.
    """

    sums = _make_masked_sums(
        apply,
        key,
        special_token_ids=special_token_ids,
        mask_token_id=mask_token_id,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
    )

    def score(params: Params, rows: TokenRows, *, global_batch_size: int = 64) -> dict[str, float]:
        pending = []
        for number, plan in enumerate(_plans(rows, buckets, packed, global_batch_size, mesh)):
            batch = _place_batch(make_batch(rows, plan, pad_token_id), mesh)
            with _context(mesh):
                pending.append(sums(params, jnp.int32(number), batch))
        nll, hits, count, *pairs = np.asarray(sharding.fetch(pending), np.float64).sum(0)
        if not count:
            raise ValueError(
                f"held-out text: expected masked tokens, got none in {len(rows.lengths)} rows; "
                "hold out more text"
            )
        loss = float(nll / count)
        perplexity = float(np.exp(min(loss, 700.0)))  # no fp64 overflow
        values = {"loss": loss, "perplexity": perplexity, "masked_accuracy": float(hits / count)}
        if pairs and pairs[1]:
            values["pair_accuracy"] = float(pairs[0] / pairs[1])
        return values

    return score


def _plans(
    rows: TokenRows,
    buckets: Sequence[int],
    packed: bool,
    global_batch_size: int,
    mesh: Mesh | None,
) -> list[Plan]:
    """Plans of batches that hold every row once, padded to buckets or packed.

    The number of rows of a batch is a multiple of the number of batch shards.
    """
    shards = num_batch_shards(mesh) if mesh else 1
    global_batch_size = -(-global_batch_size // shards) * shards
    if not packed:
        return plan_epoch(
            rows.widths, buckets=buckets, global_batch_size=global_batch_size, seed=None
        )
    epochs = packed_epochs(
        rows.widths,
        width=max(buckets),
        global_batch_size=global_batch_size,
        seed=(0,),
        multiple=shards,
    )
    return epochs.plan(0)


def _place_batch(batch: Batch, mesh: Mesh | None) -> Batch:
    return sharding.place(batch, sharding.batch_sharding(mesh)) if mesh else batch


def _context(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    return jax.set_mesh(mesh) if mesh else contextlib.nullcontext()


def _make_masked_sums(
    apply: Apply, key: jax.Array, *, chunk_size: int, **options: Any
) -> Callable[[Any, jax.Array, Batch], tuple[jax.Array, ...]]:
    """sums(params, batch number, batch): (Σ nll, hits, masked tokens[, pair hits, pairs])."""

    @jax.jit
    def sums(params: Params, number: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
        ids, positions, labels = masking.mask_rows(
            batch.inputs.input_ids,
            batch.real,
            jax.random.fold_in(key, number),
            rate=EVAL_MASK_RATE,
            max_predictions=masking.num_slots(EVAL_MASK_RATE, batch.shape[1]),
            **options,
        )
        inputs = batch.inputs._replace(input_ids=ids)
        output = apply(params, inputs, batch.attention_mask, positions=positions)
        hidden = output.hidden.reshape(-1, output.hidden.shape[-1])
        nll, hits = vocabulary.masked_lm_sums(
            hidden, output.table, output.bias, labels.reshape(-1), chunk_size=chunk_size
        )
        count = jnp.sum(labels != masking.IGNORED_LABEL, dtype=jnp.float32)
        if output.pair_logits is None:
            return nll, hits, count
        pair_labels = batch.targets["labels"]
        assert pair_labels.ndim == 1, "a pair head reads one label per row"
        is_pair = (pair_labels >= 0) & (batch.weights > 0)
        is_right = jnp.argmax(output.pair_logits, axis=-1) == pair_labels
        return nll, hits, count, jnp.sum(is_right & is_pair), jnp.sum(is_pair)

    return sums


def finite_examples(scored: Scored) -> np.ndarray:
    """bool [examples]: whether all logits of the example are finite."""
    is_finite, rows = np.asarray(np.isfinite(scored.logits).all(axis=-1)), scored.rows
    if rows.is_unit is not None:
        is_finite = np.logical_and.reduceat(is_finite, rows.offsets[:-1])
    if rows.windows is None:  # an example may be several rows
        return np.asarray(is_finite.reshape(len(scored.examples.text), -1).all(axis=1))
    wrong = np.bincount(rows.windows.examples[~is_finite], minlength=len(scored.examples.text))
    return wrong == 0
