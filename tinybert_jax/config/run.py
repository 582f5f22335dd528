"""A whole run: all sections together, and what they say of each stage.

Code holds defaults, YAML holds choices. Imports no JAX: `--help` and launchers stay instant.
"""

from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from tinybert_jax.config.compute import ComputeSection, MeshSection
from tinybert_jax.config.consistency import missing_needs
from tinybert_jax.config.data import CorpusSection, TokenizerSection
from tinybert_jax.config.models import SOLE, StudentSection, TeacherSection
from tinybert_jax.config.objectives import DistillSection
from tinybert_jax.config.stages import (
    STAGE_NAMES,
    STAGES,
    CorpusStageSection,
    FinetuneSection,
    Masking,
    PretrainSection,
    Stage,
    StageSection,
    SupervisedSection,
)
from tinybert_jax.config.tasks import AnyTask
from tinybert_jax.settings.section import PositiveInt, Section
from tinybert_jax.terms.table import Terms, reads_of, without_task_logits
from tinybert_jax.terms.words import MaskedLMTerm


class StagePlan(NamedTuple):
    """One stage of a run and the settings that it reads."""

    stage: Stage
    section: Any  # the StageSection of that stage
    seeds: tuple[int, ...]  # of each model that the stage trains
    members: tuple[str, ...]  # names of the models; `SOLE` for one that stands alone
    terms: Terms = ()  # pretrain's masked LM counts as one
    keeps_logits: bool = False  # the teachers' logits are made before the first step
    masking: Masking | None = None  # of the input

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def step_terms(self) -> Terms:
        """The terms for which a step runs the models."""
        return without_task_logits(self.terms) if self.keeps_logits else self.terms

    @property
    def reads_teacher(self) -> bool:
        """Whether a term reads a teacher, in the steps or before them."""
        return reads_of(self.terms).teacher


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
    task: AnyTask | None = None
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
    def stages(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in STAGES if getattr(self, stage.name) is not None)

    @property
    def plans(self) -> dict[str, StagePlan]:
        """The plan of each stage that the run has, by name."""
        return {stage.name: self._plan(stage) for stage in self.stages}

    def reads_teacher(self, stage: Stage, stages: tuple[Stage, ...] | None = None) -> bool:
        """Whether this stage reads a teacher: for a term, or to start students from it.

        Students start in the first of `stages` that distils.
        """
        first = next((own for own in stages or self.stages if own.distils), None)
        starts = any(own.init != "random" for own in self.students_by_name.values())
        return self.terms_read_teacher(stage) or (starts and stage == first)

    def terms_read_teacher(self, stage: Stage) -> bool:
        """Whether the run has this stage, and a term of it reads a teacher."""
        is_there = stage.distils and stage in self.stages
        return is_there and reads_of(self.distillation.terms(stage.name)).teacher

    @property
    def students_by_name(self) -> dict[str, StudentSection]:
        """The students by name; a single one is `SOLE`."""
        return self.students or ({SOLE: self.student} if self.student else {})

    def seeds(self, stage: Stage) -> tuple[int, ...]:
        """The seed of each model that a stage trains."""
        section = getattr(self, stage.name)
        own = section.num_seeds if isinstance(section, FinetuneSection) else 1
        number = self.num_seeds if stage.role == "student" else own
        return tuple(range(self.seed, self.seed + number))

    def keeps_logits(self, stage: Stage) -> bool:
        """Whether the teachers' logits of the stage's text are made before its first step."""
        section = getattr(self, stage.name)
        if not (stage.distils and stage.trains_head and section):
            return False
        terms, chosen = self.distillation.terms(stage.name), self.distillation.keep_logits
        others = without_task_logits(terms)
        if len(others) == len(terms):
            return False
        if self.distillation.further_teachers or chosen is not None:
            return chosen is not False
        return (section.num_epochs or 0) > 1 and not reads_of(others).teacher

    def _plan(self, stage: Stage) -> StagePlan:
        section = getattr(self, stage.name)
        masking = section.masking if isinstance(section, PretrainSection) else None
        terms: Terms = (MaskedLMTerm(term="masked_lm"),) if masking else ()
        if stage.distils:
            terms = self.distillation.terms(stage.name)
            rate = self.distillation.general_mask_rate if stage.reads_corpus else 0.0
            masking = Masking(rate) if rate else None
        members = (SOLE,) if stage.role == "teacher" else tuple(self.students_by_name)
        keeps_logits = self.keeps_logits(stage)
        return StagePlan(stage, section, self.seeds(stage), members, terms, keeps_logits, masking)

    @model_validator(mode="after")
    def _stages_have_what_they_need(self) -> "RunConfig":
        mistakes = list(missing_needs(self))
        if not self.stages:
            mistakes.insert(0, f"expected at least one stage of {list(STAGE_NAMES)}, got none")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self
