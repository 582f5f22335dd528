"""What a stage trains on: its batches by step number, from text in memory or from token stores."""

import bisect
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tinybert_jax.batches import loader
from tinybert_jax.batches.batch import Batch, TokenRows
from tinybert_jax.batches.bucketing import bucketed_epochs, num_batches
from tinybert_jax.batches.loader import BatchAt
from tinybert_jax.batches.packing import packed_epochs
from tinybert_jax.batches.tokenize import tokenize_corpus
from tinybert_jax.config.run import StagePlan
from tinybert_jax.config.stages import StageSection
from tinybert_jax.parallel.mesh import num_batch_shards
from tinybert_jax.runs.run import Run


class StageBatches(NamedTuple):
    batch_at: BatchAt
    num_batches: int  # of an epoch
    fingerprint: str  # SHA-256 of the rows; of stores, of their file hashes; of phases, of theirs

    def num_steps(self, section: StageSection) -> int:
        """Of the whole stage."""
        return section.num_steps or max(1, round((section.num_epochs or 0) * self.num_batches))


def make_stage_batches(
    run: Run,
    plan: StagePlan,
    teach: Callable[[TokenRows], tuple[np.ndarray, str]] | None = None,
) -> StageBatches:
    """The corpus for pretrain and general; else the task's text, for distillation all of it.

    `teach` gives what teachers say of the task's rows, fp32 [rows, outputs], and a SHA-256 of
    what that depends on.
    """
    if plan.stage.reads_corpus:
        return _make_corpus_batches(run, plan)
    task, section = run.required_task, plan.section
    text = task.data.train if plan.stage.text == "labelled" else task.data.distilled
    rows = task.kind.encode(run.tokenizer, text, section.max_length)
    run.log.say(
        f"{plan.name}: {len(rows.lengths):,} examples, {len(rows.ids):,} tokens, "
        f"{rows.num_truncated:,} cut at {section.max_length}; {len(task.data.dev.text):,} in dev"
    )
    if teach is None:
        return _make_row_batches(run, section, rows, _seed(run, plan))
    logits, fingerprint = teach(rows)
    feed = _make_row_batches(run, section, rows._replace(teacher_logits=logits), _seed(run, plan))
    content = (feed.fingerprint + fingerprint).encode()
    return feed._replace(fingerprint=hashlib.sha256(content).hexdigest())


_PHASE_SEED = 2**31  # beyond any number of an epoch or a corpus, which a seed may end in too


def _make_corpus_batches(run: Run, plan: StagePlan) -> StageBatches:
    """The run's corpus: documents cut into rows of `max_length`, or the rows of its stores.

    An epoch of several stores has as many rows as they have together. Each phase of the stage goes
    through the corpus in an order of its own; the epoch is that of what follows the phases.
    """
    parts = plan.section.parts()

    @functools.cache
    def rows_of(max_length: int) -> TokenRows:
        rows = tokenize_corpus(run.tokenizer, run.corpus, max_length)
        num_rows, num_tokens = len(rows.lengths), len(rows.ids)
        run.log.say(
            f"{plan.name}: {num_rows:,} rows of at most {max_length}, {num_tokens:,} tokens"
        )
        return rows

    def feed(number: int, section: StageSection) -> StageBatches:
        seed = _seed(run, plan)
        seed = (*seed, _PHASE_SEED + number) if number else seed
        if run.stores:
            return _make_store_batches(run, plan.name, section, seed)
        return _make_row_batches(run, section, rows_of(section.max_length), seed)

    feeds = [feed(number, part.section) for number, part in enumerate(parts)]
    return feeds[0] if len(feeds) == 1 else _join_phases(feeds, [part.start for part in parts])


def _join_phases(feeds: Sequence[StageBatches], starts: Sequence[int]) -> StageBatches:
    """Each feed from its own first step on."""

    def batch_at(step: int) -> Batch:
        number = bisect.bisect_right(starts, step) - 1
        return feeds[number].batch_at(step - starts[number])

    content = json.dumps([[feed.fingerprint for feed in feeds], list(starts)])
    return StageBatches(
        batch_at, feeds[-1].num_batches, hashlib.sha256(content.encode()).hexdigest()
    )


def _make_row_batches(
    run: Run, section: StageSection, rows: TokenRows, seed: tuple[int, ...]
) -> StageBatches:
    if section.batching == "pack":
        shards = num_batch_shards(run.mesh)
        epochs = packed_epochs(
            rows.lengths,
            width=section.max_length,
            global_batch_size=section.global_batch_size,
            seed=seed,
            multiple=shards * section.gradient_accumulation_steps,
        )
    else:
        epochs = bucketed_epochs(
            rows.lengths,
            buckets=section.buckets(),
            global_batch_size=section.global_batch_size,
            seed=seed,
        )
    batch_at = loader.planned_batches(rows, epochs, pad_token_id=run.tokenizer.pad_token_id)
    return StageBatches(batch_at, epochs.num_batches, rows.fingerprint())


def _make_store_batches(
    run: Run, stage: str, section: StageSection, seed: tuple[int, ...]
) -> StageBatches:
    chosen = [pair for pair in run.stores if pair[0].width == section.max_length]
    stores, weights = zip(*chosen, strict=True)
    num_rows = sum(store.num_rows for store in stores)
    num_tokens = sum(store.num_tokens for store in stores)
    run.log.say(
        f"{stage}: {num_rows:,} rows of {section.max_length}, {num_tokens:,} tokens in "
        f"{len(stores)} stores"
    )
    batch_at = loader.mixed_batches(
        stores, weights, global_batch_size=section.global_batch_size, seed=seed
    )
    content = json.dumps([[store.manifest["files"] for store in stores], weights], sort_keys=True)
    num_epoch_batches = num_batches(num_rows, section.global_batch_size)
    return StageBatches(batch_at, num_epoch_batches, hashlib.sha256(content.encode()).hexdigest())


def _seed(run: Run, plan: StagePlan) -> tuple[int, int]:
    return run.seed, plan.stage.salt
