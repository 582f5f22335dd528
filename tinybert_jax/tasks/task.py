"""What a kind of task is: how its text is read and encoded, what is scored, what is answered.

Every task scores *units* over *classes*; losses and the train step know no more than that. A unit
is an example, or a token of one. A new kind is one file with a `Task`, and a line in `table`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from tinybert_jax.batches.batch import TokenRows
from tinybert_jax.config.tasks import Form, TaskSection
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import Reader
from tinybert_jax.models.heads import MakeHead

Settings = Mapping[str, float]  # of the answers, such as a threshold; kept in the exported config


class Scored(NamedTuple):
    """A data set with the logits of a model."""

    logits: np.ndarray  # fp32 [examples, classes], or [tokens of `rows`, classes]
    rows: TokenRows
    examples: Examples

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.examples.label_names or ()


class Task(NamedTuple):
    section: type[TaskSection]  # its settings; `kind` there names the task
    form: Form
    make_head: MakeHead  # (sizes, number of classes, options) -> model
    unit: Literal["row", "word"]  # what has a label
    read: Reader
    encode: Callable[[Any, Examples, int], TokenRows]  # (tokenizer, examples, max_length)
    count_labels: Callable[[Examples], np.ndarray]  # units of each class [classes]
    floor: Callable[[Examples], float | None]  # the score of a model that learnt nothing
    floor_metric: str
    measure: Callable[[Scored, Settings], dict[str, float]]
    answers: Callable[[Scored, Settings], list[dict[str, Any]]]  # one for each example
    details: Callable[[Scored, Settings], dict[str, Any]]  # of results.json, for the report
    hf_head: str  # the head in the names of transformers' classes
    problem_type: str | None  # as transformers has it
    tune: Callable[[Scored], Settings] | None = None  # settings that score best on these examples
    # (tokenizer, examples, positions): raises ValueError where an example has no room in a model
    check_lengths: Callable[[Any, Examples, int], None] | None = None

    @property
    def kind(self) -> str:
        return self.section.model_fields["kind"].default

    def tuned(self, scored: Scored) -> Settings:
        return self.tune(scored) if self.tune else {}


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
