"""The interface of a kind of task: reading, encoding, the head, metrics and predictions.

A model scores *units* over *classes*; losses and the train step need nothing else. A unit is an
example or a token of an example. A new kind is one file with a `Task`, and a line in `table`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tinybert_jax.batches.batch import TokenRows
from tinybert_jax.config.tasks import Form, TaskSection
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import Reader
from tinybert_jax.metrics.intervals import Metrics, resampled_scores
from tinybert_jax.models.heads import MakeHead

# Numbers that turn logits into predictions, such as a threshold; saved in config.json.
Settings = Mapping[str, float]


class Scored(NamedTuple):
    """A data set with the logits of a model for it."""

    logits: np.ndarray  # fp32 [examples, classes], or [tokens of `rows`, classes]
    rows: TokenRows
    examples: Examples
    texts: list[str] | None = None  # of a task that generates: what the model has made

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the classes in id order; empty without names."""
        return self.examples.label_names or ()


class Task(NamedTuple):
    """A kind of task.

    `details` is what the report shows beside the metrics: `confusion` (counts [classes, classes])
    or `mistakes` (rows with true, predicted, count, support), or `per_class` (rows with name,
    precision, recall, f1, support) under `per_class_title`, and `calibration`.
    """

    section: type[TaskSection]  # the settings; the default of its field `kind` names the task
    form: Form  # which losses fit the logits
    make_head: MakeHead  # (sizes, number of classes, options) -> (apply, init)
    # What is scored: of a word its first token; of a span its start and its end; a text that has
    # no label of its own.
    unit: Literal["row", "word", "span", "text"]
    read: Reader
    encode: Callable[[Any, Examples, int], TokenRows]  # (tokenizer, examples, max_length)
    count_labels: Callable[[Examples], np.ndarray]  # -> units per label name, [outputs]
    floor: Callable[[Examples], float | None]  # score without any learning; None: no floor
    floor_metric: str  # the metric of `floor`
    # -> numbers per example [examples, …] that `metrics` needs, so that it can be asked about any
    # selection of the examples
    outcomes: Callable[[Scored, Settings], np.ndarray]
    metrics: Callable[[np.ndarray, Sequence[str]], dict[str, float]]  # (outcomes, label names)
    answers: Callable[[Scored, Settings], list[dict[str, Any]]]  # -> one prediction per example
    details: Callable[[Scored, Settings], dict[str, Any]]  # -> entries of results.json, see above
    in_words: Callable[[dict[str, Any]], str]  # one of the `answers` -> a few words
    truth: Callable[[Examples], list[str]]  # -> the labels of each example, in such words
    # End of the class name in transformers, such as SequenceClassification; None: no head there.
    hf_head: str | None
    problem_type: str | None  # in config.json; kinds may share it: see `table.task_of`
    # (outcomes of all examples, label names) -> the metrics of a resample of them, where these need
    # to know what it lacks; None: `metrics`
    resample_metrics: Callable[[np.ndarray, Sequence[str]], Metrics] | None = None
    # -> bool [n]: the examples whose answer is right; None: the words of answer and truth are equal
    rights: Callable[[Scored, Settings], np.ndarray] | None = None
    tune: Callable[[Scored], Settings] | None = None  # -> settings with the best score
    # (tokenizer, examples, positions): raises ValueError where an example is too long for a model
    check_lengths: Callable[[Any, Examples, int], None] | None = None
    max_length: int | None = None  # most tokens of a text, where the folder of a model says it
    normalises: bool = False  # whether vectors are given with the length 1
    # (section, tokenizer of targets) -> the task with its settings
    configure: Callable[[Any, Any], "Task"] | None = None
    # (width, most tokens) -> JSON files of a model folder beside the usual ones, by name
    more_files: Callable[[int, int], dict[str, Any]] | None = None
    # (folder): raises ValueError where a model gives other outputs than the task reads
    check_folder: Callable[[Path], None] | None = None
    generates: bool = False  # a model is scored by the texts that it makes
    # (tokenizer, examples, most tokens) -> bool [n]: the examples that need not be cut
    fits: Callable[[Any, Examples, int], np.ndarray] | None = None

    @property
    def kind(self) -> str:
        """The value of `task.kind` in a config."""
        return self.section.model_fields["kind"].default

    def measure(self, scored: Scored, settings: Settings) -> dict[str, float]:
        """The metrics of a data set by name."""
        return self.metrics(self.outcomes(scored, settings), scored.label_names)

    def resampled(self, outcomes: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Each metric on resamples of the examples, see `resampled_scores`."""
        if self.resample_metrics is not None:
            return resampled_scores(self.resample_metrics(outcomes, names), outcomes)
        return resampled_scores(lambda rows: self.metrics(rows, names), outcomes)

    def is_right(self, scored: Scored, settings: Settings) -> np.ndarray:
        """bool [n]: the examples whose answer is right."""
        if self.rights is not None:
            return self.rights(scored, settings)
        said = map(self.in_words, self.answers(scored, settings))
        pairs = zip(said, self.truth(scored.examples), strict=True)
        return np.array([answer == true for answer, true in pairs])

    def best_settings(self, scored: Scored) -> Settings:
        """The settings with the best score on `scored`; empty for a task without settings."""
        return self.tune(scored) if self.tune else {}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
