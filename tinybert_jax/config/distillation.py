"""The settings of distillation: the loss terms of each stage. A preset is a list of terms."""

import functools
from importlib import resources
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from tinybert_jax.config.models import FurtherTeacherSection
from tinybert_jax.config.stages import DISTILL_STAGES
from tinybert_jax.settings.section import PositiveInt, Probability, Section
from tinybert_jax.terms.table import Terms, reads_of


class DistillSection(Section):
    """The terms that the stages general, intermediate and prediction minimise."""

    preset: Literal["tinybert", "minilmv2", "distilbert", "pkd"] = Field(
        default="tinybert", description="the terms of all stages, as a paper has them"
    )
    general: Terms = Field(
        default=(), description="its terms; default: the preset's, also for the next two settings"
    )
    intermediate: Terms = Field(default=(), description="its terms")
    prediction: Terms = Field(default=(), description="its terms")
    projection: Literal["shared", "per_layer"] = Field(
        default="shared",
        description="the trained map from the student's width to the teacher's: one for all layers "
        "and the embeddings, or one each; it is no part of the exported model",
    )
    normalisation: Literal["valid_only", "paper_code"] = Field(
        default="valid_only",
        description="what a loss is a mean over: real tokens, or all positions, padding too, as in "
        "TinyBERT's code",
    )
    mask_rate: Probability | None = Field(
        default=None,
        description="share of masked tokens in the input of general; default: 0.15 where a term "
        "predicts words, else 0",
    )
    teacher_margin: Annotated[float, Field(ge=-1, le=1)] = Field(
        default=0.02,
        description="least difference between a teacher's score and the score of always "
        "answering the most frequent class; -1: no check. It may change when a run resumes",
    )
    keep_logits: bool | None = Field(
        default=None,
        description="prediction: the teacher runs over the text once, before the first step, and "
        "its logits are kept in the run folder; default: true with prediction.head_init: "
        "linear_probe, and where num_epochs is above 1 and no term reads other outputs",
    )
    targets: Literal["given", "teacher"] = Field(
        default="given",
        description="what prediction learns to translate to. teacher: its own translations of the "
        "sources, found once by beam search and kept in the run folder (sequence level, arXiv "
        "1606.07947)",
    )
    num_beams: PositiveInt = Field(default=4, description="of that search")
    further_teachers: tuple[FurtherTeacherSection, ...] = Field(
        default=(),
        description="prediction learns from the weighted mean of all teachers' logits, which are "
        "kept; the weight of `teacher` is 1, and the other terms read `teacher` alone",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        """Adds the preset's terms, so that a saved config does not depend on later presets."""
        if not isinstance(given, dict):
            return given
        stages = _presets().get(given.get("preset", "tinybert"), {})
        preset = {stage.name: stages.get(stage.name, []) for stage in DISTILL_STAGES}
        return {**preset, **{name: value for name, value in given.items() if value is not None}}

    @model_validator(mode="after")
    def _terms_fit_their_stage(self) -> "DistillSection":
        errors = [
            f"{stage.name}: expected no {term.name}, a term of "
            f"{'general' if term.reads.words else 'prediction'}: move it there"
            for stage in DISTILL_STAGES
            for term in self.terms(stage.name)
            if (term.reads.words and not stage.reads_corpus)
            or (term.reads.task_logits and not stage.trains_head)
        ]
        if self.mask_rate == 0 and any(t.predicts_masked for t in self.terms("general")):
            errors.append(
                "mask_rate: expected more than 0 for terms that predict masked words, got 0; "
                "leave it out for 0.15"
            )
        if errors:
            raise ValueError("\n".join(errors))
        return self

    def terms(self, stage: str) -> Terms:
        """The terms of a stage, without terms of weight 0."""
        return tuple(term for term in getattr(self, stage) if term.counts)

    @property
    def general_mask_rate(self) -> float:
        """The share of masked tokens in the input of the stage general."""
        predicts = reads_of(self.terms("general")).words
        return (0.15 if predicts else 0.0) if self.mask_rate is None else self.mask_rate


@functools.cache
def _presets() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Preset, stage -> the settings of the terms."""
    text = (
        resources.files("tinybert_jax.config").joinpath("presets.yaml").read_text(encoding="utf-8")
    )
    return yaml.safe_load(text)
