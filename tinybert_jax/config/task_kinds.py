"""The section `task`: of any kind, translation among them."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from tinybert_jax.config.tasks import (
    ClassificationTask,
    EmbeddingsTask,
    Form,
    MultiLabelTask,
    QuestionAnsweringTask,
    RegressionTask,
    TaggingTask,
    TaskSection,
    with_kind,
)


class TranslationTask(TaskSection):
    """A text in one language, and the same in another.

    Rows are those of a table, or lines of two files.
    """

    form: ClassVar[Form] = "vocabulary"
    default_metric: ClassVar[str] = "bleu"

    kind: Literal["translation"] = "translation"
    format: Literal["auto", "tsv", "csv", "jsonl", "datasets", "text"] = Field(
        "auto",
        description="text: a sentence a line, as all files but .tsv, .csv and .jsonl are; auto: "
        "by suffix, .txt is text",
    )
    text: str = Field("text", description="column of the source; its position, without a header")
    target: str = Field("target", description="column of the target")
    train_target: str | None = Field(
        None, description="instead of a column: a file with the targets of train, line by line"
    )
    dev_target: str | None = Field(None, description="the same for dev")
    long: Literal["drop", "refuse"] = Field(
        "drop",
        description="rows of train with a side beyond max_length tokens: left out and counted, or "
        "refused; sources of dev are cut",
    )
    blank: Literal["drop", "refuse"] = Field(
        "drop", description="rows with a blank side: left out and counted, or refused"
    )
    words: Literal["13a", "intl", "zh", "char", "none"] = Field(
        "13a", description="what BLEU counts, as sacreBLEU names it; zh for Chinese"
    )
    labels: None = None
    metric: Literal["bleu", "chrf"] | None = Field(
        None, description="chooses the best checkpoint; default: bleu, of greedy translations"
    )

    @model_validator(mode="after")
    def _files_are_parallel(self) -> "TranslationTask":
        if self.builtin:
            raise ValueError("builtin: true has classes, not translations: set train instead")
        for name in ("unlabelled", "old"):
            if getattr(self, name):
                raise ValueError(f"{name}: translation has none: remove it")
        if self.dev_target and not self.dev:
            raise ValueError("dev_target is the other side of dev: set dev, or remove it")
        if self.dev and (self.train_target is None) != (self.dev_target is None):
            raise ValueError(
                "expected train_target and dev_target, or none of them, got one; set both"
            )
        return self


AnyTask = Annotated[
    Annotated[
        ClassificationTask
        | RegressionTask
        | MultiLabelTask
        | TaggingTask
        | QuestionAnsweringTask
        | EmbeddingsTask
        | TranslationTask,
        Field(discriminator="kind"),
    ],
    BeforeValidator(with_kind),
]
