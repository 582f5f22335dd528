"""The term `sentence`: the vector of each sentence."""

from typing import ClassVar, Literal

from pydantic import Field

from tinybert_jax.settings.section import NonNegative
from tinybert_jax.terms.term import Context, Loss, Reads, Term


class SentenceTerm(Term):
    """Squared error and 1 − cosine between the pooled vectors (as LEAF, arXiv 2509.12539).

    A student of another width is compared through a trained linear map to the teacher's width,
    which is no part of the exported model.
    """

    reads: ClassVar[Reads] = Reads(task_logits=True)
    needs_embeddings = True
    projects_vectors = True

    term: Literal["sentence"]
    mse: NonNegative = Field(default=1.0, description="weight of the squared error")
    cosine: NonNegative = Field(default=1.0, description="weight of 1 − cosine")

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        from tinybert_jax.losses.pointwise import logits_mse, pooled_cosine

        def loss(c: Context):
            ours, theirs = c.student.logits, c.teacher.logits
            if ours.shape[-1] != theirs.shape[-1]:
                ours = c.projected_vectors(ours)
            weights, count = c.batch.weights.reshape(-1), c.counts.examples
            return self.mse * logits_mse(
                ours, theirs, weights, count=count
            ) + self.cosine * pooled_cosine(ours, theirs, weights, count=count)

        return loss
