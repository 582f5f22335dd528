"""The term `cls`: the first token of each example (patient knowledge distillation)."""

from typing import ClassVar, Literal

from pydantic import Field

from tinybert_jax.settings.layer_maps import LayerMap
from tinybert_jax.settings.sizes import Sizes
from tinybert_jax.terms.term import Context, LayerTerm, Loss, Reads, Row, Tap, check_equal_widths


class ClsTerm(LayerTerm):
    """Normalised hidden states of the first token (PKD, arXiv 1908.09355, equation 7).

    As in its code the mean over width and layers, and without the last layer.
    """

    reads: ClassVar[Reads] = Reads(encoder=True)
    needs_examples = True

    term: Literal["cls"]
    layer_map: LayerMap = Field(default="skip", description="which layers are compared")

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        from tinybert_jax.losses.pointwise import normalised_distance

        def one(c: Context, ours: int, theirs: int):
            return normalised_distance(
                c.first_tokens(c.student.encoder.hidden[ours]),
                c.first_tokens(c.teacher.encoder.hidden[theirs]),
                c.batch.weights.reshape(-1),
                count=c.counts.examples,
            )

        total = self.sum_over_layers(num_student, num_teacher, one)
        num_pairs = len(self.pairs(num_student, num_teacher))
        return lambda context: total(context) / num_pairs

    def check_fit(self, student: Sizes, teacher: Sizes) -> None:
        super().check_fit(student, teacher)
        check_equal_widths(student, teacher)

    def teacher_taps(self, student: Sizes, teacher: Sizes, row: Row) -> list[Tap]:
        return [Tap("hidden", theirs) for _, theirs in self.pairs_of(student, teacher)]
