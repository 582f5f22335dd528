"""The sections of the training stages: how long, on what rows, how fast, how often judged."""

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from tinybert_jax.settings.section import (
    Fraction,
    NonNegative,
    PositionInit,
    Positive,
    PositiveInt,
    Probability,
    Section,
)

MaskUnit = Literal["token", "whole_word", "span"]


class StageSection(Section):
    """One training stage: how long, how fast, how often it is looked at and saved."""

    num_epochs: Positive | None = None
    num_steps: PositiveInt | None = None
    global_batch_size: PositiveInt = 32
    gradient_accumulation_steps: PositiveInt = 1
    max_length: Annotated[int, Field(ge=4)] = 128
    length_buckets: tuple[PositiveInt, ...] | None = Field(
        None, description="padded widths of batches; default: 16, 32, 64, … up to max_length"
    )
    batching: Literal["bucket", "pack", "pad"] = Field(
        "bucket",
        description="bucket: a row an example, padded to its bucket's width; pad: to max_length; "
        "pack: rows of max_length hold several examples, global_batch_size a batch on average",
    )
    learning_rate: Positive
    schedule: Literal[
        "linear", "cosine", "constant", "polynomial", "inverse_sqrt", "warmup_stable_decay"
    ] = "linear"
    warmup: Fraction = Field(0.1, description="share of the steps spent on linear warm-up")
    decay: Fraction = Field(0.2, description="share of the steps that warmup_stable_decay decays")
    end_factor: Fraction = 0.0
    power: Positive = 1.0
    weight_decay: NonNegative = 0.01
    b1: Probability = 0.9
    b2: Probability = 0.999
    eps: Positive = 1e-6
    clip_norm: Positive | None = 1.0
    average_decay: Probability | None = Field(
        None,
        description="decay of a moving average of the weights, which is then what is evaluated and "
        "kept; 0.998 looks back about 500 steps",
    )
    dropout: Probability | None = Field(None, description="overrides both of the model's rates")
    log_every: PositiveInt = 50
    save_every: PositiveInt = 500
    eval_every: PositiveInt | None = Field(None, description="steps; default: once an epoch")
    patience: PositiveInt | None = Field(
        None, description="stop after so many evaluations in a row without a better dev score"
    )

    @model_validator(mode="after")
    def _length_is_given_once(self) -> "StageSection":
        if (self.num_epochs is None) == (self.num_steps is None):
            raise ValueError(
                f"expected num_epochs or num_steps, exactly one of them, got {self.num_epochs} and "
                f"{self.num_steps}; set one, and the other to null"
            )
        if self.global_batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"expected global_batch_size to be a multiple of gradient_accumulation_steps, "
                f"got {self.global_batch_size} and {self.gradient_accumulation_steps}"
            )
        if self.length_buckets and self.batching == "pad":
            raise ValueError("batching: pad has one width, max_length; remove length_buckets")
        if self.length_buckets and max(self.length_buckets) != self.max_length:
            raise ValueError(
                f"expected the longest of length_buckets to be max_length = {self.max_length}, "
                f"got {list(self.length_buckets)}"
            )
        return self

    def buckets(self) -> tuple[int, ...]:
        """Padded widths in rising order; the last is `max_length`."""
        if self.batching == "pad":
            return (self.max_length,)
        if self.length_buckets:
            return tuple(sorted(set(self.length_buckets)))
        widths = []
        width = 16
        while width < self.max_length:
            widths.append(width)
            width *= 2
        return (*widths, self.max_length)

    def parts(self) -> "list[Part]":
        """How the stage goes, from its first step on: as it is, or phase by phase."""
        return [Part(0, "", self)]


class Part(NamedTuple):
    """A run of steps with rows of one length and batches of one size."""

    start: int  # its first step
    key: str  # where the config says so: "phases.0." or, of the stage itself, ""
    section: StageSection


class Phase(Section):
    """What a stage begins with instead of its own settings, for a share of its steps."""

    share: Annotated[float, Field(gt=0.0, lt=1.0, description="of the stage's steps")]
    max_length: Annotated[int, Field(ge=4)] | None = None
    global_batch_size: PositiveInt | None = None

    @property
    def changes(self) -> dict[str, int]:
        return self.model_dump(exclude={"share"}, exclude_none=True)


