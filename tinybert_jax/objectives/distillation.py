"""The objective of the distillation stages: a sum of terms between a teacher and a student."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config import objectives
from tinybert_jax.config.objectives import (
    AttentionTerm,
    ClsTerm,
    CosineTerm,
    EmbeddingTerm,
    HiddenTerm,
    LabelTerm,
    LogitsTerm,
    MaskedLMTerm,
    Ramp,
    RelationTerm,
    Terms,
    WordLogitsTerm,
)
from tinybert_jax.losses import attention as attention_losses
from tinybert_jax.losses import pointwise, relations, vocabulary
from tinybert_jax.models import attention
from tinybert_jax.models.encoder import first_tokens
from tinybert_jax.models.heads import MaskedLMOutput
from tinybert_jax.models.params import Apply
from tinybert_jax.objectives.alignment import project
from tinybert_jax.objectives.masked_lm import Mask
from tinybert_jax.objectives.objective import Counts, Objective, count_units, encoder_inputs
from tinybert_jax.objectives.supervised import gold_loss
from tinybert_jax.settings.layer_maps import make_layer_pairs


class Role(NamedTuple):
    """A teacher or a student: what to call, and what comes out."""

    apply: Apply
    kind: str  # encoder, classifier or masked_lm
    num_layers: int


class Outputs(NamedTuple):
    """What the terms read of one model."""

    encoder: Any  # EncoderOutput, where a term reads it
    logits: jax.Array | None = None  # [examples, labels]
    words: MaskedLMOutput | None = None


class Context(NamedTuple):
    """All that a term's loss may read of one microbatch."""

    student: Outputs
    teacher: Outputs
    batch: Batch
    counts: Counts
    projection: Any
    options: "Options"


class Options(NamedTuple):
    """What all terms of an objective share."""

    normalisation: pointwise.Normalisation = "valid_only"
    regression: bool = False
    chunk_size: int = 256  # masked tokens whose logits exist at one time, on each of
    num_shards: int = 1  # batch shards
    all_words: bool = False  # whether masked-LM factors are those of every token


Loss = Callable[[Context], jax.Array]


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
    values = [_LOSSES[term.term](term, student.num_layers, teacher.num_layers) for term in terms]
    names = _names([term.term for term in terms])
    options = options._replace(all_words=objectives.reads_all_words(terms))
    run = functools.partial(_run, all_words=options.all_words)

    def prepare(batch: Batch, key: jax.Array, share: jax.Array) -> tuple[Batch, Counts]:
        counts = count_units(batch, options.normalisation)._replace(share=share)
        return (batch, counts) if mask is None else mask(batch, key, counts)

    def targets(batch: Batch, frozen: Any) -> Outputs:
        known = batch.teacher_logits
        if known is not None:
            known = known.reshape(-1, known.shape[-1])
        read = terms if known is None else objectives.without_logits(terms)
        if not objectives.teaches(read):
            return Outputs(None, known)
        outputs = run(teacher, frozen, batch, None, taps=objectives.reads_taps(read))
        if known is not None:
            outputs = outputs._replace(logits=known)
        return jax.lax.stop_gradient(outputs)

    def loss(params, batch, counts, key, goal):
        taps = objectives.reads_taps(terms)
        ours = run(student, params["student"], batch, key, taps=taps)
        context = Context(ours, goal, batch, counts, params.get("projection"), options)
        parts = {}
        for name, value in zip(names, values, strict=True):
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
    inputs = (params, *encoder_inputs(batch), key)
    if role.kind == "encoder":
        return Outputs(role.apply(*inputs))
    if role.kind == "classifier":
        output = role.apply(*inputs, num_segments=batch.num_segments, taps=taps)
        return Outputs(output.encoder, output.logits.reshape(-1, output.logits.shape[-1]))
    positions = None if all_words else batch.targets["positions"]
    words = role.apply(*inputs, positions=positions, taps=taps)
    return Outputs(words.encoder, words=words)


