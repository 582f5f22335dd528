"""The objective of the distillation stages: a sum of terms between a teacher and a student."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.tasks import Form
from tinybert_jax.losses.pointwise import Normalisation
from tinybert_jax.models.attention import at
from tinybert_jax.models.encoder import first_tokens
from tinybert_jax.models.heads import MaskedLMOutput
from tinybert_jax.models.params import Apply
from tinybert_jax.objectives.alignment import project
from tinybert_jax.objectives.masked_lm import Mask
from tinybert_jax.objectives.objective import Counts, Objective, count_units, encoder_inputs, units
from tinybert_jax.terms.table import Terms, reads_every_word, reads_of, without_task_logits
from tinybert_jax.terms.term import Ramp, Reads


class Role(NamedTuple):
    """A teacher or a student: what to call, and which outputs it has."""

    apply: Apply
    reads: Reads
    num_layers: int


class Outputs(NamedTuple):
    """The outputs of one model that the terms read."""

    encoder: Any  # EncoderOutput, where a term reads it
    logits: jax.Array | None = None  # [units, classes]
    words: MaskedLMOutput | None = None


class Options(NamedTuple):
    """What all terms of an objective share."""

    normalisation: Normalisation = "valid_only"
    form: Form = "softmax"  # of the task's logits
    chunk_size: int = 256  # masked tokens whose logits exist at one time, on each of
    num_shards: int = 1  # batch shards
    all_words: bool = False  # whether masked-LM factors are those of every token


class Context(NamedTuple):
    """One microbatch as the loss of a term sees it."""

    student: Outputs
    teacher: Outputs
    batch: Batch
    counts: Counts
    projection: Any
    options: Options

    def number(self, value: float | Ramp) -> float | jax.Array:
        """A weight or temperature at the present step."""
        return _number(value, self.counts)

    def projected(self, entry: int) -> jax.Array:
        """One hidden entry of the student at the teacher's width [batch, seq, teacher_dim]."""
        return project(self.projection, entry, self.student.encoder.hidden[entry])

    def first_tokens(self, hidden: jax.Array) -> jax.Array:
        """The hidden state of the first token of each example [examples, dim]."""
        tokens = first_tokens(hidden, self.batch.attention_mask, self.batch.num_segments)
        return tokens.reshape(-1, hidden.shape[-1])

    def units(self) -> tuple[jax.Array, jax.Array]:
        """The task's labels [units, …] and weights [units]."""
        return units(self.batch)

    def word_factors(
        self, outputs: Outputs, *, masked: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """hidden [rows, dim], table [vocab, dim], bias [vocab]: the factors of word logits."""
        words = outputs.words
        assert words is not None
        hidden = words.hidden
        if masked and self.options.all_words:
            hidden = at(self.batch.targets["positions"])(hidden)
        return hidden.reshape(-1, hidden.shape[-1]), words.table, words.bias


def make_distill(
    student: Role,
    teacher: Role,
    terms: Terms,
    options: Options = Options(),  # noqa: B008
    mask: Mask | None = None,
) -> Objective:
    """Σ weight·term; each part is a metric of its own.

    `params` = {"student": its parameters[, "projection": …]}; `frozen` = the teacher's, read where
    a term does. `mask` corrupts the batch that both models see.
    """
    losses = [term.make_loss(student.num_layers, teacher.num_layers) for term in terms]
    names = _metric_names([term.metric or term.name for term in terms])
    options = options._replace(all_words=reads_every_word(terms))
    run = functools.partial(_run, all_words=options.all_words)

    def prepare(batch: Batch, key: jax.Array, share: jax.Array) -> tuple[Batch, Counts]:
        counts = count_units(batch, options.normalisation)._replace(share=share)
        return (batch, counts) if mask is None else mask(batch, key, counts)

    def targets(batch: Batch, frozen: Any) -> Outputs:
        known = batch.teacher_logits
        if known is not None:
            known = known.reshape(-1, known.shape[-1])
        read = reads_of(terms if known is None else without_task_logits(terms))
        if not read.teacher:
            return Outputs(None, known)
        outputs = run(teacher, frozen, batch, None, taps=read.encoder)
        if known is not None:
            outputs = outputs._replace(logits=known)
        return jax.lax.stop_gradient(outputs)

    def loss(params, batch, counts, key, goal):
        ours = run(student, params["student"], batch, key, taps=reads_of(terms).encoder)
        context = Context(ours, goal, batch, counts, params.get("projection"), options)
        parts = {}
        for name, value in zip(names, losses, strict=True):
            with jax.named_scope("~" + name.replace("/", " ")):
                parts[name] = value(context)
        weighted = [
            _number(term.weight, counts) * part
            for term, part in zip(terms, parts.values(), strict=True)
        ]
        return jnp.stack(weighted).sum(), parts

    return Objective(prepare, loss, targets)


def _run(
    role: Role,
    params: Any,
    batch: Batch,
    key: jax.Array | None,
    *,
    taps: bool,
    all_words: bool,
) -> Outputs:
    """Masked-LM factors at the masked positions [predictions, …], or at all [tokens, …]."""
    arguments = (params, *encoder_inputs(batch), key)
    if role.reads.words:
        positions = None if all_words else batch.targets["positions"]
        words = role.apply(
            *arguments, num_segments=batch.num_segments, positions=positions, taps=taps
        )
        return Outputs(words.encoder, words=words)
    if role.reads.task_logits:
        output = role.apply(*arguments, num_segments=batch.num_segments, taps=taps)
        return Outputs(output.encoder, output.logits.reshape(-1, output.logits.shape[-1]))
    return Outputs(role.apply(*arguments, num_segments=batch.num_segments))


def _metric_names(names: Sequence[str]) -> list[str]:
    """loss/hidden, and of a second one loss/hidden_2."""
    counted = [(name, names[: place + 1].count(name)) for place, name in enumerate(names)]
    return [f"loss/{name}" + (f"_{count}" if count > 1 else "") for name, count in counted]


def _number(value: float | Ramp, counts: Counts) -> float | jax.Array:
    if isinstance(value, Ramp):
        return value.start + (value.end - value.start) * counts.share
    return value
