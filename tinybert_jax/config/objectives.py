"""What a student is asked to match: an objective is a list of terms, and presets are such lists."""

import functools
import typing
from importlib import resources
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from tinybert_jax.config.models import FurtherTeacherSection
from tinybert_jax.settings.layer_maps import LayerMap
from tinybert_jax.settings.section import NonNegative, Positive, PositiveInt, Probability, Section


class Ramp(Section):
    """A number that goes in a straight line from the stage's first step to its last."""

    start: NonNegative
    end: NonNegative


class PositiveRamp(Ramp):
    start: Positive
    end: Positive


class Term(Section):
    weight: NonNegative | Ramp = 1.0

    @property
    def counts(self) -> bool:
        """Whether its weight is ever above 0."""
        if isinstance(self.weight, Ramp):
            return self.weight.start > 0 or self.weight.end > 0
        return self.weight > 0


class LayerTerm(Term):
    layer_map: LayerMap = Field(
        "uniform",
        description="which of the teacher's layers: uniform, top, bottom, last (of both only the "
        "last), skip (uniform but for the last), one for each of the student's, or [student's, "
        "teacher's] pairs; all from 1",
    )


class AttentionTerm(LayerTerm):
    """Scores QKᵀ/√d before softmax (arXiv 1909.10351, equation 7)."""

    term: Literal["attention"]
    heads: PositiveInt | None = Field(
        None, description="both models' queries and keys regrouped into so many; default: as it is"
    )
    head_map: Annotated[tuple[tuple[PositiveInt, PositiveInt], ...], Field(min_length=1)] | None = (
        Field(None, description="[student's, teacher's] pairs of heads, from 1; default: all alike")
    )

    @property
    def keeps_heads(self) -> bool:
        """Whether both models' heads are compared one by one, as they are."""
        return self.heads is None and self.head_map is None

    @model_validator(mode="after")
    def _heads_are_given_once(self) -> "AttentionTerm":
        if self.heads and self.head_map:
            raise ValueError(
                f"expected heads or head_map, got heads {self.heads} and head_map "
                f"{[list(pair) for pair in self.head_map]}; leave one of them out"
            )
        return self


class HiddenTerm(LayerTerm):
    """Hidden states through the projection (equation 8)."""

    term: Literal["hidden"]


class EmbeddingTerm(Term):
    """The embedding layer's output through the projection (equation 9)."""

    term: Literal["embedding"]


class RelationTerm(LayerTerm):
    """KL of softmaxed relations of queries, keys and values (MiniLMv2, arXiv 2012.15828)."""

    term: Literal["relation"]
    layer_map: LayerMap = "last"
    of: Annotated[tuple[Literal["queries", "keys", "values"], ...], Field(min_length=1)] = (
        "queries",
        "keys",
        "values",
    )
    heads: PositiveInt = Field(48, description="relation heads: both models are regrouped")


class ClsTerm(LayerTerm):
    """Normalised hidden states of the first token (PKD, arXiv 1908.09355, equation 7).

    As in its code the mean over width and layers, and without the last layer.
    """

    term: Literal["cls"]
    layer_map: LayerMap = "skip"


class CosineTerm(Term):
    """1 − cosine of the last hidden states (DistilBERT, arXiv 1910.01108)."""

    term: Literal["cosine"]


class LogitsTerm(Term):
    """The teacher's logits (arXiv 1909.10351, equation 10); numbers of a regression by MSE."""

    term: Literal["logits"]
    form: Literal["cross_entropy", "kl"] = "cross_entropy"
    temperature: Positive | PositiveRamp = 1.0
    times_squared_temperature: bool = Field(
        False, description="as Hinton et al. do, so that the gradient keeps its size"
    )
    reduction: Literal["sum", "mean_classes"] = "sum"


class LabelTerm(Term):
    """The gold labels."""

    term: Literal["label"]
    label_smoothing: Probability = 0.0


class MaskedLMTerm(Term):
    """The student's own masked LM, on the corpus."""

    term: Literal["masked_lm"]


class WordLogitsTerm(Term):
    """KL of the masked-LM logits (DistilBERT), on the corpus."""

    term: Literal["word_logits"]
    at: Literal["real", "masked"] = Field("real", description="all tokens, or the masked ones")
    temperature: Positive | PositiveRamp = 1.0
    times_squared_temperature: bool = True


AnyTerm = Annotated[
    AttentionTerm
    | HiddenTerm
    | EmbeddingTerm
    | RelationTerm
    | ClsTerm
    | CosineTerm
    | LogitsTerm
    | LabelTerm
    | MaskedLMTerm
    | WordLogitsTerm,
    Field(discriminator="term"),
]
Terms = tuple[AnyTerm, ...]
TERM_NAMES = tuple(
    typing.get_args(term.model_fields["term"].annotation)[0]
    for term in typing.get_args(typing.get_args(AnyTerm)[0])
)

