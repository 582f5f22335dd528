"""The term `pooled`: the direction of the pooled first token of each example."""

from typing import ClassVar, Literal

from tinybert_jax.settings.sizes import Sizes
from tinybert_jax.terms.term import Context, Loss, Reads, Row, Tap, Term, check_equal_widths


class PooledTerm(Term):
    """1 − cosine of what the two poolers make of the first token of each example.

    Both poolers have to be trained ones: `runs.checks` refuses models that have none.
    """

    reads: ClassVar[Reads] = Reads(encoder=True, pooled=True)
    needs_examples = True

    term: Literal["pooled"]

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        from tinybert_jax.losses.pointwise import pooled_cosine

        def loss(c: Context):
            ours, theirs = c.student.encoder.pooled, c.teacher.encoder.pooled
            return pooled_cosine(
                ours.reshape(-1, ours.shape[-1]),
                theirs.reshape(-1, theirs.shape[-1]),
                c.batch.weights.reshape(-1),
                count=c.counts.examples,
            )

        return loss

    def check_fit(self, student: Sizes, teacher: Sizes) -> None:
        check_equal_widths(student, teacher)

    def teacher_taps(self, student: Sizes, teacher: Sizes, row: Row) -> list[Tap]:
        return [Tap("hidden", teacher.num_hidden_layers)]  # which the pooler reads
