"""What a stage computes, read off its config and its batches: what `plan` puts a price on."""

import math
from typing import NamedTuple

import numpy as np

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.models import SOLE
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.config.objectives import (
    OF_WORDS,
    EmbeddingTerm,
    HiddenTerm,
    LayerTerm,
    MaskedLMTerm,
    Terms,
    reads_all_words,
    reads_taps,
    teaches,
)
from tinybert_jax.config.stages import TEACHER_STAGES
from tinybert_jax.models.heads import is_few
from tinybert_jax.settings.layer_maps import LayerPairs
from tinybert_jax.settings.layer_maps import make_layer_pairs
from tinybert_jax.objectives.distillation import Options
from tinybert_jax.objectives.masked_lm import mlm_chunk_size
from tinybert_jax.objectives.masking import highest_rate, num_slots
from tinybert_jax.parallel.mesh import num_batch_shards
from tinybert_jax.runs.run import Run

_CHUNK_SIZE = Options().chunk_size  # of distillation


class Work(NamedTuple):
    """What a stage computes with."""

    trained: dict[str, ModelConfig]  # by name
    num_seeds: int  # of each
    teacher: ModelConfig | None  # of every step
    terms: Terms  # of distillation; pretrain's masked LM counts as one
    beforehand: tuple[ModelConfig, ...] = ()  # teachers that go through the text once


class Words(NamedTuple):
    """What of a batch meets the vocabulary, in tokens of all its rows."""

    mapped: int  # by the masked-LM head's dense map
    student: int  # by the products with the word table, of all terms
    teacher: int
    chunk: int  # whose logits exist at one time on a device


def work_of(run: Run, stage: str) -> Work:
    """The models of a stage and what their steps read."""
    num_seeds, terms = len(run.config.seeds(stage)), _terms(run, stage)
    if stage in TEACHER_STAGES:
        return Work({SOLE: run.teacher}, num_seeds, None, terms)
    students = {student.name: student.sizes for student in run.students}
    if stage == "baseline":
        return Work(students, num_seeds, None, terms)
    beforehand = ()
    if run.config.makes_logits_first(stage):
        beforehand = (run.teacher, *(own.sizes for own in run.further_teachers))
    teacher = run.teacher if teaches(terms) else None
    return Work(students, num_seeds, teacher, terms, beforehand)


def tokens_read(run: Run, stage: str, width: int, num_segments: int | None = None) -> int | None:
    """At how many tokens of a row the last layer runs; None: at every one.

    `num_segments` are the examples that a packed row has room for.
    """
    terms = _terms(run, stage)
    if reads_taps(terms) or reads_all_words(terms):
        return None
    num_read = num_segments or 1
    if any(term.term in OF_WORDS for term in terms):
        has_pair_head = stage == "pretrain" and run.section(stage).pair_weight > 0
        num_read = _num_picked(run, stage, width) + has_pair_head
    return num_read if is_few(num_read, width) else None


def examples_read(batch: Batch) -> int | None:
    """The same, where all that is read are logits of examples."""
    num_read = batch.num_segments or 1
    return num_read if is_few(num_read, batch.shape[1]) else None


def _terms(run: Run, stage: str) -> Terms:
    if stage == "pretrain":
        return (MaskedLMTerm(term="masked_lm"),)
    return () if stage in ("finetune", "baseline") else run.config.step_terms(stage)


def projected(work: Work, student: ModelConfig) -> list[int]:
    """The student's hidden entry of each comparison with the teacher's; 0 is the embeddings."""
    entries = []
    for term in work.terms:
        if isinstance(term, EmbeddingTerm):
            entries.append(0)
        elif isinstance(term, HiddenTerm):
            entries += [ours for ours, _ in layer_pairs(work, student, term)]
    return entries


def layer_pairs(work: Work, student: ModelConfig, term: LayerTerm) -> LayerPairs:
    """The student's and the teacher's layers that a term compares, from 1."""
    assert work.teacher is not None
    layers = student.num_hidden_layers, work.teacher.num_hidden_layers
    return make_layer_pairs(term.layer_map, *layers)


def words_of(run: Run, stage: str, terms: Terms, batch: Batch, share: float) -> Words | None:
    """Tokens are expected ones; the products go in whole chunks, as in `losses`.

    `share`: how far the stage is, 0 to 1.
    """
    terms = tuple(term for term in terms if term.term in OF_WORDS)
    if not terms:
        return None
    section = run.section(stage)
    num_parts = num_batch_shards(run.mesh) * section.gradient_accumulation_steps
    if stage == "pretrain":
        rate = section.mask_rate
        end = rate if section.mask_rate_end is None else section.mask_rate_end
        chunk_size = mlm_chunk_size(
            batch.num_slots // num_parts,
            section.loss_chunk_size,
            mask_rate=rate,
            mask_rate_end=end,
            unit=section.mask_unit,
        )
    else:
        rate = end = run.config.distillation.general_mask_rate
        chunk_size = _CHUNK_SIZE
    ids, real = batch.inputs.input_ids, np.asarray(batch.attention_mask, bool)
    num_maskable = np.count_nonzero(real & ~np.isin(ids, run.tokenizer.all_special_ids))
    num_masked = float((rate + (end - rate) * share) * num_maskable)
    num_picked = len(ids) * _num_picked(run, stage, ids.shape[1])

    def in_chunks(num_wanted: float, num_rows: int) -> int:
        size = min(chunk_size, num_rows // num_parts)
        return num_parts * size * math.ceil(min(num_wanted, num_rows) / num_parts / size)

    everywhere = in_chunks(float(real.sum()), ids.size)
    where_masked = in_chunks(num_masked, num_picked)
    of_term = [everywhere if reads_all_words((term,)) else where_masked for term in terms]
    mapped = ids.size if reads_all_words(terms) else num_picked
    return Words(
        mapped,
        sum(of_term),
        sum(n for n, term in zip(of_term, terms, strict=True) if term.term == "word_logits"),
        min(chunk_size, mapped // num_parts),
    )


def _num_picked(run: Run, stage: str, width: int) -> int:
    """The slots of a row for its masked tokens."""
    if stage != "pretrain":
        return num_slots(run.config.distillation.general_mask_rate, width)
    section = run.section(stage)
    rate = highest_rate(section.mask_rate, section.mask_rate_end)
    return num_slots(rate, width, section.mask_unit)
