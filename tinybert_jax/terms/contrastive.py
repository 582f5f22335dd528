"""The terms `contrastive` and `similarity`: cosines between the sentences of a batch."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field

from tinybert_jax.settings.section import Positive
from tinybert_jax.terms.term import Context, Loss, PositiveRamp, Reads, Term


class _BatchTerm(Term):
    """A term that compares the vectors of a batch with each other, at every width of the task."""

    needs_embeddings = True
    couples_examples = True

    temperature: Positive | PositiveRamp = Field(
        0.05, description="what cosines are divided by before the softmax"
    )

    def mean_over_widths(self, one: Callable[[Context, Any], Any]) -> Loss:
        """The mean of `one(context, vectors)` over the whole vectors and their first columns."""
        import jax.numpy as jnp

        def loss(c: Context):
            ours = c.student.logits
            widths = (*(w for w in c.options.widths if w < ours.shape[-1]), ours.shape[-1])
            return jnp.stack([one(c, ours[:, :width]) for width in widths]).mean()

        return loss


class ContrastiveTerm(_BatchTerm):
    """InfoNCE: the partner of a text among all partners of the batch, without the teacher."""

    reads: ClassVar[Reads] = Reads(task_logits=True, teacher=False)
    needs_partners = True

    term: Literal["contrastive"]

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        from tinybert_jax.losses.similarity import info_nce

        def one(c: Context, vectors: Any):
            num_texts = c.options.num_texts
            return info_nce(
                vectors.reshape(-1, num_texts, vectors.shape[-1]),
                c.batch.weights.reshape(-1, num_texts)[:, 0],
                temperature=c.number(self.temperature),
                count=c.counts.examples / num_texts,
            )

        return self.mean_over_widths(one)


class SimilarityTerm(_BatchTerm):
    """The teacher's similarities of a text to the others of the batch, as soft targets.

    It needs no projection, so that the cosines of the exported student itself become the teacher's.
    """

    reads: ClassVar[Reads] = Reads(task_logits=True)

    term: Literal["similarity"]

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        from tinybert_jax.losses.similarity import similarity_kl

        def one(c: Context, vectors: Any):
            return similarity_kl(
                vectors,
                c.teacher.logits,
                c.batch.weights.reshape(-1),
                temperature=c.number(self.temperature),
                count=c.counts.examples,
            )

        return self.mean_over_widths(one)
