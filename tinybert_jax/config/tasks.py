"""The settings of a task: its kind, its files of labelled text and its labels."""

from collections import Counter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tinybert_jax.settings.section import (
    Pooling,
    Positive,
    PositiveInt,
    Probability,
    Section,
)

# See losses.forms; "similarity": vectors whose cosines are compared, see losses.similarity;
# "vocabulary": words, whose logits never exist whole, see losses.vocabulary.
Form = Literal["softmax", "sigmoid", "square", "similarity", "vocabulary"]


class TaskSection(Section):
    """The settings that every kind of task has; `train` is trained on, `dev` evaluated on."""

    form: ClassVar[Form]
    default_metric: ClassVar[str]  # chooses the best checkpoint: higher has to be better

    kind: str = Field(description="what a label is")
    name: str = Field("task", description="name of the task, in the report")
    builtin: bool = Field(
        False, description="instead of train and dev: labelled text of the installed packages"
    )
    train: str | None = Field(None, description="what models are trained on")
    dev: str | None = Field(None, description="what they are scored on")
    dev_share: Probability | None = Field(
        None, description="instead of dev: share of the training rows, chosen by hash of the text"
    )
    select_share: Probability | None = Field(
        None,
        description="share of the training rows, by hash of the text, that chooses checkpoints, "
        "seeds and thresholds instead of dev: scores on dev are then of text that chose nothing",
    )
    train_split: str | None = Field(None, description="split of a datasets folder or hub data set")
    dev_split: str | None = Field(None, description="the same for dev")
    metric: str | None = Field(None, description="chooses the best checkpoint")
    unlabelled: str | None = Field(
        default=None,
        description="more text, without labels, for intermediate and prediction: a file with the "
        "same text columns, or 'rest': the training rows after the first max_train_rows",
    )
    old: str | None = Field(
        default=None,
        description="for the stage update: rows that the model was trained on before, in a file "
        "with the same columns; they are trained on too, and the gate is about them",
    )
    max_old_rows: PositiveInt | None = Field(None, description="most old rows to train on")
    max_train_rows: PositiveInt | None = Field(None, description="the first rows of train")
    max_dev_rows: PositiveInt | None = Field(None, description="the first rows of dev")

    @model_validator(mode="after")
    def _sources(self) -> "TaskSection":
        if self.builtin:
            self._refuse_beside_builtin()
        if self.old and self.dev:
            raise ValueError(
                "a share of old and of new rows is dev in an update: remove dev, and compare both "
                "models on that file (tinybert compare)"
            )
        if self.dev and self.dev_share:
            raise ValueError(
                f"expected dev or dev_share, got dev '{self.dev}' and dev_share {self.dev_share}; "
                "set one of them to null"
            )
        if not self.builtin and not (self.train and (self.dev or self.dev_share)):
            raise ValueError(
                "expected train and one of dev and dev_share, or builtin: true; set them"
            )
        if self.dev_share and self.dev_split:
            raise ValueError("dev_share takes the dev rows from train: remove dev_split")
        if self.old and not self.dev_share:
            raise ValueError("a share of old and of new rows is dev: set dev_share")
        if self.old and self.unlabelled:
            raise ValueError("old is for the stage update, which reads labels: remove unlabelled")
        if self.max_old_rows and not self.old:
            raise ValueError("max_old_rows is of the rows in old: set old, or remove max_old_rows")
        if self.unlabelled == "rest" and not self.max_train_rows:
            raise ValueError(
                "unlabelled: 'rest' needs max_train_rows; set it, or set unlabelled to a file"
            )
        return self

    def _refuse_beside_builtin(self) -> None:
        """Raises ValueError for settings that builtin data cannot have.

        A setting with its default value is allowed, because a dumped config has all settings.
        """
        free = {"name", "kind", "builtin", "metric", "unlabelled", "select_share"}
        free |= {"max_train_rows", "max_dev_rows"}
        given = {
            name
            for name, field in type(self).model_fields.items()
            if name not in free and getattr(self, name) != field.default
        }
        if given:
            raise ValueError(f"builtin: true has text and labels already; remove {sorted(given)}")

    @property
    def texts_per_example(self) -> int:
        """Texts of an example that are rows of their own, in the same batch."""
        return 1

    @property
    def chosen_metric(self) -> str:
        """The metric that chooses the best checkpoint and is reported first."""
        return self.metric or self.default_metric


class TextTask(TaskSection):
    """Texts or pairs of texts, from .tsv, .csv, .jsonl, a saved `datasets` folder or a hub id."""

    format: Literal["auto", "tsv", "csv", "jsonl", "datasets"] = Field(
        "auto", description="format of the files; auto: by suffix"
    )
    text: str = Field("text", description="column of the text; its position, without a header")
    text_pair: str | None = Field(None, description="column of a second text")
    label: str = Field("label", description="column of the label")
    dev_columns: dict[Literal["text", "text_pair", "label"], str] = Field(
        {}, description="column names of dev that differ from those of train, as {text: sentence}"
    )

    @model_validator(mode="after")
    def _columns(self) -> "TextTask":
        if self.dev_share and self.dev_columns:
            raise ValueError("dev_share takes the dev rows from train: remove dev_columns")
        if "text_pair" in self.dev_columns and not self.text_pair:
            raise ValueError(
                "dev_columns has a text_pair, but the task has none: set text_pair too"
            )
        return self


