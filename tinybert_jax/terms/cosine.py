"""The term `cosine`: the direction of the last hidden states."""

from typing import ClassVar, Literal

from tinybert_jax.settings.sizes import Sizes
from tinybert_jax.terms.term import Loss, Reads, Row, Tap, Term, check_equal_widths


class CosineTerm(Term):
    """1 − cosine of the last hidden states (DistilBERT, arXiv 1910.01108)."""

    reads: ClassVar[Reads] = Reads(encoder=True)

    term: Literal["cosine"]

    @property
    def mean_over(self) -> Literal["units", "tokens", "positions"]:
        return "tokens"

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        from tinybert_jax.losses.pointwise import cosine

        return lambda c: cosine(
            c.student.encoder.hidden[-1],
            c.teacher.encoder.hidden[-1],
            c.batch.real,
            count=c.counts.tokens,
        )

    def check_fit(self, student: Sizes, teacher: Sizes) -> None:
        check_equal_widths(student, teacher)

    def teacher_taps(self, student: Sizes, teacher: Sizes, row: Row) -> list[Tap]:
        return [Tap("hidden", teacher.num_hidden_layers)]