def _names(terms: Sequence[str]) -> list[str]:
    """loss/hidden, and of a second one loss/hidden_2."""
    counted = [(term, terms[: place + 1].count(term)) for place, term in enumerate(terms)]
    return [f"loss/{_METRIC.get(t, t)}" + (f"_{n}" if n > 1 else "") for t, n in counted]


_METRIC = {"logits": "soft"}


def _number(value: float | Ramp, counts: Counts) -> float | jax.Array:
    """A weight or temperature at this step."""
    if isinstance(value, Ramp):
        return value.start + (value.end - value.start) * counts.share
    return value


def _over_layers(term: Any, num_student: int, num_teacher: int, one: Callable) -> Loss:
    """Σ of `one(context, student's layer, teacher's layer)` over the term's layer map."""
    pairs = make_layer_pairs(term.layer_map, num_student, num_teacher)
    return lambda context: jnp.stack([one(context, ours, theirs) for ours, theirs in pairs]).sum()


def _attention(term: AttentionTerm, num_student: int, num_teacher: int) -> Loss:
    def heads(x: jax.Array, side: int) -> jax.Array:
        if term.head_map:
            return x[:, :, [pair[side] - 1 for pair in term.head_map]]
        return attention_losses.regroup(x, term.heads) if term.heads else x

    def one(c: Context, ours: int, theirs: int) -> jax.Array:
        student, teacher, mask = c.student.encoder, c.teacher.encoder, c.batch.attention_mask
        options = {"normalisation": c.options.normalisation, "count": c.counts.pairs}
        maps = _maps(term, c, ours, theirs)
        if maps is not None:
            return attention_losses.score_mse(*maps, mask, **options)
        return attention_losses.attention_mse(
            heads(student.queries[ours - 1], 0),
            heads(student.keys[ours - 1], 0),
            heads(teacher.queries[theirs - 1], 1),
            heads(teacher.keys[theirs - 1], 1),
            mask,
            **options,
        )

    return _over_layers(term, num_student, num_teacher, one)


def _maps(
    term: AttentionTerm, c: Context, ours: int, theirs: int
) -> tuple[jax.Array, jax.Array] | None:
    """Both models' own score maps, where the loss reads them instead of queries and keys.

    Not of bfloat16 activations: their scores are of rounded, scaled queries.
    """
    built = []
    for model, layer in ((c.student.encoder, ours), (c.teacher.encoder, theirs)):
        scores, queries = model.attention_scores, model.queries[layer - 1]
        if scores is None or scores[layer - 1] is None or queries.dtype != jnp.float32:
            return None
        built.append((scores[layer - 1], queries.shape[-1]))
    (student, student_dim), (teacher, teacher_dim) = built
    mask = c.batch.attention_mask
    reads = attention_losses.reads_scores(
        mask.shape[1], student_dim, teacher_dim, packed=mask.dtype != bool
    )
    return (student, teacher) if reads and term.keeps_heads else None


def _hidden(term: HiddenTerm, num_student: int, num_teacher: int) -> Loss:
    return _over_layers(term, num_student, num_teacher, _hidden_entry)


def _embedding(term: EmbeddingTerm, num_student: int, num_teacher: int) -> Loss:
    return lambda context: _hidden_entry(context, 0, 0)


def _hidden_entry(c: Context, ours: int, theirs: int) -> jax.Array:
    return pointwise.hidden_mse(
        project(c.projection, ours, c.student.encoder.hidden[ours]),
        c.teacher.encoder.hidden[theirs],
        c.batch.real,
        normalisation=c.options.normalisation,
        count=c.counts.tokens,
    )


def _relation(term: RelationTerm, num_student: int, num_teacher: int) -> Loss:
    def one(c: Context, ours: int, theirs: int) -> jax.Array:
        def kl(name: str) -> jax.Array:
            student, teacher = (
                attention_losses.regroup(getattr(model.encoder, name)[layer - 1], term.heads)
                for model, layer in ((c.student, ours), (c.teacher, theirs))
            )
            return relations.relation_kl(
                student, student, teacher, teacher, c.batch.attention_mask, count=c.counts.tokens
            )

        return jnp.stack([kl(name) for name in term.of]).sum()

    return _over_layers(term, num_student, num_teacher, one)


