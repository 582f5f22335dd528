"""The table of terms, and what a list of terms reads. A new term is a line of `AnyTerm`."""

import typing
from typing import Annotated

from pydantic import Field

from tinybert_jax.settings.sizes import Side, Sizes
from tinybert_jax.terms.attention import AttentionTerm
from tinybert_jax.terms.cls import ClsTerm
from tinybert_jax.terms.contrastive import ContrastiveTerm, SimilarityTerm
from tinybert_jax.terms.cosine import CosineTerm
from tinybert_jax.terms.hidden import EmbeddingTerm, HiddenTerm
from tinybert_jax.terms.label import LabelTerm
from tinybert_jax.terms.logits import LogitsTerm
from tinybert_jax.terms.pooled import PooledTerm
from tinybert_jax.terms.relation import RelationTerm
from tinybert_jax.terms.sentence import SentenceTerm
from tinybert_jax.terms.term import Reads
from tinybert_jax.terms.words import MaskedLMTerm, WordLogitsTerm

AnyTerm = Annotated[
    AttentionTerm
    | HiddenTerm
    | EmbeddingTerm
    | RelationTerm
    | ClsTerm
    | CosineTerm
    | PooledTerm
    | LogitsTerm
    | LabelTerm
    | SentenceTerm
    | ContrastiveTerm
    | SimilarityTerm
    | MaskedLMTerm
    | WordLogitsTerm,
    Field(discriminator="term"),
]
Terms = tuple[AnyTerm, ...]
TERM_NAMES: tuple[str, ...] = tuple(
    typing.get_args(term.model_fields["term"].annotation)[0]
    for term in typing.get_args(typing.get_args(AnyTerm)[0])
)


def reads_of(terms: Terms, *, of_teacher: bool = False) -> Reads:
    """The outputs that any of the terms reads, of either model or of the teacher alone."""
    read = [term.reads for term in terms if term.reads.teacher or not of_teacher]
    return Reads(*(any(values) for values in zip(*read, strict=True))) if read else _NOTHING


def projected_sides(terms: Terms, student: Sizes, teacher: Sizes) -> tuple[Side, ...]:
    """The sides that any of the terms compares through a projection, the encoder first."""
    is_other_width = student.hidden_size != teacher.hidden_size
    found = {
        term.read_side
        for term in terms
        if term.reads.projection or (term.projects_vectors and is_other_width)
    }
    return tuple(side for side in typing.get_args(Side) if side in found)


def without_task_logits(terms: Terms) -> Terms:
    """The terms that read the teacher in a step whose task logits of the teacher are known."""
    return tuple(t for t in terms if not (t.reads.teacher and t.reads.task_logits))


def reads_every_word(terms: Terms) -> bool:
    """Whether masked-LM logits are wanted at every token, not at the masked ones alone."""
    return any(term.reads_every_word for term in terms)


_NOTHING = Reads(teacher=False)
