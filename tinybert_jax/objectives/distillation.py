"""The objective of the distillation stages: a weighted sum of terms of a student and a teacher."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.tasks import Form as FormName
from tinybert_jax.losses.forms import Form
from tinybert_jax.losses.pointwise import Normalisation
from tinybert_jax.models.attention import at, fused_score_distance
from tinybert_jax.models.encoder import EncoderOutput, first_tokens
from tinybert_jax.models.heads import MaskedLMOutput
from tinybert_jax.models.params import Apply, Params, copy_table_per_shard
from tinybert_jax.objectives.alignment import PROJECTIONS, project
from tinybert_jax.objectives.factored import Factors, form_of
from tinybert_jax.objectives.masked_lm import Mask
from tinybert_jax.objectives.objective import (
    Counts,
    Objective,
    count_units,
    decoder_inputs,
    decoder_pairs,
    encoder_inputs,
    unit_logits,
    unit_scores,
    units,
)
from tinybert_jax.parallel.sharding import copy_per_shard
from tinybert_jax.settings.sizes import Side
from tinybert_jax.terms.table import Terms, reads_every_word, reads_of, without_task_logits
from tinybert_jax.terms.term import Ramp, Reads


class Role(NamedTuple):
    """A student or a teacher: its forward function and the outputs that terms read."""

    apply: Apply
    reads: Reads  # outputs that `apply` returns
    num_layers: int
    num_decoder_layers: int = 0

    def depth(self, side: Side) -> int:
        return self.num_layers if side == "encoder" else self.num_decoder_layers


class Outputs(NamedTuple):
    """The outputs of one model that the terms read."""

    encoder: Any  # EncoderOutput; None where no term reads it
    logits: jax.Array | Factors | None = None  # [units, classes]
    words: MaskedLMOutput | None = None
    decoder: Any = None  # DecoderOutput, of an encoder-decoder

    def on(self, side: Side) -> "Outputs":
        """The outputs with the layers of a side in the place of the encoder's."""
        if side == "encoder" or self.encoder is None:  # None: a teacher that the step does not read
            return self
        assert self.decoder is not None, "the config check refuses a side that a model lacks"
        own = self.decoder.self_attention if side == "decoder" else self.decoder.cross_attention
        arrays = own.queries, own.keys, own.values, own.attention_scores
        return self._replace(encoder=EncoderOutput(self.decoder.hidden, *arrays, None))


class Options(NamedTuple):
    """Settings that all terms of an objective share."""

    normalisation: Normalisation = "valid_only"
    form: FormName = "softmax"  # which losses fit the logits of the task
    chunk_size: int = 256  # masked tokens whose logits exist at one time on a batch shard
    num_shards: int = 1  # number of batch shards
    num_texts: int = 1  # texts of an example, each in a row of its own
    widths: tuple[int, ...] = ()  # of sentence vectors, beside the whole width
    fuses_scores: bool = False  # whether a kernel may compare attention scores, where one can run
    reads_maps: bool = True  # whether a loss may read the models' own score maps
    all_words: bool = False  # whether the masked-LM head runs at every token, not only masked ones