# What a term reads beyond the encoder.
OF_WORDS = ("masked_lm", "word_logits")
OF_EXAMPLES = ("logits", "label")
OF_STUDENT = ("label", "masked_lm")  # without the teacher
# The stages that distil, in their order.
DISTILL_STAGES = ("general", "intermediate", "prediction")


class DistillSection(Section):
    """What the stages general, intermediate and prediction minimise: a preset's terms, or own."""

    preset: Literal["tinybert", "minilmv2", "distilbert", "pkd"] = "tinybert"
    general: Terms = Field(
        default=(), description="default: the preset's terms, as of the next two"
    )
    intermediate: Terms = ()
    prediction: Terms = ()
    projection: Literal["shared", "per_layer"] = "shared"
    normalisation: Literal["valid_only", "paper_code"] = "valid_only"
    mask_rate: Probability | None = Field(
        default=None,
        description="of general's input; default: 0.15 where a term predicts words, else 0",
    )
    teacher_margin: Annotated[float, Field(ge=-1, le=1)] = Field(
        default=0.02,
        description="how far above the majority class a teacher has to score on dev; -1: any will "
        "do. It may change when a run goes on",
    )
    keep_logits: bool | None = Field(
        default=None,
        description="prediction: the teacher goes through the text once, before the first step, "
        "and its logits are kept in the run folder; default: where it has num_epochs above 1 and "
        "no term reads more of the teacher",
    )
    further_teachers: tuple[FurtherTeacherSection, ...] = Field(
        default=(),
        description="prediction learns from the weighted mean of all teachers' logits, kept; the "
        "teacher's own weight is 1, and other terms read it alone",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_preset(cls, given: Any) -> Any:
        """So that a run's config says what it minimises, whatever becomes of the presets."""
        if not isinstance(given, dict):
            return given
        stages = _presets().get(given.get("preset", "tinybert"), {})
        own = {name: terms for name, terms in given.items() if terms is not None}
        return {**{name: stages.get(name, []) for name in DISTILL_STAGES}, **own}

    @model_validator(mode="after")
    def _terms_fit_their_stage(self) -> "DistillSection":
        foreign = {
            "general": OF_EXAMPLES,
            "intermediate": (*OF_EXAMPLES, *OF_WORDS),
            "prediction": OF_WORDS,
        }
        mistakes = [
            f"{stage}: expected no {term.term}, a term of "
            f"{'general' if term.term in OF_WORDS else 'prediction'}: move it there"
            for stage in DISTILL_STAGES
            for term in self.terms(stage)
            if term.term in foreign[stage]
        ]
        if self.mask_rate == 0 and any(_reads_masked(t) for t in self.terms("general")):
            mistakes.append(
                "mask_rate: expected more than 0 for terms that predict masked words, got 0; "
                "leave it out for 0.15"
            )
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def terms(self, stage: str) -> Terms:
        """Those that count: a term of weight 0 is as good as absent."""
        return tuple(term for term in getattr(self, stage) if term.counts)

    @property
    def general_mask_rate(self) -> float:
        predicts = any(term.term in OF_WORDS for term in self.terms("general"))
        return (0.15 if predicts else 0.0) if self.mask_rate is None else self.mask_rate


def _reads_masked(term: Term) -> bool:
    return (
        isinstance(term, MaskedLMTerm) or isinstance(term, WordLogitsTerm) and term.at == "masked"
    )


def teaches(terms: Terms) -> bool:
    """Whether any term reads a teacher."""
    return any(term.term not in OF_STUDENT for term in terms)


def without_logits(terms: Terms) -> Terms:
    """What reads a teacher in the step where its logits are known beforehand, or no teacher."""
    return tuple(term for term in terms if term.term != "logits")


def model_kind(terms: Terms, *, of_teacher: bool = False) -> str:
    """Which model the terms need: encoder, classifier or masked_lm."""
    names = {term.term for term in terms}
    if of_teacher:
        names -= set(OF_STUDENT)
    if names & set(OF_WORDS):
        return "masked_lm"
    return "classifier" if names & set(OF_EXAMPLES) else "encoder"


def reads_taps(terms: Terms) -> bool:
    """Whether any term reads more of a model than its logits."""
    return any(term.term not in (*OF_WORDS, *OF_EXAMPLES) for term in terms)


def needs_projection(terms: Terms) -> bool:
    return any(term.term in ("hidden", "embedding") for term in terms)


def reads_all_words(terms: Terms) -> bool:
    """Whether masked-LM logits are wanted at every token, not at the masked ones alone."""
    return any(isinstance(term, WordLogitsTerm) and term.at == "real" for term in terms)


@functools.cache
def _presets() -> dict[str, dict[str, list[dict[str, Any]]]]:
    text = (
        resources.files("tinybert_jax.config")
        .joinpath("objectives.yaml")
        .read_text(encoding="utf-8")
    )
    return yaml.safe_load(text)