def _raw_labels(labels: Any) -> Any:
    """Makes text of numbers, because YAML reads `{0: negative}` and `[0, 1]` as integers."""
    if not isinstance(labels, dict | list | tuple):
        return labels
    given = [*labels, *(labels.values() if isinstance(labels, dict) else ())]
    refused = [value for value in given if isinstance(value, bool) or value is None]
    if refused:
        raise ValueError(
            f"expected labels that are text or numbers, got {refused}; put quotes around them, "
            "with the spelling of the data"
        )
    if isinstance(labels, dict):
        return {str(raw): str(name) for raw, name in labels.items()}
    return _without_repetition(tuple(str(value) for value in labels))


def _without_repetition(names: tuple[str, ...]) -> tuple[str, ...]:
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"expected every label once, got {repeated} more than once; remove one")
    return names


Labels = Annotated[dict[str, str] | tuple[str, ...] | None, BeforeValidator(_raw_labels)]


class ClassificationTask(TextTask):
    """One of several classes for each text or pair."""

    form: ClassVar[Form] = "softmax"
    default_metric: ClassVar[str] = "accuracy"

    kind: Literal["classification"] = "classification"
    labels: Labels = Field(
        None, description="labels in the order of their ids, or {value of the column: its label}"
    )
    metric: Literal["accuracy", "f1", "matthews"] | None = Field(
        None, description="chooses the best checkpoint; default: accuracy"
    )


