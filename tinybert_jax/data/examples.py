"""The examples of a task as they were read, before any tokenizer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_LONGEST = 240  # characters of a text that is shown


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
    is_old: np.ndarray | None = None  # bool [n]: whether a model was trained on them before

    @property
    def num_outputs(self) -> int:
        """Outputs of the head for a unit: one for each label name, or one number."""
        return len(self.label_names) if self.label_names else 1

    def shown(self, place: int, *, is_pair: bool) -> str:
        """The text of an example for readers; `is_pair`: the second one is read, and no target."""
        text = self.text[place]
        whole = text if isinstance(text, str) else " ".join(text)
        if self.text_pair is not None and is_pair:
            whole = f"{whole} | {self.text_pair[place]}"
        return whole if len(whole) <= _LONGEST else whole[:_LONGEST] + "…"

    def take(self, rows: Sequence[int] | slice) -> "Examples":
        """The examples at these places, in their order."""
        places = range(len(self.text))[rows] if isinstance(rows, slice) else rows

        def chosen(values: Any) -> Any:
            if isinstance(values, np.ndarray):
                return values[np.asarray(places, np.int64)]
            return None if values is None else [values[place] for place in places]

        text, pairs, labels = chosen(self.text), chosen(self.text_pair), chosen(self.labels)
        groups, negatives, is_old = map(chosen, (self.groups, self.negatives, self.is_old))
        return Examples(text, pairs, labels, self.label_names, groups, negatives, is_old)


def join_old(new: Examples, old: Examples) -> Examples:
    """The new examples, then the old ones, with marks; both have class ids of the same labels."""
    pairs = None
    if new.text_pair is not None and old.text_pair is not None:
        pairs = [*new.text_pair, *old.text_pair]
    is_old = np.repeat([False, True], [len(new.text), len(old.text)])
    labels = np.concatenate([new.labels, old.labels])
    return Examples([*new.text, *old.text], pairs, labels, new.label_names, is_old=is_old)
