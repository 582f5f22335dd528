"""The settings of the training stages, and the list of all stages."""

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
from tinybert_jax.terms.label import LabelTerm
from tinybert_jax.terms.logits import LogitsTerm
from tinybert_jax.terms.table import Terms

MaskUnit = Literal["token", "whole_word", "span"]


class StageSection(Section):
    """Steps, batches, learning rate, logging, evaluation and checkpoints of one stage."""

    num_epochs: Positive | None = Field(None, description="passes over the text of the stage")
    num_steps: PositiveInt | None = Field(None, description="instead of num_epochs")
    global_batch_size: PositiveInt = Field(32, description="examples of a step, on all devices")
    gradient_accumulation_steps: PositiveInt = Field(1, description="microbatches of a step")
    max_length: Annotated[int, Field(ge=4)] = Field(128, description="tokens of a row")
    length_buckets: tuple[PositiveInt, ...] | None = Field(
        None, description="padded widths of batches; default: 16, 32, 64, … up to max_length"
    )
    batching: Literal["bucket", "pack", "pad"] = Field(
        "bucket",
        description="bucket: one example per row, padded to the width of its bucket; pad: padded "
        "to max_length; pack: rows of max_length hold several examples, and a batch holds "
        "global_batch_size examples on average",
    )
    learning_rate: Positive = Field(description="highest rate of the schedule, of AdamW")
    schedule: Literal[
        "linear", "cosine", "constant", "polynomial", "inverse_sqrt", "warmup_stable_decay"
    ] = Field("linear", description="how the learning rate falls after the warm-up")
    warmup: Fraction = Field(0.1, description="share of the steps spent on linear warm-up")
    decay: Fraction = Field(0.2, description="share of the steps that warmup_stable_decay decays")
    end_factor: Fraction = Field(0.0, description="rate of the last step / learning_rate")
    power: Positive = Field(1.0, description="exponent of the schedule polynomial")
    weight_decay: NonNegative = Field(0.01, description="of AdamW, but for biases and LayerNorm")
    b1: Probability = Field(0.9, description="decay of AdamW's mean of gradients")
    b2: Probability = Field(0.999, description="decay of AdamW's mean of squared gradients")
    eps: Positive = Field(1e-6, description="added to the denominator of AdamW")
    decay_towards: Literal["zero", "start"] = Field(
        "zero",
        description="what weight_decay pulls weights to; start: to those of the first step (L2-SP, "
        "arXiv 1802.01483), but the task's head and a projection to zero",
    )
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None,
        description="factor of the learning rate from each layer to the one below it, as 0.9; the "
        "head has the whole rate",
    )
    clip_norm: Positive | None = Field(1.0, description="largest norm of all gradients together")
    average_decay: Probability | None = Field(
        None,
        description="decay of a moving average of the weights; evaluations read the average, and "
        "it is saved as the model; 0.998 averages about 500 steps",
    )
    dropout: Probability | None = Field(
        None, description="overrides all dropout rates of the model"
    )
    log_every: PositiveInt = Field(50, description="steps from one line of the log to the next")
    save_every: PositiveInt = Field(500, description="steps; see also save_minutes")
    save_minutes: Positive = Field(
        5.0, description="a state is saved at the latest so long after the one before"
    )
    keep_every: PositiveInt | None = Field(
        None,
        description="steps whose multiples stay among the checkpoints, beside the last two and "
        "that of the best score",
    )
    eval_every: PositiveInt | None = Field(None, description="steps; default: once an epoch")
    patience: PositiveInt | None = Field(
        None, description="stop after this many evaluations in a row without a better score"
    )
    stop_after_skipped: PositiveInt = Field(
        10,
        description="stop after this many steps in a row that a model skips, because its loss or "
        "gradient is not finite or a spike; 1 makes every step wait for the one before it",
    )
    spikes: Literal["report", "skip"] | None = Field(
        None,
        description="what becomes of a step whose loss is above spike_factor times the median of "
        "the last 100: a line, or a line and no change of the weights",
    )
    spike_factor: Annotated[float, Field(gt=1.0)] = Field(5.0, description="see spikes")
    check_replicas_every: PositiveInt | None = Field(
        None,
        description="steps after which the copies of the weights on several devices are compared; "
        "a copy that differs stops the run and names its device",
    )

    @model_validator(mode="after")
    def _length_is_given_once(self) -> "StageSection":
        if (self.num_epochs is None) == (self.num_steps is None):
            raise ValueError(
                f"expected num_epochs or num_steps, exactly one of them, got {self.num_epochs} and "
                f"{self.num_steps}; set one of them, and the other to null"
            )
        if self.global_batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"expected global_batch_size to be a multiple of gradient_accumulation_steps, "
                f"got {self.global_batch_size} and {self.gradient_accumulation_steps}; change one"
            )
        if self.length_buckets and self.batching == "pad":
            raise ValueError("batching: pad has one width, max_length; remove length_buckets")
        if self.length_buckets and max(self.length_buckets) != self.max_length:
            raise ValueError(
                f"expected the longest of length_buckets to be max_length = {self.max_length}, "
                f"got {list(self.length_buckets)}; add {self.max_length}, or change max_length"
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
        """The parts of the stage in order: the phases, then the stage's own settings."""
        return [Part(0, "", self)]


class Part(NamedTuple):
    """Consecutive steps of a stage with the same row length and batch size."""

    start: int  # first step
    key: str  # place in the config: "phases.0." for a phase, "" for the stage itself
    section: StageSection  # the settings of these steps


class Phase(Section):
    """Settings that replace those of the stage during a share of its first steps."""

    share: Annotated[float, Field(gt=0.0, lt=1.0, description="share of the stage's steps")]
    max_length: Annotated[int, Field(ge=4)] | None = Field(
        None, description="default: the stage's, also for the next setting"
    )
    global_batch_size: PositiveInt | None = Field(None, description="examples of a step")

    @property
    def changes(self) -> dict[str, int]:
        """The settings of the stage that the phase replaces, by name."""
        return self.model_dump(exclude={"share"}, exclude_none=True)


class CorpusStageSection(StageSection):
    """A stage on the corpus; it can start with phases of shorter rows or smaller batches."""

    phases: tuple[Phase, ...] = Field(
        (),
        description="the first parts of the stage, in order: [{share: 0.9, max_length: 128}] is "
        "BERT's recipe; the remaining steps use the stage's max_length and global_batch_size. A "
        "phase reads only the corpus.stores whose rows have its max_length",
    )

    @model_validator(mode="after")
    def _phases_fit(self) -> "CorpusStageSection":
        if not self.phases:
            return self
        if not self.num_steps:
            raise ValueError("phases are shares of num_steps: set num_steps, not num_epochs")
        for phase in self.phases:
            if not phase.changes.items() - self.model_dump(include=set(phase.changes)).items():
                raise ValueError(
                    "expected phases with another max_length or global_batch_size than the "
                    f"stage's, got {phase.changes or 'neither'}; change or remove the phase"
                )
            if (phase.max_length or 0) > self.max_length:
                raise ValueError(
                    f"expected phases of at most max_length = {self.max_length}, got "
                    f"{phase.max_length}; shorten the phase"
                )
            size = phase.global_batch_size or self.global_batch_size
            if size % self.gradient_accumulation_steps:
                raise ValueError(
                    f"expected phases whose global_batch_size is a multiple of "
                    f"gradient_accumulation_steps = {self.gradient_accumulation_steps}, got "
                    f"{size}; change one of them"
                )
        starts = [part.start for part in self.parts()]
        if sorted({*starts, self.num_steps}) != [*starts, self.num_steps]:
            raise ValueError(
                f"expected phases of at least one step, and at least one of the {self.num_steps} "
                f"steps after them, got phases that start at steps {starts} from the shares "
                f"{[phase.share for phase in self.phases]}; change the shares"
            )
        return self

    def parts(self) -> list[Part]:
        """As in `StageSection`; each phase has the settings of the stage with its changes."""
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

    mask_rate: Probability = Field(0.15, description="share of the tokens that are masked")
    mask_rate_end: Probability | None = Field(
        None, description="the rate of the last step; the rate changes linearly from mask_rate"
    )
    mask_unit: MaskUnit = Field(
        "token", description="unit of masking; span: consecutive words, as in SpanBERT"
    )
    position_init: PositionInit = Field(
        "normal",
        description="initial position table of a model with random weights; sinusoid: sine and "
        "cosine waves, which training then changes; a small model learns to find neighbouring "
        "tokens in fewer steps",
    )
    loss_chunk_size: PositiveInt = Field(
        512, description="most masked tokens whose logits are in a device's memory at one time"
    )
    pair_weight: NonNegative = Field(
        0.0,
        description="weight of BERT's second loss: next sentence or sentence order, as the stores "
        "were prepared (mode: pairs)",
    )

    @property
    def masking(self) -> "Masking":
        """How the input of pretraining is masked."""
        return Masking(
            self.mask_rate,
            self.mask_rate_end,
            self.mask_unit,
            self.loss_chunk_size,
            self.pair_weight,
        )


class Masking(NamedTuple):
    """How the input of a stage is masked, and how much of it the loss predicts at one time."""

    rate: float  # share of the tokens
    rate_end: float | None = None  # rate of the last step; None: `rate`
    unit: MaskUnit = "token"
    max_chunk_size: int | None = None  # most masked tokens whose logits a device holds at once
    pair_weight: float = 0.0  # of the loss on sentence pairs


class TaskStageSection(StageSection):
    """A stage that reads the text of the task."""

    trained_words: Literal["all", "used"] = Field(
        "all",
        description="used: rows of the word table that no text of the stage uses keep their start, "
        "which saves the time and memory that the optimizer spends on them",
    )


class HeadSection(TaskStageSection):
    """A stage that trains a task head."""

    head_init: Literal["random", "linear_probe"] = Field(
        "random",
        description="linear_probe: the head is first fitted to the features of the encoder, with "
        "the plain loss of the labels or of the teacher's logits (which are then kept); it "
        "replaces a trained head",
    )


class SupervisedSection(HeadSection):
    """A stage that trains on labels: finetune or baseline."""

    label_smoothing: Probability = Field(0.0, description="share of a label given to all classes")
    class_weights: Literal["balanced"] | None = Field(
        None,
        description="balanced: a unit counts as 1 / (units of its class to train on), so that all "
        "classes count alike",
    )
    r_drop: NonNegative = Field(
        0.0,
        description="weight of the divergence between two passes with different dropout (R-Drop, "
        "arXiv 2106.14448); a step then costs twice as much",
    )


class FinetuneSection(SupervisedSection):
    """Supervised training of the teacher."""

    num_seeds: PositiveInt = Field(
        1,
        description="number of teachers, trained in the same batches from the seeds seed, "
        "seed + 1, …; the one with the best score is distilled, or exported if the run has no "
        "student",
    )
    teach: Literal["best", "mean"] = Field(
        "best",
        description="mean: prediction learns from the mean of all teachers' logits; other terms "
        "and the report refer to the best teacher",
    )


class UpdateSection(TaskStageSection):
    """Training of a model on new rows, with rows and answers of its earlier state."""

    old_weight: NonNegative = Field(
        0.05,
        description="weight of the old model's answers beside the labels; they count on the rows "
        "that the old model has right",
    )
    temperature: Positive = Field(2.0, description="what the logits of both models are divided by")
    interpolations: Annotated[tuple[Fraction, ...], Field(min_length=1)] = Field(
        tuple(step / 10 for step in range(11)),
        description="shares of the way from the old weights to the trained ones; of those that "
        "are no worse on new rows than the trained weights (rows right, and loss) the one that "
        "breaks fewest old rows is taken",
    )
    max_regressions: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="largest share of broken old rows that passes the gate (the upper bound of 95 "
        "% confidence), beside McNemar's test; it may change when a run resumes",
    )

    @property
    def terms(self) -> Terms:
        """The labels, and the old model's logits where it is right."""
        taught = LogitsTerm(
            term="logits",
            form="kl",
            where="right",
            weight=self.old_weight,
            temperature=self.temperature,
            times_squared_temperature=True,
        )
        return (LabelTerm(term="label"), *([taught] if self.old_weight else []))


class Stage(NamedTuple):
    """One kind of stage; these fields alone decide what the stage does.

    `salt` is folded into the run's seed for all random numbers of the stage. A salt never changes
    and belongs to one stage only.
    """

    name: str
    salt: int
    role: Literal["teacher", "student"]  # the model that the stage trains
    text: Literal["corpus", "labelled", "distilled"]  # distilled: labelled and unlabelled text
    teacher: Literal["pretrained", "task"] | None = None  # the teacher of a distillation
    starts_from: tuple[str, ...] = ()  # it starts from the first of these that is done
    trains_head: bool = False  # it trains a task head, and scores choose the checkpoint
    averages_seeds: bool = False  # its model is the mean of the weights of its seeds

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
UPDATE = Stage("update", 7, "student", "labelled", trains_head=True, averages_seeds=True)
# In running order.
STAGES = (PRETRAIN, FINETUNE, GENERAL, INTERMEDIATE, PREDICTION, BASELINE, UPDATE)
HELDOUT_SALT = 6  # for the masks on held-out text
STAGE_NAMES = tuple(stage.name for stage in STAGES)
DISTILL_STAGES = tuple(stage for stage in STAGES if stage.distils)