class RegressionTask(TextTask):
    """A number for each text or pair."""

    form: ClassVar[Form] = "square"
    default_metric: ClassVar[str] = "pearson"

    kind: Literal["regression"] = "regression"
    labels: None = None
    metric: Literal["pearson", "spearman"] | None = Field(
        None, description="chooses the best checkpoint; default: pearson"
    )

    @model_validator(mode="before")
    @classmethod
    def _labels_are_numbers(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("labels"):
            raise ValueError(
                "expected no labels for regression, whose labels are numbers: remove labels"
            )
        if isinstance(tree, dict) and tree.get("builtin"):
            raise ValueError("builtin: true has classes as labels, not numbers: leave kind out")
        return tree


class MultiLabelTask(TextTask):
    """Any number of labels for each text or pair."""

    form: ClassVar[Form] = "sigmoid"
    default_metric: ClassVar[str] = "f1_micro"

    kind: Literal["multi_label"] = "multi_label"
    label: str = Field(
        "labels", description="column of lists of labels; .tsv and .csv have `separator` in between"
    )
    separator: Annotated[str, Field(min_length=1)] = Field(
        ",", description="between the labels of a row in .tsv and .csv"
    )
    label_columns: Annotated[tuple[str, ...], AfterValidator(_without_repetition)] = Field(
        (), description="instead of label: one column of 0 and 1 per label"
    )
    labels: Labels = Field(None, description="labels in the order of their ids")
    metric: Literal["f1_micro", "f1_macro", "subset_accuracy"] | None = Field(
        None, description="chooses the best checkpoint; default: f1_micro"
    )

    @model_validator(mode="after")
    def _labels_are_given_once(self) -> "MultiLabelTask":
        if self.label_columns and self.labels:
            raise ValueError("label_columns name the labels already: remove labels")
        if self.label_columns and "label" in self.dev_columns:
            raise ValueError("dev_columns renames label, but label_columns are read: remove one")
        return self


class TaggingTask(TaskSection):
    """One tag per word: named entities in one of three schemes, or plain tags."""

    form: ClassVar[Form] = "softmax"
    default_metric: ClassVar[str] = "f1"

    kind: Literal["tagging"] = "tagging"
    format: Literal["auto", "conll", "jsonl"] = Field(
        "auto", description="conll: one word per line, blank line after a sentence; auto: by suffix"
    )
    text: str = Field(
        "auto", description="column of words: position from 0, or key of .jsonl; auto: the first"
    )
    label: str = Field(
        "auto", description="column of tags: position or key; auto: the last column, or key tags"
    )
    scheme: Literal["auto", "iob1", "iob2", "bioes", "plain"] = Field(
        "auto", description="how tags mark entities; plain: tags are classes, as parts of speech"
    )
    labels: Labels = Field(
        None, description="kinds of entities, or plain tags, in the order of their ids"
    )
    drop_empty_tokens: bool = Field(
        False, description="drop words that are only white space and in no entity"
    )
    metric: Literal["f1", "precision", "recall", "accuracy"] | None = Field(
        None, description="chooses the best checkpoint; default: f1, of whole entities"
    )

    @model_validator(mode="after")
    def _labels_are_a_list(self) -> "TaggingTask":
        if isinstance(self.labels, dict):
            raise ValueError(
                "labels: expected a list of kinds or tags, got a mapping; write a list"
            )
        if self.builtin:
            raise ValueError("builtin: true has classes as labels, not tags: set train instead")
        return self


class QuestionAnsweringTask(TaskSection):
    """A question about a text; the answer is a part of the text, or there is none."""

    form: ClassVar[Form] = "softmax"
    default_metric: ClassVar[str] = "f1"

    kind: Literal["question_answering"] = "question_answering"
    format: Literal["auto", "squad", "jsonl"] = Field(
        "auto",
        description="squad: the JSON of SQuAD 1.1 and 2.0; jsonl: objects with question, context "
        "and answers; auto: by suffix",
    )
    labels: None = None
    metric: Literal["f1", "exact_match"] | None = Field(
        None, description="chooses the best checkpoint; default: f1, of words"
    )

    @model_validator(mode="after")
    def _has_files(self) -> "QuestionAnsweringTask":
        if self.builtin:
            raise ValueError("builtin: true has classes as labels, not answers: set train instead")
        return self


class EmbeddingsTask(TextTask):
    """A vector per text, so that texts of like meaning have a high cosine.

    `dev` has pairs of texts with scores; the metrics correlate them with the cosines.
    """

    form: ClassVar[Form] = "similarity"
    default_metric: ClassVar[str] = "spearman"

    kind: Literal["embeddings"] = "embeddings"
    format: Literal["auto", "tsv", "csv", "jsonl", "datasets", "text"] = Field(
        "auto",
        description="a .txt file has a sentence a line; text: so have all files but .tsv, .csv, "
        ".jsonl",
    )
    rows: Literal["sentences", "pairs", "triplets", "scored_pairs"] = Field(
        "sentences",
        description="what train holds. sentences: text to distil on, in both columns if there is "
        "a text_pair; pairs: text_pair is the partner of text; triplets: negative is no partner; "
        "scored_pairs: label is their similarity",
    )
    negative: str | None = Field(None, description="column of the third text of triplets")
    labels: None = None
    unlabelled: str | tuple[str, ...] | None = Field(
        None, description="more sentences: files of text, or with the same text columns; or 'rest'"
    )
    pooling: Pooling = Field(
        "mean", description="the mean of the last hidden states, or the first of them"
    )
    normalise: bool = Field(True, description="the exported model gives vectors of length 1")
    widths: tuple[PositiveInt, ...] = Field(
        (),
        description="first columns that are trained to be vectors too (Matryoshka, arXiv "
        "2205.13147), as [192, 96]; the terms contrastive and similarity and supervised stages",
    )
    temperature: Positive = Field(
        0.05, description="what supervised stages divide cosines by before the softmax"
    )
    metric: Literal["spearman", "pearson"] | None = Field(
        None, description="chooses the best checkpoint; default: spearman"
    )

    @model_validator(mode="after")
    def _columns(self) -> "EmbeddingsTask":
        """In place of that of `TextTask`: a text_pair may be one of dev alone."""
        if self.builtin:
            raise ValueError("builtin: true has classes, not pairs with scores: set train instead")
        needed = {"sentences": (), "triplets": ("text_pair", "negative")}
        for name in needed.get(self.rows, ("text_pair",)):
            if not getattr(self, name):
                raise ValueError(f"rows: {self.rows} need the column {name}: set it")
        if self.negative and self.rows != "triplets":
            raise ValueError(f"negative is a column of rows: triplets, got {self.rows}: remove it")
        if self.unlabelled and self.rows != "sentences":
            raise ValueError(f"unlabelled is for rows: sentences, got {self.rows}: remove it")
        shares = [name for name in ("dev_share", "select_share") if getattr(self, name)]
        if shares and self.rows not in ("sentences", "scored_pairs"):
            raise ValueError(f"{shares[0]} needs pairs with scores in train, got {self.rows}")
        if shares and not self.text_pair:
            raise ValueError(f"{shares[0]} needs pairs with scores in train: set text_pair")
        if self.dev_share and self.dev_columns:
            raise ValueError("dev_share takes the dev rows from train: remove dev_columns")
        return self

    @property
    def has_scores(self) -> bool:
        """Whether the scores in train are read."""
        return self.rows == "scored_pairs" or bool(self.dev_share or self.select_share)

    @property
    def texts_per_example(self) -> int:
        return {"sentences": 1, "triplets": 3}.get(self.rows, 2)


def with_kind(tree: Any) -> Any:
    """Adds `kind`; `regression: true` is the older form of `kind: regression`."""
    if not isinstance(tree, dict):
        return tree
    tree, is_regression = dict(tree), tree.get("regression")
    tree.pop("regression", None)
    if is_regression not in (None, True, False):
        raise ValueError(f"regression: expected true or false, got {is_regression!r}; or set kind")
    kind = "regression" if is_regression else "classification"
    if is_regression and tree.get("kind", kind) != kind:
        raise ValueError(
            f"expected kind regression or no regression: true, got {tree['kind']}; remove one"
        )
    return {"kind": kind, **tree}
