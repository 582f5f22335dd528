"""The config of a whole run, and the plan of each stage that follows from it.

The code holds the defaults, a YAML file the choices. Imports no JAX, so that `--help` is fast.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from tinybert_jax.config.compute import ComputeSection, MeshSection
from tinybert_jax.config.consistency import consistency_errors
from tinybert_jax.config.data import CorpusSection, TokenizerSection
from tinybert_jax.config.distillation import DistillSection
from tinybert_jax.config.log import LogSection
from tinybert_jax.config.models import SOLE, StudentSection, TeacherSection
from tinybert_jax.config.stages import (
    STAGE_NAMES,
    STAGES,
    CorpusStageSection,
    FinetuneSection,
    HeadSection,
    Masking,
    PretrainSection,
    Stage,
    SupervisedSection,
    TaskStageSection,
    UpdateSection,
)
from tinybert_jax.config.task_kinds import AnyTask
from tinybert_jax.settings.section import PositiveInt, Section
from tinybert_jax.terms.table import Terms, reads_of, without_task_logits
from tinybert_jax.terms.words import MaskedLMTerm


class StagePlan(NamedTuple):
    """One stage of a run and its settings."""

    stage: Stage
    section: Any  # the StageSection of that stage
    seeds: tuple[int, ...]  # each member is trained once per seed
    members: tuple[str, ...]  # names of the trained models; (SOLE,) for a single model
    terms: Terms = ()  # pretrain has the masked LM as its only term
    keeps_logits: bool = False  # the teachers' logits are computed before the first step
    masking: Masking | None = None  # how the input is masked; None: not masked

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def num_passes(self) -> int:
        """Passes of each trained model over a batch: two for R-Drop."""
        return 2 if getattr(self.section, "r_drop", 0) else 1

    @property
    def step_terms(self) -> Terms:
        """The terms that a step computes from the models' outputs; not those of kept logits."""
        return without_task_logits(self.terms) if self.keeps_logits else self.terms

    @property
    def reads_teacher(self) -> bool:
        """Whether a term reads a teacher, in the steps or before the first step."""
        return reads_of(self.terms).teacher


class RunConfig(Section):
    """All settings of a run. The stages that have a section run in the order of `STAGES`."""

    name: str = Field("run", description="name of the run, in the report and for trackers")
    run_dir: str = Field(description="the folder of the run")
    run_store: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="URL of fsspec, such as gs://bucket/run or s3://bucket/run, to which the run "
        "folder is copied after every save; a run whose folder is gone or older is fetched from it",
    )
    keep_checkpoints: bool = Field(
        False,
        description="whether a run keeps its checkpoints once all stages have finished; multiples "
        "of keep_every stay in any case",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="seed of all random numbers")
    num_seeds: PositiveInt = Field(
        1,
        description="number of students of each size, trained in the same batches from the seeds "
        "seed, seed + 1, …; they share the teacher's forward passes, and the one with the best "
        "score is exported; the stage update exports the mean of their weights",
    )
    teacher: TeacherSection
    student: StudentSection | None = None
    students: Annotated[dict[str, StudentSection], Field(min_length=1)] | None = Field(
        None,
        description="instead of student: several students by name, trained in the same batches "
        "with one forward pass of the teacher; each is exported to hf/<name>",
    )
    export: Literal["student", "best"] = Field(
        "student",
        description="best: of each student with and without a teacher (prediction and baseline) "
        "the one with the better score",
    )
    tokenizer: TokenizerSection = TokenizerSection()
    corpus: CorpusSection | None = None
    task: AnyTask | None = None
    distillation: DistillSection = Field(default_factory=lambda: DistillSection())
    mesh: MeshSection = MeshSection()
    compute: ComputeSection = ComputeSection()
    log: LogSection = LogSection()
    pretrain: PretrainSection | None = Field(None, description="masked LM of the teacher")
    finetune: FinetuneSection | None = Field(None, description="the teacher learns from labels")
    general: CorpusStageSection | None = Field(
        None, description="the student learns the pretrained teacher's layers, on the corpus"
    )
    intermediate: TaskStageSection | None = Field(
        None, description="the student learns the fine-tuned teacher's layers, on the task's text"
    )
    prediction: HeadSection | None = Field(
        None, description="the student learns the fine-tuned teacher's answers"
    )
    baseline: SupervisedSection | None = Field(
        None, description="the same student learns from labels alone, for comparison"
    )
    update: UpdateSection | None = Field(
        None, description="a model learns new rows and keeps the answers that it had right"
    )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that have a section, in running order."""
        return tuple(stage for stage in STAGES if getattr(self, stage.name) is not None)

    @property
    def plans(self) -> dict[str, StagePlan]:
        """The plans of `stages` by name."""
        return {stage.name: self._plan(stage) for stage in self.stages}

    def reads_teacher(self, stage: Stage, stages: tuple[Stage, ...] | None = None) -> bool:
        """Whether a stage reads a teacher's weights: for a term, or to start students from them.

        Students start in the first distillation stage of `stages` (None: of the run).
        """
        first = next((other for other in stages or self.stages if other.distils), None)
        is_copied = any(student.init != "random" for student in self.students_by_name.values())
        return self.terms_read_teacher(stage) or (is_copied and stage == first)

    def terms_read_teacher(self, stage: Stage) -> bool:
        """Whether the run has this stage and a term of the stage reads a teacher."""
        is_in_run = stage.distils and stage in self.stages
        return is_in_run and reads_of(self.distillation.terms(stage.name)).teacher

    @property
    def students_by_name(self) -> dict[str, StudentSection]:
        """The students by name; a single student has the name `SOLE`."""
        return self.students or ({SOLE: self.student} if self.student else {})

    def seeds(self, stage: Stage) -> tuple[int, ...]:
        """The seeds of a stage: every member is trained once per seed."""
        section = getattr(self, stage.name)
        num_teachers = section.num_seeds if isinstance(section, FinetuneSection) else 1
        num_seeds = self.num_seeds if stage.role == "student" else num_teachers
        return tuple(range(self.seed, self.seed + num_seeds))

    @property
    def has_several_teachers(self) -> bool:
        """Whether the prediction stage learns from the mean of several teachers' logits."""
        teaches_mean = self.finetune is not None and self.finetune.teach == "mean"
        return bool(self.distillation.further_teachers) or teaches_mean

    def keeps_logits(self, stage: Stage) -> bool:
        """Whether the teachers' logits of the stage's text are computed before its first step."""
        section = getattr(self, stage.name)
        if not (stage.distils and stage.trains_head and section):
            return False
        terms, chosen = self.distillation.terms(stage.name), self.distillation.keep_logits
        others = without_task_logits(terms)
        if len(others) == len(terms):
            return False
        if self.has_several_teachers or chosen is not None:
            return chosen is not False
        if self.task is not None and self.task.kind == "translation":
            return False  # one number for each word of the vocabulary at each token
        if section.head_init == "linear_probe":
            return True
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
    def _check_consistency(self) -> "RunConfig":
        errors = list(consistency_errors(self))
        if not self.stages:
            errors.insert(
                0, f"expected at least one stage of {list(STAGE_NAMES)}, got none; add its section"
            )
        if errors:
            raise ValueError("\n".join(errors))
        return self
