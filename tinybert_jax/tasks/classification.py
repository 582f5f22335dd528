"""Classification: one of several classes for each text or pair of texts."""

from typing import Any

import numpy as np

from tinybert_jax.batches.tokenize import tokenize_texts
from tinybert_jax.config.tasks import ClassificationTask
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import Reading
from tinybert_jax.data.tables import read_labelled
from tinybert_jax.metrics.classification import classification_metrics, confusion_matrix
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.tasks.task import Scored, Settings, Task, softmax


def read(path: str, section: Any, how: Reading) -> Examples:
    """One table; of training text the labels are checked too."""
    columns = columns_of(section, how.is_dev, how.is_labelled)
    labels = section.labels or how.label_names
    labels = labels if how.is_labelled else None
    options = {"split": how.split, "labels": labels, "keep_blank": how.keep_blank}
    examples = read_labelled(path, **columns, **options)
    if how.is_labelled and not how.is_dev:
        _refuse_no_classes(path, section, examples)
    return examples


def columns_of(section: Any, is_dev: bool, is_labelled: bool) -> dict[str, Any]:
    """Names of columns and the format, as arguments for `read_labelled`."""
    columns = {"text": section.text, "text_pair": section.text_pair, "label": section.label}
    columns |= dict(section.dev_columns) if is_dev else {}
    return columns | {"format": section.format, **({} if is_labelled else {"label": None})}


def _refuse_no_classes(path: str, section: Any, examples: Examples) -> None:
    """Refuses one label for all rows, and labels that nearly every row has for itself."""
    names, labels = examples.label_names or (), examples.labels
    if len(names) < 2:
        raise ValueError(
            f"{path}: expected at least 2 labels in column '{section.label}', got {list(names)}; "
            "for numbers set task.kind=regression"
        )
    num_labels, num_rows = len(np.unique(labels)), len(labels)
    if section.labels is None and num_rows >= 20 and num_labels > 0.9 * num_rows:
        raise ValueError(
            f"{path}: expected labels that rows share, got {num_labels} in the {num_rows} rows of "
            f"column '{section.label}'; name the column of the classes as task.label, or list them "
            "all as task.labels; for numbers set task.kind=regression"
        )


def count_labels(examples: Examples) -> np.ndarray:
    return np.bincount(examples.labels, minlength=examples.num_outputs)


def majority_share(examples: Examples) -> float:
    """The accuracy of always answering the commonest class."""
    return float(np.bincount(examples.labels).max() / len(examples.labels))


def measure(scored: Scored, settings: Settings) -> dict[str, float]:
    return classification_metrics(scored.logits, scored.examples.labels)


def answers(scored: Scored, settings: Settings) -> list[dict[str, Any]]:
    best, probabilities = scored.logits.argmax(-1), softmax(scored.logits)
    return [
        {
            "label": scored.label_names[label],
            "probability": float(row[label]),
            "logits": [float(value) for value in logits],
        }
        for label, row, logits in zip(best, probabilities, scored.logits, strict=True)
    ]


def details(scored: Scored, settings: Settings) -> dict[str, Any]:
    counts = confusion_matrix(
        scored.logits.argmax(-1), scored.examples.labels, scored.examples.num_outputs
    )
    return {"confusion": counts.tolist()}


CLASSIFICATION = Task(
    section=ClassificationTask,
    form=ClassificationTask.form,
    make_head=make_classifier,
    unit="row",
    read=read,
    encode=tokenize_texts,
    count_labels=count_labels,
    floor=majority_share,
    floor_metric="accuracy",
    measure=measure,
    answers=answers,
    details=details,
    hf_head="SequenceClassification",
    problem_type="single_label_classification",
)