class CorpusStageSection(StageSection):
    """A stage that trains on the corpus, and may begin with shorter rows or smaller batches."""

    phases: tuple[Phase, ...] = Field(
        (),
        description="how the stage begins, in order: [{share: 0.9, max_length: 128}] is BERT's "
        "recipe; what they leave is trained with max_length and global_batch_size. Of "
        "corpus.stores a phase reads those of its max_length",
    )

    @model_validator(mode="after")
    def _phases_fit(self) -> "CorpusStageSection":
        if not self.phases:
            return self
        if not self.num_steps:
            raise ValueError("phases are shares of num_steps: give it instead of num_epochs")
        for phase in self.phases:
            if not phase.changes.items() - self.model_dump(include=set(phase.changes)).items():
                raise ValueError(
                    "expected phases with another max_length or global_batch_size than the "
                    f"stage's, got {phase.changes or 'neither'}"
                )
            if (phase.max_length or 0) > self.max_length:
                raise ValueError(
                    f"expected phases of at most max_length = {self.max_length}, got "
                    f"{phase.max_length}"
                )
            size = phase.global_batch_size or self.global_batch_size
            if size % self.gradient_accumulation_steps:
                raise ValueError(
                    f"expected phases whose global_batch_size is a multiple of "
                    f"gradient_accumulation_steps = {self.gradient_accumulation_steps}, got {size}"
                )
        starts = [part.start for part in self.parts()]
        if sorted({*starts, self.num_steps}) != [*starts, self.num_steps]:
            raise ValueError(
                f"expected phases of a step or more that leave some of {self.num_steps}, got the "
                f"beginnings {starts} from the shares {[phase.share for phase in self.phases]}"
            )
        return self

    def parts(self) -> list[Part]:
        parts, done = [], 0.0
        for number, phase in enumerate(self.phases):
            changes: dict = {"phases": (), **phase.changes}
            if self.length_buckets and phase.max_length:
                shorter = [width for width in self.buckets() if width < phase.max_length]
                changes["length_buckets"] = (*shorter, phase.max_length)
            section = self.model_copy(update=changes)
            parts.append(Part(self._step(done), f"phases.{number}.", section))
            done += phase.share
        return [*parts, Part(self._step(done), "", self.model_copy(update={"phases": ()}))]

    def _step(self, share: float) -> int:
        return round(share * (self.num_steps or 0))


class PretrainSection(CorpusStageSection):
    """Masked-LM pretraining."""

    mask_rate: Probability = 0.15
    mask_rate_end: Probability | None = Field(
        None, description="the rate of the last step; in a straight line from mask_rate"
    )
    mask_unit: MaskUnit = Field(
        "token", description="what is masked together; span: words in a row, as in SpanBERT"
    )
    position_init: PositionInit = Field(
        "normal",
        description="of a model from random weights: sinusoid starts the position table, which is "
        "trained all the same, as waves; a small model then finds its neighbours in fewer steps",
    )
    loss_chunk_size: PositiveInt = Field(
        512, description="most masked tokens whose logits exist at one time on a device"
    )
    pair_weight: NonNegative = Field(
        0.0,
        description="weight of BERT's second loss, next sentence or sentence order: whichever the "
        "stores were prepared with (mode: pairs)",
    )

    @property
    def masking(self) -> "Masking":
        return Masking(
            self.mask_rate,
            self.mask_rate_end,
            self.mask_unit,
            self.loss_chunk_size,
            self.pair_weight,
        )


class Masking(NamedTuple):
    """How tokens of a stage's input are masked, and what is predicted of it."""

    rate: float
    rate_end: float | None = None
    unit: MaskUnit = "token"
    max_chunk_size: int | None = None  # masked tokens whose logits exist at one time on a device
    pair_weight: float = 0.0


class SupervisedSection(StageSection):
    label_smoothing: Probability = 0.0


class FinetuneSection(SupervisedSection):
    num_seeds: PositiveInt = Field(
        1,
        description="teachers that are trained side by side, from seeds seed, seed + 1, …, in the "
        "same batches: the best by dev score teaches, or is exported where no student is",
    )


class Stage(NamedTuple):
    """One of the stages a run may have. What a stage does follows from these fields alone.

    `salt` is folded into the run's seed for all draws of the stage: it never changes and no other
    stage may ever get it.
    """

    name: str
    salt: int
    role: Literal["teacher", "student"]  # whose weights the stage trains
    text: Literal["corpus", "labelled", "distilled"]  # distilled: labelled and unlabelled
    teacher: Literal["pretrained", "task"] | None = None  # which teacher a distillation reads
    starts_from: tuple[str, ...] = ()  # the stages before, the first that is done
    trains_head: bool = False  # of the task: then dev scores choose the best checkpoint

    @property
    def reads_corpus(self) -> bool:
        return self.text == "corpus"

    @property
    def distils(self) -> bool:
        return self.teacher is not None


PRETRAIN = Stage("pretrain", 0, "teacher", "corpus")
FINETUNE = Stage("finetune", 1, "teacher", "labelled", None, ("pretrain",), trains_head=True)
GENERAL = Stage("general", 2, "student", "corpus", "pretrained")
INTERMEDIATE = Stage("intermediate", 3, "student", "distilled", "task", ("general",))
PREDICTION = Stage(
    "prediction", 4, "student", "distilled", "task", ("intermediate", "general"), trains_head=True
)
BASELINE = Stage("baseline", 5, "student", "labelled", trains_head=True)
STAGES = (PRETRAIN, FINETUNE, GENERAL, INTERMEDIATE, PREDICTION, BASELINE)  # in running order
HELDOUT_SALT = 6  # of the masks on held-out text
STAGE_NAMES = tuple(stage.name for stage in STAGES)
DISTILL_STAGES = tuple(stage for stage in STAGES if stage.distils)
