"""The settings of the models of a run: sizes, teachers and students."""

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from tinybert_jax.settings.section import Positive, PositiveInt, Probability, Section
from tinybert_jax.settings.sizes import PRESETS, Sizes


class FurtherTeacherSection(Section):
    """Another fine-tuned teacher: same task, labels and vocabulary, any size."""

    path: str = Field(description="a fine-tuned Hugging Face folder or hub id")
    weight: Positive = Field(
        1.0, description="weight in the mean of logits; that of `teacher` is 1"
    )


class ModelSection(Section):
    """An encoder: from a Hugging Face folder or hub id (`path`), or new from sizes."""

    path: str | None = Field(None, description="a Hugging Face folder or hub id")
    model_type: str | None = Field(
        None, description="the family of a new model; default: the teacher's, or BERT"
    )
    preset: Literal[tuple(PRESETS)] | None = Field(  # type: ignore[valid-type]
        None, description="the name of known sizes; a size that is given replaces its own"
    )
    hidden_size: PositiveInt | None = Field(None, description="width of the hidden states")
    num_hidden_layers: PositiveInt | None = Field(None, description="number of layers")
    num_decoder_layers: PositiveInt | None = Field(
        None,
        description="for translation: number of layers of the decoder, whose other sizes are the "
        "encoder's; default: as many as the encoder has",
    )
    num_attention_heads: PositiveInt | None = Field(
        None, description="number of attention heads; hidden_size has to be a multiple"
    )
    intermediate_size: PositiveInt | None = Field(
        None, description="width inside the feed-forward part of a layer"
    )
    max_position_embeddings: PositiveInt | None = Field(
        None, description="longest row in tokens; default: 512"
    )
    hidden_dropout_prob: Probability | None = Field(
        None, description="dropout of hidden states; default: 0.1; a stage may override it"
    )
    attention_probs_dropout_prob: Probability | None = Field(
        None, description="the same for attention probabilities"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSection":
        sizes = [name for name in _SIZE_FIELDS if getattr(self, name) is not None]
        given = [name for name in ("model_type", "preset") if getattr(self, name)]
        if self.path and (given or sizes):
            raise ValueError(
                f"expected either path or sizes, got path '{self.path}' together with "
                f"{[*given, *sizes]}: a folder has sizes already; remove one of the two"
            )
        missing = [name for name in _SIZE_FIELDS[:4] if name not in sizes]
        if self.preset and not missing:
            raise ValueError(
                f"expected a preset or all sizes, got preset {self.preset} together with "
                f"{list(_SIZE_FIELDS[:4])}, which override all of it; set those to null, or "
                f"override the whole section: {{preset: {self.preset}}}"
            )
        if not self.path and not self.preset and missing:
            raise ValueError(f"expected a path, a preset or all sizes, got no {missing}; set them")
        return self

    def sizes(self) -> dict[str, Any]:
        """Fields of `ModelConfig` for a new model: given sizes, then those of the preset."""
        explicit = self.model_dump(
            exclude_none=True,
            exclude={"path", "preset", "init", "init_layers", "finetuned", "num_decoder_layers"},
        )
        return {**(PRESETS[self.preset] if self.preset else {}), **explicit}


_SIZE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


class TeacherSection(ModelSection):
    """The teacher: an encoder, and optionally its fine-tuned model."""

    finetuned: str | None = Field(
        None, description="a fine-tuned folder of the same model; instead of a finetune section"
    )


class StudentSection(ModelSection):
    """A student: an encoder, and the weights that it starts from."""

    init: Literal["random", "teacher_embeddings", "teacher_layers", "teacher_reduced"] = Field(
        "random",
        description="teacher_embeddings: the embedding tables of the first stage's teacher, "
        "projected on the principal directions of its word embeddings; teacher_layers: the "
        "embeddings and the layers init_layers of that teacher (DistilBERT, arXiv 1910.01108); "
        "teacher_reduced: the same in fewer dimensions, for a narrower student",
    )
    init_layers: Literal["uniform", "top", "bottom"] | tuple[PositiveInt, ...] = Field(
        "uniform",
        description="for teacher_layers and teacher_reduced: evenly spaced, the last, the first, "
        "or a list of layers",
    )

    @model_validator(mode="after")
    def _one_start(self) -> "StudentSection":
        if self.init_layers != "uniform" and self.init in ("random", "teacher_embeddings"):
            raise ValueError(
                f"init_layers: expected with init teacher_layers or teacher_reduced, got init "
                f"{self.init}; set init to one of them, or remove init_layers"
            )
        if self.path and self.init != "random":
            raise ValueError(
                f"expected path or init: {self.init}, got both: a student from path "
                f"'{self.path}' starts from the folder's weights; remove one of them"
            )
        return self


SOLE = ""  # the name of a student under `student`, and of the teacher


class Student(NamedTuple):
    """A student of the run."""

    name: str  # the key under `students`, or `SOLE`
    section: StudentSection
    sizes: Sizes

    @property
    def origin(self) -> str:
        """The place of the student in the config."""
        return student_origin(self.name)


class FurtherTeacher(NamedTuple):
    """A further teacher of the run; the student learns from the mean of all logits."""

    number: int  # index in `distillation.further_teachers`
    section: FurtherTeacherSection
    sizes: Sizes

    @property
    def origin(self) -> str:
        """The place of the teacher in the config."""
        return further_origin(self.number)


def further_origin(number: int) -> str:
    """The place in the config of the further teacher with index `number`."""
    return f"distillation.further_teachers.{number}"


def student_origin(name: str) -> str:
    """The place in the config of the student `name`."""
    return "student" if name == SOLE else f"students.{name}"
