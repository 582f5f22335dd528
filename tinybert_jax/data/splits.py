"""The text of a run, as its config names it: a task's splits and a corpus's documents."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tinybert_jax.config.data import CorpusSection
from tinybert_jax.config.tasks import TaskSection
from tinybert_jax.data import builtin
from tinybert_jax.data.corpus import read_corpus
from tinybert_jax.data.errors import short
from tinybert_jax.data.tables import LabelledText, read_labelled


class TaskData(NamedTuple):
    train: LabelledText
    dev: LabelledText
    unlabelled: LabelledText | None = None  # more text to distil on

    @property
    def distilled(self) -> LabelledText:
        """All text that a teacher can label: the training text, then the unlabelled."""
        if self.unlabelled is None:
            return self.train
        pairs = None
        if self.train.text_pair is not None and self.unlabelled.text_pair is not None:
            pairs = self.train.text_pair + self.unlabelled.text_pair
        return LabelledText(self.train.text + self.unlabelled.text, pairs, None, self.label_names)

    @property
    def label_names(self) -> tuple[str, ...] | None:
        return self.train.label_names

    @property
    def dev_labels(self) -> np.ndarray:
        assert self.dev.labels is not None  # read with a label column
        return self.dev.labels

    @property
    def num_outputs(self) -> int:
        return len(self.label_names) if self.label_names else 1


def corpus_documents(section: CorpusSection) -> tuple[str, ...]:
    """The documents of a corpus section."""
    documents = builtin.builtin_corpus() if section.builtin else read_corpus(section.files)
    return tuple(documents[: section.max_documents])


def split_heldout(
    documents: Sequence[str], share: float
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(for training, held out): by the hash of its text, so that equal documents stay together.

    Raises ValueError where a share is asked for and either side is empty.
    """
    if not share:
        return tuple(documents), ()
    is_heldout = [_digest(text) < share * 2**64 for text in documents]
    kept, heldout = (
        tuple(text for text, out in zip(documents, is_heldout, strict=True) if out == side)
        for side in (False, True)
    )
    if not (kept and heldout):
        raise ValueError(
            f"corpus.heldout_share: expected documents on both sides of the split, got {len(kept)} "
            f"to train on and {len(heldout)} held out; give more documents (in a .txt file a blank "
            "line ends one) or another share"
        )
    return kept, heldout


def read_task(section: TaskSection) -> TaskData:
    """Train, dev and unlabelled text; raises ValueError naming file and line where one is wrong."""
    if section.builtin:
        train, dev = builtin.builtin_task("train"), builtin.builtin_task("dev")
        return _task_data(section, train, _rows(dev, 0, section.max_dev_rows))

    columns: dict[str, Any] = {
        "text": section.text,
        "text_pair": section.text_pair,
        "label": section.label,
    }
    common: dict[str, Any] = {"regression": section.regression, "format": section.format}
    assert section.train is not None  # or the section is builtin
    train = read_labelled(
        section.train, **columns, **common, split=section.train_split, labels=section.labels
    )
    if train.label_names is not None and len(train.label_names) < 2:
        raise ValueError(
            f"{section.train}: expected at least 2 labels in column '{section.label}', got "
            f"{list(train.label_names)}; for numbers set task.regression=true"
        )
    if section.labels is None:
        _refuse_no_classes(section, train)
    if section.dev_share:
        return _task_data(section, *_split_dev(section, train))
    # Labels named only by the training split are the only ones that the dev split may hold.
    labels = section.labels or train.label_names
    assert section.dev is not None  # or there is a dev_share
    dev = read_labelled(
        section.dev,
        **columns | dict(section.dev_columns),
        **common,
        split=section.dev_split,
        labels=labels,
        max_rows=section.max_dev_rows,
    )
    return _task_data(section, train, dev)


