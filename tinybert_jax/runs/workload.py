"""The models that a stage runs and the tokens that they compute; `runs.estimate` adds the costs."""

import math
from typing import NamedTuple

import numpy as np

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.models import SOLE
from tinybert_jax.config.run import StagePlan
from tinybert_jax.models.heads import is_few
from tinybert_jax.objectives.distillation import Options
from tinybert_jax.objectives.masked_lm import mlm_chunk_size
from tinybert_jax.objectives.masking import highest_rate, num_slots
from tinybert_jax.parallel.mesh import num_batch_shards
from tinybert_jax.performance.flops import forward_flops_per_token
from tinybert_jax.runs.run import Run
from tinybert_jax.settings.sizes import Side, Sizes
from tinybert_jax.terms.table import Terms, reads_every_word, reads_of

_CHUNK_SIZE = Options().chunk_size  # of distillation


class Work(NamedTuple):
    """The models of a stage and the loss terms that read them."""

    trained: dict[str, Sizes]  # by name
    num_seeds: int  # of each trained model
    teacher: Sizes | None  # the teacher that runs in every step
    terms: Terms  # the terms of the steps; pretrain has the masked LM as its only term
    logit_teachers: tuple[Sizes, ...] = ()  # teachers that run once over the text
    num_passes: int = 1  # of each trained model over a batch


class Words(NamedTuple):
    """Numbers of tokens of a batch, over all rows, at which parts of the masked-LM head run."""

    mapped: int  # the dense layer of the head
    student: int  # the product with the student's word table, summed over terms
    teacher: int  # the product with the teacher's word table, summed over terms
    chunk: int  # tokens whose logits exist at one time on a device


def work_of(run: Run, plan: StagePlan) -> Work:
    """The models of a stage and the terms of its steps."""
    num_seeds, terms = len(plan.seeds), plan.step_terms
    if plan.stage.role == "teacher":
        return Work({SOLE: run.teacher}, num_seeds, None, terms, (), plan.num_passes)
    students = {student.name: student.sizes for student in run.students}
    logit_teachers: tuple[Sizes, ...] = ()
    if plan.keeps_logits:
        further = [teacher.sizes for teacher in run.further_teachers]
        logit_teachers = (*[run.teacher] * max(len(run.own_teachers), 1), *further)
    teacher = run.teacher if reads_of(terms).teacher else None
    return Work(students, num_seeds, teacher, terms, logit_teachers, plan.num_passes)


def rough_flops(run: Run, plan: StagePlan) -> float:
    """FLOPs of a stage, to tell the time that is left: no text is tokenised."""
    section, work = plan.section, work_of(run, plan)
    num_examples, length = _rough_rows(run, plan)
    num_steps = section.num_steps
    if num_steps is None:
        num_steps = (section.num_epochs or 1) * num_examples / section.global_batch_size
    width = section.max_length
    trained = sum(forward_flops_per_token(model, width) for model in work.trained.values())
    per_token = 3 * work.num_seeds * work.num_passes * trained
    per_token += forward_flops_per_token(work.teacher, width) if work.teacher else 0
    once = sum(forward_flops_per_token(model, width) for model in work.logit_teachers)
    return float(length) * (num_steps * section.global_batch_size * per_token + num_examples * once)


_CHARACTERS = 4.5  # of a token, about, with the space after it
_NUM_READ = 200  # texts whose lengths are read


