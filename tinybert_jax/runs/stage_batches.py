"""The batches of a stage by step number, from text in memory or from token stores."""

import bisect
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tinybert_jax.batches import loader
from tinybert_jax.batches.batch import Batch, TokenRows
from tinybert_jax.batches.bucketing import bucketed_epochs, num_batches, spread_texts
from tinybert_jax.batches.loader import BatchAt
from tinybert_jax.batches.packing import packed_epochs
from tinybert_jax.batches.tokenize import tokenize_corpus
from tinybert_jax.config.run import StagePlan
from tinybert_jax.config.stages import StageSection
from tinybert_jax.config.task_kinds import TranslationTask
from tinybert_jax.data.examples import Examples
from tinybert_jax.parallel.mesh import num_batch_shards
from tinybert_jax.parallel.sharding import batch_part
from tinybert_jax.runs.run import Run


class StageBatches(NamedTuple):
    """The batches that a stage trains on."""

    batch_at: BatchAt  # (step) -> the global batch
    part_at: BatchAt  # (step) -> the part of the global batch that this process trains on
    num_batches: int  # in an epoch
    # SHA-256 of the rows; with stores, of the hashes of their files; with phases, of the hashes of
    # the phases.
    fingerprint: str

    def num_steps(self, section: StageSection) -> int:
        """The number of steps of the whole stage."""
        return section.num_steps or max(1, round((section.num_epochs or 0) * self.num_batches))


def make_stage_batches(
    run: Run,
    plan: StagePlan,
    read_logits: Callable[[TokenRows], tuple[np.ndarray, str]] | None = None,
    text: Examples | None = None,
) -> StageBatches:
    """Batches of the corpus (pretrain, general) or of the task's training text (other stages).

    The stages intermediate and prediction also read the task's unlabelled text.
    `read_logits(rows)` returns the teachers' logits of the task's rows, fp32 [rows, outputs], and a
    SHA-256 of everything that they depend on. `text`: instead of the task's.
    """
    if plan.stage.reads_corpus:
        return _make_corpus_batches(run, plan)
    task, section = run.required_task, plan.section
    if text is None:
        text = task.data.train if plan.stage.text == "labelled" else task.data.distilled
    if task.kind.fits is not None:
        text = _fitting(run, plan, text)
    rows = task.kind.encode(run.tokenizer, text, section.max_length)
    run.log.say(
        f"{plan.name}: {len(rows.lengths):,} examples, {len(rows.ids):,} tokens, "
        f"{rows.num_truncated:,} cut at {section.max_length}; {len(task.data.dev.text):,} in dev"
    )
    num_texts = task.texts_per_example
    if read_logits is None:
        return _make_row_batches(run, section, rows, _seed(run, plan), num_texts)
    logits, fingerprint = read_logits(rows)
    rows = rows._replace(teacher_logits=logits)
    batches = _make_row_batches(run, section, rows, _seed(run, plan), num_texts)
    content = (batches.fingerprint + fingerprint).encode()
    return batches._replace(fingerprint=hashlib.sha256(content).hexdigest())


def _fitting(run: Run, plan: StagePlan, text: Examples) -> Examples:
    """The examples that need not be cut; says how many are left out."""
    task, most = run.required_task, plan.section.max_length
    assert task.kind.fits is not None
    fits = task.kind.fits(run.tokenizer, text, most)
    if fits.all():
        return text
    told = f"{np.count_nonzero(~fits):,} of {len(fits):,} rows are longer than {most} tokens"
    assert isinstance(task.section, TranslationTask), "no other task has `fits`"
    if task.section.long == "refuse" or not fits.any():
        raise ValueError(
            f"{plan.name}: expected rows of at most {most} tokens, got others: {told}; raise "
            f"{plan.name}.max_length, or set task.long=drop"
        )
    run.log.say(f"{plan.name}: {told} and left out")
    return text.take(np.flatnonzero(fits).tolist())


# Added to the number of a phase. Larger than the numbers of epochs and corpora, which a seed may
# end in too.
_PHASE_SEED = 2**31