def _cls(term: ClsTerm, num_student: int, num_teacher: int) -> Loss:
    def one(c: Context, ours: int, theirs: int) -> jax.Array:
        def first(hidden: jax.Array) -> jax.Array:
            tokens = first_tokens(hidden, c.batch.attention_mask, c.batch.num_segments)
            return tokens.reshape(-1, hidden.shape[-1])

        return pointwise.normalised_distance(
            first(c.student.encoder.hidden[ours]),
            first(c.teacher.encoder.hidden[theirs]),
            c.batch.weights.reshape(-1),
            count=c.counts.examples,
        )

    total = _over_layers(term, num_student, num_teacher, one)
    num_pairs = len(make_layer_pairs(term.layer_map, num_student, num_teacher))
    return lambda context: total(context) / num_pairs


def _cosine(term: CosineTerm, num_student: int, num_teacher: int) -> Loss:
    return lambda c: pointwise.cosine(
        c.student.encoder.hidden[-1],
        c.teacher.encoder.hidden[-1],
        c.batch.real,
        count=c.counts.tokens,
    )


def _logits(term: LogitsTerm, num_student: int, num_teacher: int) -> Loss:
    loss = pointwise.kl if term.form == "kl" else pointwise.soft_cross_entropy

    def value(c: Context) -> jax.Array:
        ours, theirs = c.student.logits, c.teacher.logits
        assert ours is not None and theirs is not None
        weights, count = c.batch.weights.reshape(-1), c.counts.examples
        if c.options.regression:
            return pointwise.logits_mse(ours, theirs, weights, count=count)
        each = functools.partial(loss, ours, theirs, weights, reduction=term.reduction, count=count)
        return _at_temperature(term, c, each)

    return value


def _label(term: LabelTerm, num_student: int, num_teacher: int) -> Loss:
    return lambda c: gold_loss(
        c.student.logits, c.batch, c.counts, c.options.regression, term.label_smoothing
    )


def _masked_lm(term: MaskedLMTerm, num_student: int, num_teacher: int) -> Loss:
    return lambda c: vocabulary.masked_lm(
        *_factors(c, c.student, masked=True),
        c.batch.targets["tokens"].reshape(-1),
        chunk_size=c.options.chunk_size,
        num_shards=c.options.num_shards,
        count=c.counts.predictions,
    )


def _word_logits(term: WordLogitsTerm, num_student: int, num_teacher: int) -> Loss:
    def value(c: Context) -> jax.Array:
        if term.at == "real":
            mask, count = c.batch.real, c.counts.tokens
        else:
            mask = c.batch.targets["tokens"] != pointwise.IGNORED_LABEL
            count = c.counts.predictions
        masked = term.at == "masked"
        each = functools.partial(
            vocabulary.kl,
            _factors(c, c.student, masked=masked),
            _factors(c, c.teacher, masked=masked),
            mask.reshape(-1),
            chunk_size=c.options.chunk_size,
            num_shards=c.options.num_shards,
            count=count,
        )
        return _at_temperature(term, c, each)

    return value


def _at_temperature(
    term: LogitsTerm | WordLogitsTerm, c: Context, loss: Callable[..., jax.Array]
) -> jax.Array:
    temperature = _number(term.temperature, c.counts)
    value = loss(temperature=temperature)
    return value * temperature**2 if term.times_squared_temperature else value


def _factors(
    c: Context, outputs: Outputs, *, masked: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """hidden [rows, dim], table [vocab, dim], bias [vocab]: the logits' factors."""
    words = outputs.words
    assert words is not None
    hidden = words.hidden
    if masked and c.options.all_words:
        hidden = attention.at(c.batch.targets["positions"])(hidden)
    return hidden.reshape(-1, hidden.shape[-1]), words.table, words.bias


_LOSSES: dict[str, Callable[..., Loss]] = {
    "attention": _attention,
    "hidden": _hidden,
    "embedding": _embedding,
    "relation": _relation,
    "cls": _cls,
    "cosine": _cosine,
    "logits": _logits,
    "label": _label,
    "masked_lm": _masked_lm,
    "word_logits": _word_logits,
}
