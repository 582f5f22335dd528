"""What every distillation term is: a section of settings that knows its loss and its needs.

Settings load without JAX, so a term imports its losses inside `make_loss`.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import Field

from tinybert_jax.settings.layer_maps import LayerMap, LayerPairs, make_layer_pairs
from tinybert_jax.settings.section import NonNegative, Positive, Section
from tinybert_jax.settings.sizes import Side, Sizes, side_of


class Ramp(Section):
    """A number that goes in a straight line from the stage's first step to its last."""

    start: NonNegative = Field(description="value at the first step")
    end: NonNegative = Field(description="value at the last step")


class PositiveRamp(Ramp):
    start: Positive = Field(description="value at the first step")
    end: Positive = Field(description="value at the last step")


class Reads(NamedTuple):
    """The outputs of the two models that a term reads."""

    encoder: bool = False  # an EncoderOutput: hidden states, queries, keys, values
    task_logits: bool = False
    words: bool = False  # the factors of masked-LM logits
    teacher: bool = True  # or the student's outputs and labels alone
    projection: bool = False  # the student's hidden states at the teacher's width
    pooled: bool = False  # the pooled first tokens, in `encoder`, which has to be read too


class Tap(NamedTuple):
    """An array that a term reads of one layer of the teacher."""

    kind: Literal["queries", "keys", "values", "hidden", "embedding", "maps"]
    layer: int  # from 1; 0 for the embeddings
    side: Side = "encoder"


class Row(NamedTuple):
    """The layout of a row of tokens, as far as the cost of attention maps depends on it."""

    width: int
    is_packed: bool
    keeps_maps: bool  # whether unrolled fp32 models hand out their own score maps


@runtime_checkable
class Context(Protocol):
    """One microbatch as the loss of a term sees it; `objectives.distillation` makes it."""

    student: Any  # Outputs; `encoder` has the layers of the term's side
    teacher: Any  # Outputs
    batch: Any  # Batch; its tokens are those of the side
    counts: Any  # Counts: the denominators of the whole batch
    options: Any  # Options
    pairs: Any  # bool [batch, query, key]: token pairs of a decoder's attention; None: the batch's

    def form(self) -> Any:
        """losses.forms.Form: the losses that fit the logits of the task."""
        ...

    def number(self, value: float | Ramp) -> Any:
        """A weight or temperature at the present step."""
        ...

    def projected(self, entry: int) -> Any:
        """One hidden entry of the student at the teacher's width [batch, seq, teacher_dim]."""
        ...

    def projected_vectors(self, vectors: Any) -> Any:
        """Sentence vectors of the student at the teacher's width [examples, teacher_dim]."""
        ...

    def score_distance(self, *taps: Any) -> Any:
        """The `losses.attention.Distance` of such queries and keys where a kernel can run."""
        ...

    def first_tokens(self, hidden: Any) -> Any:
        """The hidden state of the first token of each example [examples, dim]."""
        ...

    def units(self) -> tuple[Any, Any]:
        """The task's labels [units, …] and weights [units] of this microbatch."""
        ...

    def word_factors(self, outputs: Any, *, masked: bool) -> tuple[Any, Any, Any]:
        """hidden [rows, dim], table [vocab, dim], bias [vocab], at masked tokens or at all."""
        ...


Loss = Callable[[Any], Any]  # Context -> fp32 scalar


