"""The sections of a run configuration: every field, its default and what it may be.

Code holds defaults, YAML holds choices. Imports no JAX: `--help` and launchers stay instant.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from tinybert_jax.compute_sections import ComputeSection, MeshSection
from tinybert_jax.fields import Positive, PositiveInt, Probability, Section
from tinybert_jax.needs import missing_needs
from tinybert_jax.objective_sections import (
    DISTILL_STAGES,
    DistillSection,
    FurtherTeacherSection,
    Terms,
    teaches,
    without_logits,
)
from tinybert_jax.presets import PRESETS
from tinybert_jax.stage_sections import (
    CorpusStageSection,
    FinetuneSection,
    PretrainSection,
    StageSection,
    SupervisedSection,
)


class ModelConfig(Section):
    """An encoder's sizes under Hugging Face's `BertConfig` names."""

    vocab_size: PositiveInt = 30522
    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    intermediate_size: PositiveInt = 3072
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"] = "gelu"
    max_position_embeddings: PositiveInt = 512
    type_vocab_size: PositiveInt = 2
    layer_norm_eps: Positive = 1e-12
    hidden_dropout_prob: Probability = 0.1
    attention_probs_dropout_prob: Probability = 0.1
    initializer_range: Positive = 0.02
    pad_token_id: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"expected hidden_size to be a multiple of num_attention_heads, "
                f"got {self.hidden_size} and {self.num_attention_heads}"
            )
        return self


class ModelSection(Section):
    """Which encoder: a Hugging Face folder or hub id (`path`), or a fresh one from sizes."""

    path: str | None = None
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
        if self.path and (self.preset or sizes):
            raise ValueError(
                f"expected either path or sizes, got path '{self.path}' together with "
                f"{[*(['preset'] if self.preset else []), *sizes]}: a folder brings its own sizes"
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


class TokenizerSection(Section):
    """The teacher's own by default; another folder's; or a WordPiece trained on the corpus."""

    path: str | None = None
    vocab_size: PositiveInt | None = None
    lowercase: bool = True


class CorpusSection(Section):
    """Plain text: .txt (blank lines part documents), .jsonl with `text`; folders and globs."""

    files: tuple[str, ...] = ()
    stores: dict[str, Positive] = Field(
        {},
        description="instead of text: folders that `tinybert data prepare` wrote, and each one's "
        "share of the rows of a batch",
    )
    heldout_store: str | None = Field(None, description="a store that pretrain is evaluated on")
    builtin: bool = False
    max_documents: PositiveInt | None = None
    heldout_share: Probability = Field(
        0.0,
        description="share of the documents, by the hash of their text, that no stage trains on: "
        "pretrain tells its perplexity on them",
    )

    @model_validator(mode="after")
    def _one_source(self) -> "CorpusSection":
        if [bool(self.files), bool(self.stores), self.builtin].count(True) != 1:
            raise ValueError("expected files, stores or builtin: true, exactly one of them")
        if self.stores and (self.max_documents or self.heldout_share):
            raise ValueError(
                "stores hold rows, not documents: remove max_documents and heldout_share (give "
                "heldout_store instead)"
            )
        if self.heldout_store and not self.stores:
            raise ValueError("heldout_store is for stores; text has heldout_share")
        if self.heldout_store in self.stores:
            raise ValueError(f"heldout_store: {self.heldout_store} is trained on; give another")
        return self


class TaskSection(Section):
    """Labelled text: .tsv, .csv, .jsonl, a saved `datasets` folder or `hub:owner/name`."""

    name: str = "task"
    builtin: bool = False
    train: str | None = None
    dev: str | None = None
    dev_share: Probability | None = Field(
        None, description="instead of dev: this share of the training rows, by the hash of the text"
    )
    train_split: str | None = None
    dev_split: str | None = None
    format: Literal["auto", "tsv", "csv", "jsonl", "datasets"] = "auto"
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    dev_columns: dict[Literal["text", "text_pair", "label"], str] = Field(
        {}, description="where dev names its columns otherwise, like {text: sentence}"
    )
    labels: dict[str, str] | tuple[str, ...] | None = None
    regression: bool = False
    metric: Literal["accuracy", "f1", "matthews", "pearson", "spearman"] | None = None
    unlabelled: str | None = Field(
        default=None,
        description="more text for intermediate and prediction, which need no labels: a file with "
        "the same text columns, or 'rest': the training rows beyond max_train_rows",
    )
    max_train_rows: PositiveInt | None = None
    max_dev_rows: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _label_keys_are_text(cls, tree: Any) -> Any:
        """YAML reads `{0: negative}` and `[0, 1]` as integers; raw label values are text."""
        if isinstance(tree, dict) and isinstance(tree.get("labels"), dict):
            return {**tree, "labels": {str(k): str(v) for k, v in tree["labels"].items()}}
        if isinstance(tree, dict) and isinstance(tree.get("labels"), list):
            return {**tree, "labels": tuple(str(v) for v in tree["labels"])}
        return tree

    @model_validator(mode="after")
    def _sources_and_metric(self) -> "TaskSection":
        free = {"name", "builtin", "metric", "unlabelled", "max_train_rows", "max_dev_rows"}
        ignored = sorted(self.model_fields_set - free) if self.builtin else []
        if ignored:
            raise ValueError(f"builtin: true brings its own text and labels; remove {ignored}")
        if self.dev and self.dev_share:
            raise ValueError(
                f"expected dev or dev_share, got dev '{self.dev}' and dev_share {self.dev_share}; "
                "set one of them to null"
            )
        if not self.builtin and not (self.train and (self.dev or self.dev_share)):
            raise ValueError("expected train, and dev or dev_share (or builtin: true)")
        if self.dev_share and (self.dev_split or self.dev_columns):
            raise ValueError("dev_share takes dev from train: remove dev_split and dev_columns")
        if "text_pair" in self.dev_columns and not self.text_pair:
            raise ValueError("dev_columns names a text_pair, the task has none: set text_pair too")
        regression_metric = self.metric in ("pearson", "spearman")
        if self.metric and regression_metric != self.regression:
            raise ValueError(f"metric '{self.metric}' does not fit regression: {self.regression}")
        if self.unlabelled == "rest" and not self.max_train_rows:
            raise ValueError("unlabelled: 'rest' expects max_train_rows: what is beyond it?")
        if self.regression and self.labels:
            raise ValueError("expected no labels for regression: its labels are numbers")
        return self

    @property
    def score(self) -> str:
        """The metric that chooses the best checkpoint and is reported first."""
        return self.metric or ("pearson" if self.regression else "accuracy")


STAGES = ("pretrain", "finetune", "general", "intermediate", "prediction", "baseline")
TEACHER_STAGES = STAGES[:2]


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
