"""The terms `hidden` and `embedding`: hidden states through a learnt projection."""

from typing import ClassVar, Literal

from pydantic import Field

from tinybert_jax.settings.sizes import Sizes
from tinybert_jax.terms.term import Context, LayerTerm, Loss, Reads, Row, Tap, Term

_SIDE = "for translation: the layers of the encoder or those of the decoder"


class HiddenTerm(LayerTerm):
    """Hidden states through the projection (arXiv 1909.10351, equation 8)."""

    reads: ClassVar[Reads] = Reads(encoder=True, projection=True)

    term: Literal["hidden"]
    side: Literal["encoder", "decoder"] = Field("encoder", description=_SIDE)

    @property
    def mean_over(self) -> Literal["units", "tokens", "positions"]:
        return "positions"

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        return self.sum_over_layers(num_student, num_teacher, _entry_loss)

    def projected_entries(self, student: Sizes, teacher: Sizes) -> list[int]:
        return [ours for ours, _ in self.pairs_of(student, teacher)]

    def teacher_taps(self, student: Sizes, teacher: Sizes, row: Row) -> list[Tap]:
        pairs = self.pairs_of(student, teacher)
        return [Tap("hidden", theirs, self.side) for _, theirs in pairs]


class EmbeddingTerm(Term):
    """The embedding layer's output through the projection (equation 9)."""

    reads: ClassVar[Reads] = Reads(encoder=True, projection=True)

    term: Literal["embedding"]
    side: Literal["encoder", "decoder"] = Field("encoder", description=_SIDE)

    @property
    def mean_over(self) -> Literal["units", "tokens", "positions"]:
        return "positions"

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        return lambda context: _entry_loss(context, 0, 0)

    def projected_entries(self, student: Sizes, teacher: Sizes) -> list[int]:
        return [0]

    def teacher_taps(self, student: Sizes, teacher: Sizes, row: Row) -> list[Tap]:
        return [Tap("embedding", 0, self.side)]


def _entry_loss(c: Context, ours: int, theirs: int):
    """Mean squared error of one hidden entry of each model; 0 is the embeddings."""
    from tinybert_jax.losses.pointwise import hidden_mse

    return hidden_mse(
        c.projected(ours),
        c.teacher.encoder.hidden[theirs],
        c.batch.real,
        normalisation=c.options.normalisation,
        count=c.counts.tokens,
    )