class Term(Section):
    """Base of all terms. A subclass names itself in `term` and overrides what it needs."""

    reads: ClassVar[Reads]
    metric: ClassVar[str | None] = None  # of its loss, where it is not the term's name
    needs_labels: ClassVar[bool] = False  # such a term is refused with task.unlabelled
    needs_examples: ClassVar[bool] = False  # such a term is refused with corpus.stores
    needs_embeddings: ClassVar[bool] = False  # it reads sentence vectors as the task's logits
    needs_partners: ClassVar[bool] = False  # it reads pairs or triplets of texts
    couples_examples: ClassVar[bool] = False  # such a term is refused with gradient accumulation
    projects_vectors: ClassVar[bool] = False  # it needs a projection where the widths differ

    weight: NonNegative | Ramp = Field(
        default=1.0, description="weight of the term in the sum; 0 leaves it out"
    )

    @property
    def name(self) -> str:
        return getattr(self, "term")  # noqa: B009 - declared by each subclass

    @property
    def read_side(self) -> Side:
        """The layers that the term compares."""
        return getattr(self, "side", "encoder")

    @property
    def counts(self) -> bool:
        """Whether the weight is ever above 0."""
        if isinstance(self.weight, Ramp):
            return self.weight.start > 0 or self.weight.end > 0
        return self.weight > 0

    @property
    def mean_over(self) -> Literal["units", "tokens", "positions"]:
        """The items over which the loss is a mean, for distillation.normalisation.

        "units": examples, labels or masked tokens. "tokens": real tokens; the loss has no variant
        for paper_code. "positions": real tokens or, with paper_code, all positions.
        """
        return "units"

    @property
    def reads_every_word(self) -> bool:
        """Whether masked-LM logits are read at every token, not at the masked ones alone."""
        return False

    @property
    def predicts_masked(self) -> bool:
        """Whether the term reads masked-LM logits at masked tokens."""
        return False

    def make_loss(self, num_student: int, num_teacher: int) -> Loss:
        """The loss between models of so many layers."""
        raise NotImplementedError

    def check_fit(self, student: Sizes, teacher: Sizes) -> None:
        """Raises ValueError where the term cannot compare models of these sizes."""

    def projected_entries(self, student: Sizes, teacher: Sizes) -> list[int]:
        """The student's hidden entry of each projection; 0 is the embeddings."""
        return []

    def teacher_taps(self, student: Sizes, teacher: Sizes, row: Row) -> list[Tap]:
        """The arrays of the teacher that the loss reads."""
        return []

    def num_map_entries(self, student: Sizes, teacher: Sizes, row: Row) -> int:
        """Entries of [query, key] maps that the loss builds of one row."""
        return 0


class LayerTerm(Term):
    layer_map: LayerMap = Field(
        "uniform",
        description="which of the teacher's layers: uniform, top, bottom, last (of both only the "
        "last), skip (uniform but for the last), one for each of the student's, or [student's, "
        "teacher's] pairs; all from 1",
    )

    def pairs(self, num_student: int, num_teacher: int) -> LayerPairs:
        """(student's layer, teacher's layer) from 1."""
        return make_layer_pairs(self.layer_map, num_student, num_teacher)

    def pairs_of(self, student: Sizes, teacher: Sizes) -> LayerPairs:
        depths = (side_of(sizes, self.read_side).num_hidden_layers for sizes in (student, teacher))
        return self.pairs(*depths)

    def check_fit(self, student: Sizes, teacher: Sizes) -> None:
        try:
            self.pairs_of(student, teacher)
        except ValueError as error:
            raise ValueError(f"layer_map: {error}") from None

    def sum_over_layers(
        self, num_student: int, num_teacher: int, one: Callable[[Any, int, int], Any]
    ) -> Loss:
        """Σ of `one(context, student's layer, teacher's layer)` over the layer map."""
        import jax.numpy as jnp

        pairs = self.pairs(num_student, num_teacher)
        return lambda context: jnp.stack([one(context, i, j) for i, j in pairs]).sum()


def check_divides(heads: int | None, models: Mapping[str, Sizes]) -> None:
    """Raises ValueError where `heads` relation heads do not divide the width of a model."""
    for role, model in models.items():
        if heads and model.hidden_size % heads:
            raise ValueError(
                f"expected heads that divide the {role}'s hidden_size {model.hidden_size}, got "
                f"{heads}; choose a divisor of both widths"
            )


def check_equal_widths(student: Sizes, teacher: Sizes) -> None:
    """Raises ValueError where hidden states cannot be compared without a projection."""
    if student.hidden_size != teacher.hidden_size:
        raise ValueError(
            f"expected a student as wide as its teacher, got hidden_size {student.hidden_size} and "
            f"{teacher.hidden_size}; make the student as wide, or use the term hidden, "
            "which compares hidden states through a projection"
        )
