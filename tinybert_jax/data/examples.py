"""The examples of a task as they were read, before any tokenizer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Examples(NamedTuple):
    """n examples: a text or a list of words each, with second texts and labels where there are."""

    text: Sequence[Any]  # n texts, or n lists of words
    text_pair: list[str] | None
    # [n] class ids or numbers; [n, labels] 0 or 1; n arrays [words]; n tuples of answers; None:
    # unlabelled
    labels: Any
    label_names: tuple[str, ...] | None  # of the outputs of a head; None where labels are numbers
    groups: list[str] | None = None  # n names: examples of one group are on one side of a split
    negatives: list[str] | None = None  # n third texts, which mean something else

    @property
    def num_outputs(self) -> int:
        """Outputs of the head for a unit: one for each label name, or one number."""
        return len(self.label_names) if self.label_names else 1

    def take(self, rows: Sequence[int] | slice) -> "Examples":
        """The examples at these places, in their order."""
        places = range(len(self.text))[rows] if isinstance(rows, slice) else rows

        def chosen(values: Any) -> Any:
            if isinstance(values, np.ndarray):
                return values[np.asarray(places, np.int64)]
            return None if values is None else [values[place] for place in places]

        text, pairs, labels = chosen(self.text), chosen(self.text_pair), chosen(self.labels)
        more = chosen(self.groups), chosen(self.negatives)
        return Examples(text, pairs, labels, self.label_names, *more)
