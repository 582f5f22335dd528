"""Runs a classifier over a whole data set. Knows nothing of training."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from tinybert_jax import metrics
from tinybert_jax.data.pipeline import TokenRows, make_batch, plan_epoch

Scorer = Callable[[Any, TokenRows], np.ndarray]


def make_scorer(apply: Callable, *, buckets: Sequence[int], pad_token_id: int) -> Scorer:
    """A function (params, rows) -> logits [rows, num_labels], each row padded to its bucket."""
    forward = jax.jit(lambda params, *inputs: apply(params, *inputs).logits)

    def score(params: Any, rows: TokenRows, *, global_batch_size: int = 64) -> np.ndarray:
        plans = plan_epoch(
            rows.lengths, buckets=buckets, global_batch_size=global_batch_size, seed=None
        )
        pending = [(p, _forward(forward, params, rows, p, pad_token_id)) for p in plans]
        logits = np.zeros((len(rows.lengths), pending[0][1].shape[-1]), np.float32)
        for plan, values in pending:
            real = plan.rows >= 0
            logits[plan.rows[real]] = np.asarray(values)[real]
        return logits

    return score


def task_metrics(logits: np.ndarray, labels: np.ndarray, *, regression: bool) -> dict[str, float]:
    """Accuracy, F1 and Matthews; or Pearson, Spearman and MSE."""
    if regression:
        return metrics.regression_metrics(logits[:, 0], labels)
    return metrics.classification_metrics(logits, labels)


def majority_share(labels: np.ndarray) -> float:
    """The accuracy of always answering the commonest class."""
    return float(np.bincount(labels).max() / len(labels))


def _forward(forward, params, rows: TokenRows, plan, pad_token_id: int) -> jax.Array:
    batch = make_batch(rows, plan, pad_token_id)
    return forward(params, batch.input_ids, batch.attention_mask, batch.token_type_ids)
