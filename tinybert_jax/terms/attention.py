"""The term `attention`: scores QKᵀ/√d of both models."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tinybert_jax.settings.section import PositiveInt
from tinybert_jax.settings.sizes import Side, Sizes, side_of
from tinybert_jax.terms.term import (
    Context,
    LayerTerm,
    Loss,
    Reads,
    Row,
    Tap,
    check_divides,
)


class AttentionTerm(LayerTerm):
    """Scores QKᵀ/√d before softmax (arXiv 1909.10351, equation 7)."""

    reads: ClassVar[Reads] = Reads(encoder=True)

    term: Literal["attention"]
    side: Side = Field(
        "encoder",
        description="for translation: the attention of the encoder, of the decoder to the words "
        "before, or of the decoder to the encoder (cross)",
    )
    heads: PositiveInt | None = Field(
        None, description="both models' queries and keys regrouped into so many; default: as it is"
    )
    head_map: Annotated[tuple[tuple[PositiveInt, PositiveInt], ...], Field(min_length=1)] | None = (
        Field(None, description="[student's, teacher's] pairs of heads, from 1; default: all alike")
    )

    @model_validator(mode="after")
    def _heads_are_given_once(self) -> "AttentionTerm":
        if self.heads and self.head_map:
            raise ValueError(
                f"expected heads or head_map, got heads {self.heads} and head_map "
                f"{[list(pair) for pair in self.head_map]}; leave one of them out"
            )
        return self

    @property
    def keeps_heads(self) -> bool:
        """Whether both models' heads are compared one by one, without regrouping."""
        return self.heads is None and self.head_map is None

    @property
    def mean_over(self) -> Literal["units", "tokens", "positions"]:
        return "positions"

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        from tinybert_jax.losses import attention as losses

        def heads(x, side: int):
            if self.head_map:
                return x[:, :, [pair[side] - 1 for pair in self.head_map]]
            return losses.regroup_heads(x, self.heads) if self.heads else x

        def one(c: Context, ours: int, theirs: int):
            student, teacher, mask = c.student.encoder, c.teacher.encoder, c.batch.attention_mask
            queries_and_keys = (
                heads(student.queries[ours - 1], 0),
                heads(student.keys[ours - 1], 0),
                heads(teacher.queries[theirs - 1], 1),
                heads(teacher.keys[theirs - 1], 1),
            )
            if c.pairs is not None:
                return losses.pair_mse(*queries_and_keys, c.pairs, count=c.counts.pairs)
            options = {"normalisation": c.options.normalisation, "count": c.counts.pairs}
            maps = self._kept_maps(c, ours, theirs)
            if maps is not None:
                return losses.score_mse(*maps, mask, **options)
            distance = c.score_distance(*queries_and_keys)
            return losses.attention_mse(*queries_and_keys, mask, distance=distance, **options)

        return self.sum_over_layers(num_student, num_teacher, one)

    def _kept_maps(self, c: Context, ours: int, theirs: int):
        """Both models' own score maps, where the loss reads them instead of queries and keys.

        Not of bfloat16 activations: their scores are of rounded, scaled queries. Nor where a device
        rounds the inputs of products in fp32, as accelerators do unless they are told not to.
        """
        if not c.options.reads_maps:
            return None
        import jax.numpy as jnp

        from tinybert_jax.losses.attention import reads_attention_scores

        kept = []
        for model, layer in ((c.student.encoder, ours), (c.teacher.encoder, theirs)):
            scores, queries = model.attention_scores, model.queries[layer - 1]
            if scores is None or scores[layer - 1] is None or queries.dtype != jnp.float32:
                return None
            kept.append((scores[layer - 1], queries.shape[-1]))
        (student, student_dim), (teacher, teacher_dim) = kept
        mask = c.batch.attention_mask
        reads = reads_attention_scores(
            mask.shape[1], student_dim, teacher_dim, packed=mask.dtype != bool
        )
        return (student, teacher) if reads and self.keeps_heads else None

    def check_fit(self, student: Sizes, teacher: Sizes) -> None:
        sides = {"student": side_of(student, self.side), "teacher": side_of(teacher, self.side)}
        if not self.heads:
            self._check_heads(sides["student"], sides["teacher"])
        super().check_fit(student, teacher)
        check_divides(self.heads, sides)

    def _check_heads(self, student: Sizes, teacher: Sizes) -> None:
        """Raises ValueError where heads, all or the map's, cannot be compared one by one."""
        ours, theirs = student.num_attention_heads, teacher.num_attention_heads
        if self.head_map is None and ours != theirs:
            raise ValueError(
                f"attention heads: expected as many in both, got {ours} for the student and "
                f"{theirs} for the teacher; give it num_attention_heads {theirs} (with a "
                "hidden_size that is a multiple of it), or the term heads or a head_map"
            )
        for one, other in self.head_map or ():
            if one > ours or other > theirs:
                raise ValueError(
                    f"head_map: expected pairs of a student's head from 1 to {ours} and a "
                    f"teacher's from 1 to {theirs}, got {[one, other]}; leave that pair out"
                )

    def teacher_taps(self, student: Sizes, teacher: Sizes, row: Row) -> list[Tap]:
        pairs = self.pairs_of(student, teacher)
        kinds = ("maps",) if self.reads_maps(student, teacher, row) else ("queries", "keys")
        return [Tap(kind, theirs, self.side) for kind in kinds for _, theirs in pairs]

    def num_map_entries(self, student: Sizes, teacher: Sizes, row: Row) -> int:
        from tinybert_jax.losses.attention import builds_score_maps

        sides = [side_of(sizes, self.side) for sizes in (student, teacher)]
        dims = (own.hidden_size // (self.heads or own.num_attention_heads) for own in sides)
        builds = self.side != "encoder" or builds_score_maps(row.width, *dims, packed=row.is_packed)
        if not builds and not self.reads_maps(student, teacher, row):
            return 0
        num_heads = len(self.head_map or ()) or self.heads or sides[0].num_attention_heads
        num_pairs = len(self.pairs_of(student, teacher))
        return num_pairs * num_heads * row.width**2

    def reads_maps(self, student: Sizes, teacher: Sizes, row: Row) -> bool:
        """Whether the loss reads the maps that both models' attention builds, on a CPU."""
        from tinybert_jax.losses.attention import reads_attention_scores

        dims = (m.hidden_size // m.num_attention_heads for m in (student, teacher))
        can_read = row.keeps_maps and self.keeps_heads and self.side == "encoder"
        return can_read and reads_attention_scores(row.width, *dims, packed=row.is_packed)