def describe_labels(task: TaskData) -> str:
    """How many rows have which label, and what may be a mistake in them: a line each."""
    told = f"task: {len(task.train.text):,} rows to train on, {len(task.dev.text):,} in dev"
    names = task.label_names
    if names is None:
        return f"{told}, labelled with numbers"
    assert task.train.labels is not None
    trained, judged = (
        np.bincount(labels, minlength=len(names)) for labels in (task.train.labels, task.dev_labels)
    )
    order = np.argsort(-trained, kind="stable")
    counts = [f"{short(names[i])} {trained[i]:,}" for i in order]
    lines = [f"{told}, of {len(names)} labels: {_first(counts)}"]
    absent = [f"{short(names[i])} ({judged[i]:,} in dev)" for i in order if not trained[i]]
    if absent:
        lines.append(f"task: no row to train on has the label {_first(absent)}")
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(name.strip().casefold(), []).append(short(name))
    twins = [" and ".join(own) for own in alike.values() if len(own) > 1]
    if twins:
        fix = "task.labels can give them one name"
        lines.append(f"task: labels that differ in case or blanks alone: {_first(twins)}; {fix}")
    return "\n".join(lines)


def _first(items: Sequence[str], num_shown: int = 8) -> str:
    more = f", and {len(items) - num_shown} more" if len(items) > num_shown else ""
    return ", ".join(items[:num_shown]) + more


def _refuse_no_classes(section: TaskSection, text: LabelledText) -> None:
    """Refuses labels that nearly every row has for itself; of a few rows each may."""
    if text.label_names is None or text.labels is None or len(text.labels) < 20:
        return
    num_labels, num_rows = len(np.unique(text.labels)), len(text.labels)
    if num_labels > 0.9 * num_rows:
        raise ValueError(
            f"{section.train}: expected labels that rows share, got {num_labels} in the {num_rows} "
            f"rows of column '{section.label}'; name the column of the classes as task.label, or "
            "list them all as task.labels; for numbers set task.regression=true"
        )


def _split_dev(section: TaskSection, text: LabelledText) -> tuple[LabelledText, LabelledText]:
    """(train, dev): the share of rows of least hash; equal texts are on one side."""
    assert section.dev_share is not None
    pairs = text.text_pair or [""] * len(text.text)
    keys = [f"{one}\n{two}" for one, two in zip(text.text, pairs, strict=True)]
    digests = np.array([_digest(key) for key in keys], np.uint64)
    num_dev = max(round(section.dev_share * len(keys)), 1)
    is_dev = digests <= np.sort(digests)[num_dev - 1]
    if is_dev.all():
        raise ValueError(
            f"task.dev_share: expected rows on both sides of the split, got {is_dev.sum()} of "
            f"{len(keys)} rows of {section.train} in dev; give another share, or a dev file"
        )

    def side(rows: np.ndarray) -> LabelledText:
        chosen = np.flatnonzero(rows).tolist()
        return text._replace(
            text=[text.text[row] for row in chosen],
            text_pair=text.text_pair and [text.text_pair[row] for row in chosen],
            labels=None if text.labels is None else text.labels[chosen],
        )

    return side(~is_dev), _rows(side(is_dev), 0, section.max_dev_rows)


def _digest(text: str) -> int:
    """A number below 2^64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _task_data(section: TaskSection, train: LabelledText, dev: LabelledText) -> TaskData:
    unlabelled = None
    if section.unlabelled == "rest":
        unlabelled = _rows(train, section.max_train_rows, None)
    elif section.unlabelled:
        unlabelled = read_labelled(
            section.unlabelled, text=section.text, text_pair=section.text_pair, label=None
        )
    return TaskData(_rows(train, 0, section.max_train_rows), dev, unlabelled)


def _rows(text: LabelledText, start: int | None, stop: int | None) -> LabelledText:
    pair = text.text_pair[start:stop] if text.text_pair else None
    labels = None if text.labels is None else text.labels[start:stop]
    return text._replace(text=text.text[start:stop], text_pair=pair, labels=labels)
