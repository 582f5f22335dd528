"""Runs a model over a whole data set. Knows nothing of training."""

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

Scorer = Callable[[Any, TokenRows], np.ndarray]
EVAL_MASK_RATE = 0.15  # whatever a stage trains with, so that its figures compare with others'


class Evaluator(NamedTuple):
    """Measures parameters on text that is not trained on."""

    measure: Callable[[Any], dict[str, float]]
    fingerprint: str  # SHA-256 of the rows


def make_scorer(
    apply: Apply,
    *,
    buckets: Sequence[int],
    pad_token_id: int,
    packed: bool = False,
    mesh: Mesh | None = None,
) -> Scorer:
    """A function (params, rows) -> logits [rows, classes], or [tokens, classes].

    The latter where the units of `rows` are tokens. Each example is padded to its bucket or,
    packed, shares a row of the widest one with others. With a mesh, on which the parameters are,
    its devices share each batch.
    """

    @jax.jit
    def forward(params: Params, batch: Batch) -> jax.Array:
        inputs = batch.inputs, batch.attention_mask
        return apply(params, *inputs, num_segments=batch.num_segments).logits

    def score(params: Params, rows: TokenRows, *, global_batch_size: int = 64) -> np.ndarray:
        if mesh is None:
            params = jax.device_put(params)  # once, not for each batch
        pending = []
        for plan in _plans(rows, buckets, packed, global_batch_size, mesh):
            batch = _placed(make_batch(rows, plan, pad_token_id), mesh)
            with _context(mesh):
                pending.append((plan, forward(params, batch)))
        logits = np.zeros((rows.num_scored, pending[0][1].shape[-1]), np.float32)
        for plan, values in pending:
            _put(logits, rows, plan, np.asarray(values))
        return logits

    return score


def _put(logits: np.ndarray, rows: TokenRows, plan: Plan, values: np.ndarray) -> None:
    """Puts the logits of a batch where its rows, or their tokens, are in the whole data set."""
    if rows.is_unit is None:
        real = plan.rows >= 0
        logits[plan.rows[real]] = values[real]
    else:
        places = token_places(rows, plan)
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
    """A function (params, rows) -> masked-LM loss, perplexity (its exp) and masked accuracy.

    15 % of the tokens are masked, each alone, 80/10/10, always the same ones for one `key`, one
    set of buckets and one way of batching. Of a model with a pair head also `pair_accuracy`, on the
    rows with a label (0 or 1), if any. Packed, which such a model is not, all batches have one
    shape: one program instead of one a bucket. `mesh` as of `make_scorer`.
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
            batch = _placed(make_batch(rows, plan, pad_token_id), mesh)
            with _context(mesh):
                pending.append(sums(params, jnp.int32(number), batch))
        nll, hits, count, *pairs = np.asarray(jax.device_get(pending), np.float64).sum(0)
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
    """Every row once, each padded to its bucket or several in a row of the widest one.

    A batch has as many rows for each device of the mesh.
    """
    shards = num_batch_shards(mesh) if mesh else 1
    global_batch_size = -(-global_batch_size // shards) * shards
    if not packed:
        return plan_epoch(
            rows.lengths, buckets=buckets, global_batch_size=global_batch_size, seed=None
        )
    epochs = packed_epochs(
        rows.lengths,
        width=max(buckets),
        global_batch_size=global_batch_size,
        seed=(0,),
        multiple=shards,
    )
    return epochs.plan(0)


def _placed(batch: Batch, mesh: Mesh | None) -> Batch:
    return jax.device_put(batch, sharding.batch_sharding(mesh)) if mesh else batch


def _context(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    return jax.set_mesh(mesh) if mesh else contextlib.nullcontext()


def _make_masked_sums(
    apply: Apply, key: jax.Array, *, chunk_size: int, **options: Any
) -> Callable[[Any, jax.Array, Batch], tuple[jax.Array, ...]]:
    """(params, number of the batch, batch) -> Σ nll, hits, masked tokens[, pair hits, pairs]."""

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
        assert pair_labels.ndim == 1, "a pair head reads one label a row"
        is_pair = (pair_labels >= 0) & (batch.weights > 0)
        is_right = jnp.argmax(output.pair_logits, axis=-1) == pair_labels
        return nll, hits, count, jnp.sum(is_right & is_pair), jnp.sum(is_pair)

    return sums
