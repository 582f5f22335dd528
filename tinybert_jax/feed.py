"""What a stage trains on: its batches by step number, from text in memory or from token stores."""

import hashlib
import json
from typing import NamedTuple

from tinybert_jax import sharding
from tinybert_jax.data import loader, pipeline
from tinybert_jax.data.loader import BatchAt
from tinybert_jax.data.pipeline import TokenRows
from tinybert_jax.run import Run
from tinybert_jax.sections import STAGES


class Feed(NamedTuple):
    batch_at: BatchAt
    num_batches: int  # of an epoch
    fingerprint: str  # SHA-256 of the rows; of stores, of their manifests' file hashes


def rows_feed(run: Run, stage: str, rows: TokenRows) -> Feed:
    """Rows in memory, as the stage's `batching` lays them out."""
    section, seed = run.section(stage), _seed(run, stage)
    if section.batching == "pack":
        shards = sharding.num_batch_shards(run.mesh)
        epochs = pipeline.packed_epochs(
            rows.lengths,
            width=section.max_length,
            global_batch_size=section.global_batch_size,
            seed=seed,
            multiple=shards * section.gradient_accumulation_steps,
        )
    else:
        epochs = pipeline.bucketed_epochs(
            rows.lengths,
            buckets=section.buckets(),
            global_batch_size=section.global_batch_size,
            seed=seed,
        )
    batch_at = loader.planned_batches(rows, epochs, pad_token_id=run.tokenizer.pad_token_id)
    return Feed(batch_at, epochs.num_batches, rows.fingerprint())


def corpus_feed(run: Run, stage: str) -> Feed:
    """The run's corpus: documents cut into rows of `max_length`, or the rows of its stores.

    An epoch of several stores has as many rows as they have together.
    """
    section = run.section(stage)
    if not run.stores:
        rows = pipeline.tokenize_corpus(run.tokenizer, run.corpus, section.max_length)
        run.log.say(f"{stage}: {len(rows.lengths):,} rows, {len(rows.ids):,} tokens")
        return rows_feed(run, stage, rows)
    stores, weights = zip(*run.stores, strict=True)
    num_rows = sum(store.num_rows for store in stores)
    num_tokens = sum(store.num_tokens for store in stores)
    run.log.say(f"{stage}: {num_rows:,} rows, {num_tokens:,} tokens in {len(stores)} stores")
    batch_at = loader.mixed_batches(
        stores, weights, global_batch_size=section.global_batch_size, seed=_seed(run, stage)
    )
    content = json.dumps([[store.manifest["files"] for store in stores], weights], sort_keys=True)
    num_batches = pipeline.num_batches(num_rows, section.global_batch_size)
    return Feed(batch_at, num_batches, hashlib.sha256(content.encode()).hexdigest())


def _seed(run: Run, stage: str) -> tuple[int, int]:
    return run.config.seed, STAGES.index(stage)
