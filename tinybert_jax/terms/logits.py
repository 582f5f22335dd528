"""The term `logits`: the teacher's answers to the task."""

from typing import ClassVar, Literal

from pydantic import Field

from tinybert_jax.settings.section import Positive
from tinybert_jax.terms.term import Context, Loss, PositiveRamp, Reads, Term


class LogitsTerm(Term):
    """The teacher's logits (arXiv 1909.10351, equation 10); numbers of a regression by MSE."""

    reads: ClassVar[Reads] = Reads(task_logits=True)
    metric: ClassVar[str | None] = "soft"

    term: Literal["logits"]
    form: Literal["cross_entropy", "kl"] = Field(
        default="cross_entropy",
        description="with the teacher's probabilities; kl: less their entropy",
    )
    temperature: Positive | PositiveRamp = Field(
        default=1.0, description="what logits are divided by"
    )
    times_squared_temperature: bool = Field(
        default=False, description="as Hinton et al. do, so that the gradient keeps its size"
    )
    where: Literal["all", "right"] = Field(
        default="all", description="right: only units whose labels are the teacher's own answer"
    )
    reduction: Literal["sum", "mean_classes"] = Field(
        default="sum", description="over classes; mean_classes: as TinyBERT's code"
    )

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        return self.where == "right"

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        def loss(c: Context):
            form = c.form()
            labels, weights = c.units()
            if self.where == "right" and form.is_right is not None:
                weights = weights * form.is_right(c.teacher.logits, labels)
            if not form.has_temperature:
                return form.teacher_loss(
                    c.student.logits, c.teacher.logits, weights, count=c.counts.units
                )
            temperature = c.number(self.temperature)
            value = form.teacher_loss(
                c.student.logits,
                c.teacher.logits,
                weights,
                divergence=self.form,
                temperature=temperature,
                reduction=self.reduction,
                count=c.counts.units,
            )
            return value * temperature**2 if self.times_squared_temperature else value

        return loss