def _rough_rows(run: Run, plan: StagePlan) -> tuple[float, float]:
    """(number of examples, mean number of tokens of an example) of the text of a stage."""
    max_length = plan.section.max_length
    if plan.stage.reads_corpus:
        if run.stores:
            return float(sum(store.num_rows for store, _ in run.stores)), float(max_length)
        num_rows = sum(map(len, run.corpus)) / _CHARACTERS / max_length
        return max(1.0, num_rows), float(max_length)
    data = run.required_task.data
    examples = data.train if plan.stage.text == "labelled" else data.distilled
    step = max(1, len(examples.text) // _NUM_READ)
    texts = examples.text[::step]
    sizes = [
        len(text) if isinstance(text, str) else sum(len(w) + 1 for w in text) for text in texts
    ]
    if examples.text_pair is not None:
        sizes = [n + len(own) for n, own in zip(sizes, examples.text_pair[::step], strict=True)]
    lengths = [min(2 + size / _CHARACTERS, max_length) for size in sizes]
    return float(len(examples.text)), sum(lengths, 0.0) / max(len(lengths), 1)


def count_last_layer_tokens(
    run: Run, plan: StagePlan, width: int, num_segments: int | None = None
) -> int | None:
    """The number of tokens of a row at which the last layer runs; None: all tokens.

    `num_segments`: most examples in a packed row; None: rows are not packed.
    """
    read = reads_of(plan.step_terms)
    if read.encoder or reads_every_word(plan.step_terms):
        return None
    if plan.stage.trains_head and run.required_task.kind.unit != "row":
        return None
    num_last_layer_tokens = num_segments or 1
    if read.words:
        assert plan.masking is not None
        num_last_layer_tokens = _num_picked(plan, width) + (plan.masking.pair_weight > 0)
    return num_last_layer_tokens if is_few(num_last_layer_tokens, width) else None


def count_last_layer_examples(run: Run, batch: Batch) -> int | None:
    """`count_last_layer_tokens` where only the logits of the task are read."""
    if run.required_task.kind.unit != "row":
        return None
    num_last_layer_tokens = batch.num_segments or 1
    return num_last_layer_tokens if is_few(num_last_layer_tokens, batch.shape[1]) else None


def projected(work: Work, student: Sizes) -> list[tuple[Side, int]]:
    """For each comparison with a hidden state of the teacher: the side and index of the student's.

    Index 0 is the embeddings, index i the output of layer i.
    """
    if work.teacher is None:
        return []
    return [
        (term.read_side, entry)
        for term in work.terms
        for entry in term.projected_entries(student, work.teacher)
    ]


def words_of(run: Run, plan: StagePlan, batch: Batch, share: float) -> Words | None:
    """The expected numbers of tokens in `batch`; None where no term predicts words.

    Products run in whole chunks, as in `losses.vocabulary`. `share`: the share of the stage's steps
    that are done, 0 to 1.
    """
    terms = tuple(term for term in plan.step_terms if term.reads.words)
    if not terms:
        return None
    masking, section = plan.masking, plan.section
    num_parts = num_batch_shards(run.mesh) * section.gradient_accumulation_steps
    rate = end = masking.rate if masking else 0.0
    chunk_size = _CHUNK_SIZE
    if masking and masking.max_chunk_size is not None:
        end = rate if masking.rate_end is None else masking.rate_end
        chunk_size = mlm_chunk_size(
            batch.num_slots // num_parts,
            masking.max_chunk_size,
            mask_rate=rate,
            mask_rate_end=end,
            unit=masking.unit,
        )
    ids, real = batch.inputs.input_ids, np.asarray(batch.attention_mask, bool)
    num_maskable = np.count_nonzero(real & ~np.isin(ids, run.tokenizer.all_special_ids))
    num_masked = float((rate + (end - rate) * share) * num_maskable)
    num_picked = len(ids) * _num_picked(plan, ids.shape[1])

    def in_chunks(num_wanted: float, num_rows: int) -> int:
        size = min(chunk_size, num_rows // num_parts)
        return num_parts * size * math.ceil(min(num_wanted, num_rows) / num_parts / size)

    everywhere = in_chunks(float(real.sum()), ids.size)
    where_masked = in_chunks(num_masked, num_picked)
    by_term = [everywhere if term.reads_every_word else where_masked for term in terms]
    mapped = ids.size if reads_every_word(terms) else num_picked
    return Words(
        mapped,
        sum(by_term),
        sum(n for n, term in zip(by_term, terms, strict=True) if term.reads.teacher),
        min(chunk_size, mapped // num_parts),
    )


def _num_picked(plan: StagePlan, width: int) -> int:
    """The number of positions in a row that are reserved for masked tokens."""
    masking = plan.masking
    if masking is None:
        return num_slots(0.0, width)
    return num_slots(highest_rate(masking.rate, masking.rate_end), width, masking.unit)