class Context(NamedTuple):
    """The inputs of the loss of a term, for one microbatch; all are of the side of the term."""

    student: Outputs
    teacher: Outputs
    batch: Batch
    counts: Counts  # of the whole batch
    projection: Any  # parameters of `alignment.project`, or None
    projection_copies: Any  # the same by `copy_per_shard`, for hidden states that share them
    options: Options
    pairs: jax.Array | None = None  # bool [batch, query, key] of a decoder's attention

    def number(self, value: float | Ramp) -> float | jax.Array:
        """The value of a weight or temperature at this step."""
        return _number(value, self.counts)

    def projected(self, entry: int) -> jax.Array:
        """Hidden state `entry` of the student at the teacher's width, [batch, seq, teacher_dim]."""
        return project(self.projection_copies, entry, self.student.encoder.hidden[entry])

    def projected_vectors(self, vectors: jax.Array) -> jax.Array:
        """Sentence vectors of the student at the teacher's width, [examples, teacher_dim]."""
        return project(self.projection, -1, vectors[None])[0]

    def score_distance(self, *taps: jax.Array) -> Callable[..., jax.Array] | None:
        """A kernel for the distance of scores of such queries and keys, where there is one."""
        return fused_score_distance(*taps) if self.options.fuses_scores else None

    def first_tokens(self, hidden: jax.Array) -> jax.Array:
        """The hidden state of the first token of each example, [examples, dim]."""
        tokens = first_tokens(hidden, self.batch.attention_mask, self.batch.num_segments)
        return tokens.reshape(-1, hidden.shape[-1])

    def form(self) -> Form:
        """The losses that fit the logits of the task."""
        return form_of(self.options.form, self.options.num_shards)

    def units(self) -> tuple[jax.Array, jax.Array]:
        """The labels [units, …] and weights [units] of the task."""
        return units(self.batch)

    def word_factors(
        self, outputs: Outputs, *, masked: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(hidden [tokens, dim], table [vocab, dim], bias [vocab]), whose product is word logits.

        `masked`: only at the masked positions.
        """
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
    """The objective Σ weight·term; every term is also a metric.

    `params` of the loss is {"student": parameters[, a projection of `PROJECTIONS`: …]}; `frozen`
    holds the teacher's parameters. `mask` masks tokens of the batch that both models read.
    """
    losses = [
        term.make_loss(student.depth(term.read_side), teacher.depth(term.read_side))
        for term in terms
    ]
    sides: set[Side] = {term.read_side for term in terms}
    names = _metric_names([term.metric or term.name for term in terms])
    options = options._replace(all_words=reads_every_word(terms))
    run = functools.partial(_run, all_words=options.all_words)

    def prepare(batch: Batch, key: jax.Array, share: jax.Array) -> tuple[Batch, Counts]:
        counts = count_units(batch, options.normalisation)._replace(share=share)
        return (batch, counts) if mask is None else mask(batch, key, counts)

    def targets(batch: Batch, frozen: Any) -> Outputs:
        kept = batch.teacher_logits
        if kept is not None:
            kept = unit_logits(kept, batch)
        read = reads_of(terms if kept is None else without_task_logits(terms))
        if not read.teacher:
            return Outputs(None, kept)
        outputs = run(teacher, frozen, batch, None, taps=read.encoder)
        if kept is not None:
            outputs = outputs._replace(logits=kept)
        return jax.lax.stop_gradient(outputs)

    def loss(params, batch, counts, key, targets):
        own = params["student"]
        if student.reads.words or decoder_inputs(batch):
            own = copy_table_per_shard(own, options.num_shards)
        outputs = run(student, own, batch, key, taps=reads_of(terms).encoder)
        contexts = {}
        for side in sides:
            projection = params.get(PROJECTIONS.get(side))
            copies = copy_per_shard(projection, options.num_shards)
            ours, theirs = outputs.on(side), targets.on(side)
            context = Context(ours, theirs, batch, counts, projection, copies, options)
            contexts[side] = context if side == "encoder" else _on_decoder(context, side)
        parts = {}
        for term, name, term_loss in zip(terms, names, losses, strict=True):
            with jax.named_scope("~" + name.replace("/", " ")):
                parts[name] = term_loss(contexts[term.read_side])
        weighted = [
            _number(term.weight, counts) * part
            for term, part in zip(terms, parts.values(), strict=True)
        ]
        return jnp.stack(weighted).sum(), parts

    return Objective(prepare, loss, targets)


def _run(
    role: Role,
    params: Params,
    batch: Batch,
    key: jax.Array | None,
    *,
    taps: bool,
    all_words: bool,
) -> Outputs:
    """Runs a model; its masked-LM head at the masked positions or, with `all_words`, everywhere."""
    arguments = (params, *encoder_inputs(batch), key)
    if role.reads.words:
        positions = None if all_words else batch.targets["positions"]
        words = role.apply(
            *arguments, num_segments=batch.num_segments, positions=positions, taps=taps
        )
        return Outputs(words.encoder, words=words)
    if role.reads.task_logits or decoder_inputs(batch):
        options = {"num_segments": batch.num_segments, **decoder_inputs(batch)}
        output = role.apply(*arguments, **options, taps=taps)
        decoder = getattr(output, "decoder", None)
        return Outputs(output.encoder, unit_scores(output, batch), decoder=decoder)
    return Outputs(role.apply(*arguments, num_segments=batch.num_segments))


def _on_decoder(context: Context, side: Side) -> Context:
    """The context with the tokens and the pairs of a decoder's side."""
    batch, counts = context.batch, context.counts
    pairs = counts.target_pairs if side == "decoder" else counts.cross_pairs
    return context._replace(
        batch=batch._replace(attention_mask=batch.targets["decoder_mask"]),
        counts=counts._replace(tokens=counts.units, pairs=pairs),
        pairs=decoder_pairs(batch)[side],
    )


def _metric_names(names: Sequence[str]) -> list[str]:
    """loss/hidden for the first term hidden, loss/hidden_2 for the second."""
    counted = [(name, names[: place + 1].count(name)) for place, name in enumerate(names)]
    return [f"loss/{name}" + (f"_{count}" if count > 1 else "") for name, count in counted]


def _number(value: float | Ramp, counts: Counts) -> float | jax.Array:
    if isinstance(value, Ramp):
        return value.start + (value.end - value.start) * counts.share
    return value
