"""The term `relation`: self-attention relations of queries, keys and values."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tinybert_jax.settings.layer_maps import LayerMap
from tinybert_jax.settings.section import PositiveInt
from tinybert_jax.settings.sizes import Sizes
from tinybert_jax.terms.term import (
    Context,
    LayerTerm,
    Loss,
    Reads,
    Row,
    Tap,
    check_divides,
)

_BLOCK_MAPS = 6  # maps of one block that exist at one time, as XLA:CPU compiles the loss


class RelationTerm(LayerTerm):
    """KL of softmaxed relations of queries, keys and values (MiniLMv2, arXiv 2012.15828)."""

    reads: ClassVar[Reads] = Reads(encoder=True)

    term: Literal["relation"]
    layer_map: LayerMap = Field(default="last", description="which layers are compared")
    of: Annotated[tuple[Literal["queries", "keys", "values"], ...], Field(min_length=1)] = Field(
        ("queries", "keys", "values"), description="what is related to itself"
    )
    heads: PositiveInt = Field(48, description="relation heads: both models are regrouped")

    @property
    def mean_over(self) -> Literal["units", "tokens", "positions"]:
        return "tokens"

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        import jax.numpy as jnp

        from tinybert_jax.losses.attention import regroup_heads
        from tinybert_jax.losses.relations import relation_kl

        def one(c: Context, ours: int, theirs: int):
            def kl(name: str):
                student, teacher = (
                    regroup_heads(getattr(model.encoder, name)[layer - 1], self.heads)
                    for model, layer in ((c.student, ours), (c.teacher, theirs))
                )
                return relation_kl(
                    student,
                    student,
                    teacher,
                    teacher,
                    c.batch.attention_mask,
                    count=c.counts.tokens,
                )

            return jnp.stack([kl(name) for name in self.of]).sum()

        return self.sum_over_layers(num_student, num_teacher, one)

    def check_fit(self, student: Sizes, teacher: Sizes) -> None:
        super().check_fit(student, teacher)
        check_divides(self.heads, {"student": student, "teacher": teacher})

    def teacher_taps(self, student: Sizes, teacher: Sizes, row: Row) -> list[Tap]:
        pairs = self.pairs_of(student, teacher)
        return [Tap(kind, theirs) for kind in self.of for _, theirs in pairs]

    def num_map_entries(self, student: Sizes, teacher: Sizes, row: Row) -> int:
        from tinybert_jax.losses.relations import RELATION_BLOCK

        # A row of one block goes without a loop: then the maps of all relations exist at once.
        num_relations = 1
        if row.width <= RELATION_BLOCK:
            num_relations = len(self.of) * len(self.pairs_of(student, teacher))
        return num_relations * _BLOCK_MAPS * self.heads * min(RELATION_BLOCK, row.width) * row.width
