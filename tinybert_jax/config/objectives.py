"""The settings of distillation: which terms each stage minimises. Presets are lists of terms."""

import functools
from importlib import resources
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from tinybert_jax.config.models import FurtherTeacherSection
from tinybert_jax.config.stages import DISTILL_STAGES
from tinybert_jax.settings.section import Probability, Section
from tinybert_jax.terms.table import Terms, reads_of


class DistillSection(Section):
    """What the stages general, intermediate and prediction minimise: a preset's terms, or own."""

    preset: Literal["tinybert", "minilmv2", "distilbert", "pkd"] = "tinybert"
    general: Terms = Field(
        default=(), description="default: the preset's terms; so are those of the next two"
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
        return {**{stage.name: stages.get(stage.name, []) for stage in DISTILL_STAGES}, **own}

    @model_validator(mode="after")
    def _terms_fit_their_stage(self) -> "DistillSection":
        mistakes = [
            f"{stage.name}: expected no {term.name}, a term of "
            f"{'general' if term.reads.words else 'prediction'}: move it there"
            for stage in DISTILL_STAGES
            for term in self.terms(stage.name)
            if (term.reads.words and not stage.reads_corpus)
            or (term.reads.task_logits and not stage.trains_head)
        ]
        if self.mask_rate == 0 and any(t.predicts_masked for t in self.terms("general")):
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
        predicts = reads_of(self.terms("general")).words
        return (0.15 if predicts else 0.0) if self.mask_rate is None else self.mask_rate


@functools.cache
def _presets() -> dict[str, dict[str, list[dict[str, Any]]]]:
    text = (
        resources.files("tinybert_jax.config")
        .joinpath("objectives.yaml")
        .read_text(encoding="utf-8")
    )
    return yaml.safe_load(text)
