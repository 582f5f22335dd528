"""The terms `masked_lm` and `word_logits`: predictions of words, on the corpus."""

import functools
from typing import ClassVar, Literal

from pydantic import Field

from tinybert_jax.settings.section import Positive
from tinybert_jax.terms.term import Context, Loss, PositiveRamp, Reads, Term


class MaskedLMTerm(Term):
    """The student's own masked LM, on the corpus."""

    reads: ClassVar[Reads] = Reads(words=True, teacher=False)

    term: Literal["masked_lm"]

    @property
    def predicts_masked(self) -> bool:
        return True

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        from tinybert_jax.losses import vocabulary

        def loss(c: Context):
            hidden, table, bias = c.word_factors(c.student, masked=True)
            return vocabulary.masked_lm(
                hidden,
                table,
                bias,
                c.batch.targets["tokens"].reshape(-1),
                chunk_size=c.options.chunk_size,
                num_shards=c.options.num_shards,
                count=c.counts.predictions,
            )

        return loss


class WordLogitsTerm(Term):
    """KL of the masked-LM logits (DistilBERT, arXiv 1910.01108), on the corpus."""

    reads: ClassVar[Reads] = Reads(words=True)

    term: Literal["word_logits"]
    at: Literal["real", "masked"] = Field("real", description="all tokens, or the masked ones")
    temperature: Positive | PositiveRamp = Field(
        default=1.0, description="what logits are divided by"
    )
    times_squared_temperature: bool = Field(
        True, description="as Hinton et al. do, so that the gradient keeps its size"
    )

    @property
    def reads_every_word(self) -> bool:
        return self.at == "real"

    @property
    def predicts_masked(self) -> bool:
        return self.at == "masked"

    @property
    def mean_over(self) -> Literal["units", "tokens", "positions"]:
        return "tokens" if self.at == "real" else "units"

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        from tinybert_jax.losses import vocabulary
        from tinybert_jax.losses.pointwise import IGNORED_LABEL

        def loss(c: Context):
            if self.at == "real":
                mask, count = c.batch.real, c.counts.tokens
            else:
                mask, count = c.batch.targets["tokens"] != IGNORED_LABEL, c.counts.predictions
            factors = functools.partial(c.word_factors, masked=self.at == "masked")
            temperature = c.number(self.temperature)
            value = vocabulary.kl(
                factors(c.student),
                factors(c.teacher),
                mask.reshape(-1),
                temperature=temperature,
                chunk_size=c.options.chunk_size,
                num_shards=c.options.num_shards,
                count=count,
            )
            return value * temperature**2 if self.times_squared_temperature else value

        return loss
