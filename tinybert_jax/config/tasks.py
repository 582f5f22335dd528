"""The settings of a task: where its labelled text is and what its labels are."""

from typing import Any, Literal

from pydantic import Field, model_validator

from tinybert_jax.settings.section import PositiveInt, Probability, Section


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