def _make_corpus_batches(run: Run, plan: StagePlan) -> StageBatches:
    """Batches of documents cut into rows of `max_length`, or of the rows of token stores.

    An epoch of several stores has as many rows as all stores together. Each phase of the stage
    reads the corpus in another order. `num_batches` is that of the settings after the last phase.
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

    def phase_batches(number: int, section: StageSection) -> StageBatches:
        seed = _seed(run, plan)
        seed = (*seed, _PHASE_SEED + number) if number else seed
        if run.stores:
            return _make_store_batches(run, plan.name, section, seed)
        return _make_row_batches(run, section, rows_of(section.max_length), seed)

    phases = [phase_batches(number, part.section) for number, part in enumerate(parts)]
    return phases[0] if len(phases) == 1 else _join_phases(phases, [part.start for part in parts])


def _join_phases(phases: Sequence[StageBatches], starts: Sequence[int]) -> StageBatches:
    """The batches of phase i from step `starts[i]` on."""

    def joined(functions: Sequence[BatchAt]) -> BatchAt:
        def batch_at(step: int) -> Batch:
            number = bisect.bisect_right(starts, step) - 1
            return functions[number](step - starts[number])

        return batch_at

    content = json.dumps([[phase.fingerprint for phase in phases], list(starts)])
    return StageBatches(
        joined([phase.batch_at for phase in phases]),
        joined([phase.part_at for phase in phases]),
        phases[-1].num_batches,
        hashlib.sha256(content.encode()).hexdigest(),
    )


def _whole_and_part(run: Run, make: Callable[..., BatchAt]) -> tuple[BatchAt, BatchAt]:
    """(global batches, this process's parts of them) from `make(process_index, process_count)`."""
    index, count = batch_part(run.mesh)
    whole = make()
    return whole, make(process_index=index, process_count=count) if count > 1 else whole


def _make_row_batches(
    run: Run,
    section: StageSection,
    rows: TokenRows,
    seed: tuple[int, ...],
    num_texts: int = 1,
) -> StageBatches:
    """Batches of the rows; the `num_texts` rows of an example are in one batch, side by side."""
    by_example = rows.widths.reshape(-1, num_texts)
    if section.batching == "pack":
        lengths = by_example.sum(1)
        _check_fits(lengths, section.max_length, num_texts)
        epochs = packed_epochs(
            lengths,
            width=section.max_length,
            global_batch_size=section.global_batch_size,
            seed=seed,
            multiple=section.gradient_accumulation_steps,
            num_shards=num_batch_shards(run.mesh),
        )
    else:
        epochs = bucketed_epochs(
            by_example.max(1),
            buckets=section.buckets(),
            global_batch_size=section.global_batch_size,
            seed=seed,
        )
    epochs = spread_texts(epochs, num_texts)
    make = functools.partial(
        loader.planned_batches, rows, epochs, pad_token_id=run.tokenizer.pad_token_id
    )
    return StageBatches(*_whole_and_part(run, make), epochs.num_batches, rows.fingerprint())


def _check_fits(lengths: np.ndarray, width: int, num_texts: int) -> None:
    """Raises ValueError where the texts of an example do not fit one packed row."""
    if lengths.max() > width:
        raise ValueError(
            f"batching: pack: expected the {num_texts} texts of an example in one row of "
            f"max_length {width} tokens, got {np.count_nonzero(lengths > width)} examples of up to "
            f"{lengths.max()}; raise max_length, or set batching: bucket"
        )


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
    make = functools.partial(
        loader.mixed_batches,
        stores,
        weights,
        global_batch_size=section.global_batch_size,
        seed=seed,
    )
    content = json.dumps([[store.manifest["files"] for store in stores], weights], sort_keys=True)
    num_epoch_batches = num_batches(num_rows, section.global_batch_size)
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    return StageBatches(*_whole_and_part(run, make), num_epoch_batches, fingerprint)


def _seed(run: Run, plan: StagePlan) -> tuple[int, int]:
    return run.seed, plan.stage.salt
