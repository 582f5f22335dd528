"""The settings of a task: its kind, where its labelled text is and what its labels are."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from tinybert_jax.settings.section import PositiveInt, Probability, Section

Form = Literal["softmax", "sigmoid", "square"]  # how the scores of a unit are read: losses.forms


class TaskSection(Section):
    """What every kind of task has: files to train on and to be judged on."""

    form: ClassVar[Form]
    default_metric: ClassVar[str]

    kind: str
    name: str = "task"
    builtin: bool = False
    train: str | None = None
    dev: str | None = None
    dev_share: Probability | None = Field(
        None, description="instead of dev: this share of the training rows, by the hash of the text"
    )
    train_split: str | None = None
    dev_split: str | None = None
    metric: str | None = None
    unlabelled: str | None = Field(
        default=None,
        description="more text for intermediate and prediction, which need no labels: a file with "
        "the same text columns, or 'rest': the training rows beyond max_train_rows",
    )
    max_train_rows: PositiveInt | None = None
    max_dev_rows: PositiveInt | None = None

    @model_validator(mode="after")
    def _sources(self) -> "TaskSection":
        if self.builtin:
            self._refuse_beside_builtin()
        if self.dev and self.dev_share:
            raise ValueError(
                f"expected dev or dev_share, got dev '{self.dev}' and dev_share {self.dev_share}; "
                "set one of them to null"
            )
        if not self.builtin and not (self.train and (self.dev or self.dev_share)):
            raise ValueError("expected train, and dev or dev_share (or builtin: true)")
        if self.dev_share and self.dev_split:
            raise ValueError("dev_share takes dev from train: remove dev_split")
        if self.unlabelled == "rest" and not self.max_train_rows:
            raise ValueError("unlabelled: 'rest' needs max_train_rows; set it, or give a file")
        return self

    def _refuse_beside_builtin(self) -> None:
        """Settings at their defaults are as good as absent: a dumped config has them all."""
        free = {"name", "kind", "builtin", "metric", "unlabelled", "max_train_rows", "max_dev_rows"}
        given = {
            name
            for name, field in type(self).model_fields.items()
            if name not in free and getattr(self, name) != field.default
        }
        if given:
            raise ValueError(
                f"builtin: true brings its own text and labels; remove {sorted(given)}"
            )

    @property
    def chosen_metric(self) -> str:
        """The metric that chooses the best checkpoint and is reported first."""
        return self.metric or self.default_metric


class TextTask(TaskSection):
    """Texts or pairs of texts, from .tsv, .csv, .jsonl, a saved `datasets` folder or a hub id."""

    format: Literal["auto", "tsv", "csv", "jsonl", "datasets"] = "auto"
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    dev_columns: dict[Literal["text", "text_pair", "label"], str] = Field(
        {}, description="where dev names its columns otherwise, like {text: sentence}"
    )

    @model_validator(mode="after")
    def _columns(self) -> "TextTask":
        if self.dev_share and self.dev_columns:
            raise ValueError("dev_share takes dev from train: remove dev_columns")
        if "text_pair" in self.dev_columns and not self.text_pair:
            raise ValueError("dev_columns names a text_pair, the task has none: set text_pair too")
        return self


def _raw_labels(labels: Any) -> Any:
    """YAML reads `{0: negative}` and `[0, 1]` as integers; raw label values are text."""
    if not isinstance(labels, dict | list | tuple):
        return labels
    given = [*labels, *(labels.values() if isinstance(labels, dict) else ())]
    shown = [value for value in given if isinstance(value, bool) or value is None]
    if shown:
        raise ValueError(
            f"expected labels that are text or numbers, got {shown}; put quotes around them, as "
            "they are written in the data"
        )
    if isinstance(labels, dict):
        return {str(raw): str(name) for raw, name in labels.items()}
    return tuple(str(value) for value in labels)


Labels = Annotated[dict[str, str] | tuple[str, ...] | None, BeforeValidator(_raw_labels)]


class ClassificationTask(TextTask):
    """One of several classes for each text or pair."""

    form: ClassVar[Form] = "softmax"
    default_metric: ClassVar[str] = "accuracy"

    kind: Literal["classification"] = "classification"
    labels: Labels = None
    metric: Literal["accuracy", "f1", "matthews"] | None = None


class RegressionTask(TextTask):
    """A number for each text or pair."""

    form: ClassVar[Form] = "square"
    default_metric: ClassVar[str] = "pearson"

    kind: Literal["regression"] = "regression"
    labels: None = None
    metric: Literal["pearson", "spearman"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _labels_are_numbers(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("labels"):
            raise ValueError("expected no labels for regression: its labels are numbers")
        if isinstance(tree, dict) and tree.get("builtin"):
            raise ValueError("builtin: true brings text with classes, not numbers: leave kind out")
        return tree


class MultiLabelTask(TextTask):
    """Any number of labels for each text or pair."""

    form: ClassVar[Form] = "sigmoid"
    default_metric: ClassVar[str] = "f1_micro"

    kind: Literal["multi_label"] = "multi_label"
    label: str = Field(
        "labels", description="column of lists of labels; in .tsv and .csv parted by `separator`"
    )
    separator: Annotated[str, Field(min_length=1)] = ","
    label_columns: tuple[str, ...] = Field(
        (), description="instead of label: one column a label, each 0 or 1"
    )
    labels: Labels = None
    metric: Literal["f1_micro", "f1_macro", "subset_accuracy"] | None = None

    @model_validator(mode="after")
    def _labels_are_given_once(self) -> "MultiLabelTask":
        if self.label_columns and self.labels:
            raise ValueError("label_columns name the labels already: remove labels")
        if self.label_columns and "label" in self.dev_columns:
            raise ValueError("dev_columns renames label, but label_columns are read: remove one")
        return self


class TaggingTask(TaskSection):
    """A tag for each word: named entities in one of three schemes, or plain tags."""

    form: ClassVar[Form] = "softmax"
    default_metric: ClassVar[str] = "f1"

    kind: Literal["tagging"] = "tagging"
    format: Literal["auto", "conll", "jsonl"] = Field(
        "auto", description="conll: a word a line, blank lines between sentences; auto: by suffix"
    )
    text: str = Field(
        "auto", description="words: position of a column from 0, or key of .jsonl; auto: the first"
    )
    label: str = Field("auto", description="tags, likewise; auto: the last column, or key tags")
    scheme: Literal["auto", "iob1", "iob2", "bioes", "plain"] = Field(
        "auto", description="how tags mark entities; plain: each tag is a class, as parts of speech"
    )
    labels: Labels = Field(None, description="kinds of entities, or plain tags, in id order")
    drop_empty_tokens: bool = Field(
        False, description="leaves out words of white space alone that are outside of entities"
    )
    metric: Literal["f1", "precision", "recall", "accuracy"] | None = None

    @model_validator(mode="after")
    def _labels_are_a_list(self) -> "TaggingTask":
        if isinstance(self.labels, dict):
            raise ValueError("labels: expected a list of kinds or tags, got a mapping")
        if self.builtin:
            raise ValueError("builtin: true brings text with classes, not tags: give train")
        return self


def _with_kind(tree: Any) -> Any:
    """Fills in the kind; `regression: true` is the older way to write `kind: regression`."""
    if not isinstance(tree, dict):
        return tree
    tree, is_regression = dict(tree), tree.get("regression")
    tree.pop("regression", None)
    if is_regression not in (None, True, False):
        raise ValueError(f"regression: expected true or false, got {is_regression!r}; or set kind")
    kind = "regression" if is_regression else "classification"
    if is_regression and tree.get("kind", kind) != kind:
        raise ValueError(f"expected kind regression or no regression: true, got {tree['kind']}")
    return {"kind": kind, **tree}


AnyTask = Annotated[
    Annotated[
        ClassificationTask | RegressionTask | MultiLabelTask | TaggingTask,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_with_kind),
]
