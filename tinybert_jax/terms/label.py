"""The term `label`: the gold labels of the task."""

from typing import ClassVar, Literal

from pydantic import Field

from tinybert_jax.settings.section import Probability
from tinybert_jax.terms.term import Context, Loss, Reads, Term


class LabelTerm(Term):
    """The gold labels."""

    reads: ClassVar[Reads] = Reads(task_logits=True, teacher=False)
    needs_labels = True

    term: Literal["label"]
    label_smoothing: Probability = Field(
        default=0.0, description="share of a label given to all classes"
    )

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        def loss(c: Context):
            return c.form().label_loss(
                c.student.logits,
                *c.units(),
                label_smoothing=self.label_smoothing,
                count=c.counts.units,
            )

        return loss
