"""Which models a run has: named sizes, sizes of an encoder, teachers and students."""

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from tinybert_jax.settings.section import Positive, PositiveInt, Probability, Section
from tinybert_jax.settings.sizes import PRESETS, ModelConfig


class FurtherTeacherSection(Section):
    """A classifier of the same task, labels and vocabulary, of any size."""

    path: str = Field(description="a fine-tuned Hugging Face folder or hub id")
    weight: Positive = 1.0


class ModelSection(Section):
    """Which encoder: a Hugging Face folder or hub id (`path`), or a fresh one from sizes."""

    path: str | None = None
    model_type: str | None = Field(
        None, description="the family of a fresh model; default: the teacher's, or BERT"
    )
    preset: Literal[tuple(PRESETS)] | None = None  # type: ignore[valid-type]
    hidden_size: PositiveInt | None = None
    num_hidden_layers: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    max_position_embeddings: PositiveInt | None = None
    hidden_dropout_prob: Probability | None = None
    attention_probs_dropout_prob: Probability | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSection":
        sizes = [name for name in _SIZE_FIELDS if getattr(self, name) is not None]
        fresh = [name for name in ("model_type", "preset") if getattr(self, name)]
        if self.path and (fresh or sizes):
            raise ValueError(
                f"expected either path or sizes, got path '{self.path}' together with "
                f"{[*fresh, *sizes]}: a folder brings its own sizes"
            )
        missing = [name for name in _SIZE_FIELDS[:4] if name not in sizes]
        if self.preset and not missing:
            raise ValueError(
                f"expected a preset or all sizes, got preset {self.preset} together with "
                f"{list(_SIZE_FIELDS[:4])}, which leave nothing of it; set those to null, or give "
                f"the preset alone: {{preset: {self.preset}}}"
            )
        if not self.path and not self.preset and missing:
            raise ValueError(f"expected a path, a preset or all sizes; missing {missing}")
        return self

    def sizes(self) -> dict[str, Any]:
        """Fields for `ModelConfig` of a fresh model: preset first, explicit values over it."""
        explicit = self.model_dump(
            exclude_none=True, exclude={"path", "preset", "init", "init_layers", "finetuned"}
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
    finetuned: str | None = Field(
        None, description="a folder of the same model that knows the task; instead of finetune"
    )


class StudentSection(ModelSection):
    init: Literal["random", "teacher_embeddings", "teacher_layers"] = Field(
        "random",
        description="teacher_embeddings: the tables of the first stage's teacher, projected on the "
        "principal directions of its words; teacher_layers: its encoder, with init_layers of its "
        "layers (DistilBERT, arXiv 1910.01108)",
    )
    init_layers: Literal["uniform", "top", "bottom"] | tuple[PositiveInt, ...] = Field(
        "uniform", description="of teacher_layers: evenly spaced, the last, the first, or a list"
    )

    @model_validator(mode="after")
    def _one_start(self) -> "StudentSection":
        if self.init_layers != "uniform" and self.init != "teacher_layers":
            expected = f"init_layers: expected with init teacher_layers, got init {self.init}"
            raise ValueError(f"{expected}; set init to that, or leave init_layers out")
        if self.path and self.init != "random":
            raise ValueError(
                f"expected path or init: {self.init}, got both: a student from path "
                f"'{self.path}' starts from the folder's weights; drop one of them"
            )
        return self


SOLE = ""  # the name of a model that has no family


class Student(NamedTuple):
    """One of the models that a run distils into; the only one, or a member of a family."""

    name: str
    section: StudentSection
    sizes: ModelConfig

    @property
    def origin(self) -> str:
        return student_origin(self.name)


class FurtherTeacher(NamedTuple):
    """One whose logits join the teacher's."""

    number: int
    section: FurtherTeacherSection
    sizes: ModelConfig

    @property
    def origin(self) -> str:
        return further_origin(self.number)


def further_origin(number: int) -> str:
    """Where the config has the further teacher of that number."""
    return f"distillation.further_teachers.{number}"


def student_origin(name: str) -> str:
    """Where the config has the student of that name."""
    return "student" if name == SOLE else f"students.{name}"
