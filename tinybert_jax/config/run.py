"""The sections of a run configuration: every field, its default and what it may be.

Code holds defaults, YAML holds choices. Imports no JAX: `--help` and launchers stay instant.
"""

from typing import Annotated

from pydantic import Field, model_validator

from tinybert_jax.config.compute import ComputeSection, MeshSection
from tinybert_jax.config.consistency import missing_needs
from tinybert_jax.config.data import CorpusSection, TokenizerSection
from tinybert_jax.config.models import (
    SOLE,
    StudentSection,
    TeacherSection,
)
from tinybert_jax.config.objectives import (
    DISTILL_STAGES,
    DistillSection,
    Terms,
    teaches,
    without_logits,
)
from tinybert_jax.config.stages import (
    STAGES,
    TEACHER_STAGES,
    CorpusStageSection,
    FinetuneSection,
    PretrainSection,
    StageSection,
    SupervisedSection,
)
from tinybert_jax.config.tasks import TaskSection
from tinybert_jax.settings.section import PositiveInt, Section


class RunConfig(Section):
    """A whole run. A stage is run when its section is there, in the order of `STAGES`.

    pretrain: masked LM of the teacher; finetune: the teacher on the task; general, intermediate,
    prediction: TinyBERT's three distillation steps; baseline: the same student without a teacher.
    """

    name: str = "run"
    run_dir: str
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    num_seeds: PositiveInt = Field(
        1,
        description="students of each size that are trained side by side, from seeds seed, "
        "seed + 1, …, in the same batches: they share the teacher's passes; the best by dev score "
        "is exported",
    )
    teacher: TeacherSection
    student: StudentSection | None = None
    students: Annotated[dict[str, StudentSection], Field(min_length=1)] | None = Field(
        None,
        description="instead of student: several by name, trained side by side in the same batches "
        "with one pass of the teacher; each is exported to hf/<name>",
    )
    tokenizer: TokenizerSection = TokenizerSection()
    corpus: CorpusSection | None = None
    task: TaskSection | None = None
    distillation: DistillSection = Field(default_factory=lambda: DistillSection())
    mesh: MeshSection = MeshSection()
    compute: ComputeSection = ComputeSection()
    pretrain: PretrainSection | None = None
    finetune: FinetuneSection | None = None
    general: CorpusStageSection | None = None
    intermediate: StageSection | None = None
    prediction: StageSection | None = None
    baseline: SupervisedSection | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(name for name in STAGES if getattr(self, name) is not None)

    def teaches(self, stage: str) -> bool:
        """Whether the config has this distillation stage, and a term of it reads a teacher."""
        return getattr(self, stage) is not None and teaches(self.distillation.terms(stage))

    def makes_logits_first(self, stage: str) -> bool:
        """Whether the teachers' logits of the stage's text are made before its first step."""
        if stage != "prediction" or self.prediction is None:
            return False
        terms, chosen = self.distillation.terms(stage), self.distillation.keep_logits
        others = without_logits(terms)
        if len(others) == len(terms):
            return False
        if self.distillation.further_teachers or chosen is not None:
            return chosen is not False
        return (self.prediction.num_epochs or 0) > 1 and not teaches(others)

    def step_terms(self, stage: str) -> Terms:
        """The terms of a distillation stage for which a step needs the teacher, or none."""
        terms = self.distillation.terms(stage)
        return without_logits(terms) if self.makes_logits_first(stage) else terms

    def reads_teacher(self, stage: str, stages: tuple[str, ...] | None = None) -> bool:
        """Whether this distillation stage reads a teacher; to start, the first of `stages` does."""
        starts = any(own.init != "random" for own in self.family.values())
        first = next((name for name in DISTILL_STAGES if name in (stages or self.stages)), None)
        return self.teaches(stage) or (starts and stage == first)

    @property
    def family(self) -> dict[str, StudentSection]:
        """The students by name; a single one is `SOLE`."""
        return self.students or ({SOLE: self.student} if self.student else {})

    def members(self, stage: str) -> tuple[str, ...]:
        """The names of what a stage trains, each with all its seeds."""
        return (SOLE,) if stage in TEACHER_STAGES else tuple(self.family)

    def seeds(self, stage: str) -> tuple[int, ...]:
        """The seed of each model that a stage trains; one teacher is pretrained."""
        teachers = {"pretrain": 1, "finetune": self.finetune.num_seeds if self.finetune else 1}
        return tuple(range(self.seed, self.seed + teachers.get(stage, self.num_seeds)))

    @model_validator(mode="after")
    def _stages_have_what_they_need(self) -> "RunConfig":
        mistakes = list(missing_needs(self))
        if not self.stages:
            mistakes.insert(0, f"expected at least one stage of {list(STAGES)}, got none")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self
