"""The text of a run, as its config names it: a task's splits and a corpus's documents."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinybert_jax.config.data import CorpusSection
from tinybert_jax.config.tasks import TaskSection
from tinybert_jax.data import builtin
from tinybert_jax.data.corpus import read_corpus
from tinybert_jax.data.errors import short
from tinybert_jax.data.examples import Examples


class Reading(NamedTuple):
    """Which examples of a file are read, and what they have to have."""

    split: str | None = None  # of a data set that has several
    # Names that are known from the training text or a model; other labels are refused.
    label_names: Sequence[str] | None = None
    is_dev: bool = False  # whether columns have the names of the dev file
    is_labelled: bool = True
    keep_blank: bool = False  # reads a blank text as "" instead of refusing it


# (path, section, reading) -> examples; ValueError names file and place of what cannot be read.
Reader = Callable[[str, Any, Reading], Examples]


class TaskData(NamedTuple):
    train: Examples
    dev: Examples
    unlabelled: Examples | None = None  # more text to distil on

    @property
    def distilled(self) -> Examples:
        """All text that a teacher can label: the training text, then the unlabelled."""
        if self.unlabelled is None:
            return self.train
        pairs = None
        if self.train.text_pair is not None and self.unlabelled.text_pair is not None:
            pairs = self.train.text_pair + self.unlabelled.text_pair
        text = [*self.train.text, *self.unlabelled.text]
        return Examples(text, pairs, None, self.label_names)

    @property
    def label_names(self) -> tuple[str, ...] | None:
        return self.train.label_names

    @property
    def num_outputs(self) -> int:
        return self.train.num_outputs


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


def read_task(section: TaskSection, read: Reader) -> TaskData:
    """Train, dev and unlabelled text; raises ValueError naming file and line where one is wrong."""
    if section.builtin:
        train, dev = builtin.builtin_task("train"), builtin.builtin_task("dev")
        return _task_data(section, train, dev, None)
    assert section.train is not None  # or the section is builtin
    train = read(section.train, section, Reading(section.train_split))
    unlabelled = None
    if section.unlabelled and section.unlabelled != "rest":
        unlabelled = read(section.unlabelled, section, Reading(is_labelled=False))
    if section.dev_share:
        return _task_data(section, *_split_dev(section, train), unlabelled)
    # Labels named only by the training split are the only ones that the dev split may hold.
    assert section.dev is not None  # or there is a dev_share
    dev = read(section.dev, section, Reading(section.dev_split, train.label_names, is_dev=True))
    return _task_data(section, train, dev, unlabelled)


def describe_labels(
    data: TaskData, count: Callable[[Examples], np.ndarray], unit: str = "row"
) -> str:
    """How many units have which label, and what may be a mistake in them: a line each."""
    told = f"task: {len(data.train.text):,} rows to train on, {len(data.dev.text):,} in dev"
    names = data.label_names
    if names is None:
        return f"{told}, labelled with numbers"
    trained, judged = count(data.train), count(data.dev)
    order = np.argsort(-trained, kind="stable")
    counts = [f"{short(names[i])} {trained[i]:,}" for i in order]
    lines = [f"{told}, of {len(names)} labels: {_first(counts)}"]
    absent = [f"{short(names[i])} ({judged[i]:,} in dev)" for i in order if not trained[i]]
    if absent:
        lines.append(f"task: no {unit} to train on has the label {_first(absent)}")
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


def _split_dev(section: TaskSection, examples: Examples) -> tuple[Examples, Examples]:
    """(train, dev): the share of rows of least hash; equal texts are on one side."""
    assert section.dev_share is not None
    pairs = examples.text_pair or [""] * len(examples.text)
    keys = [f"{one}\n{two}" for one, two in zip(examples.text, pairs, strict=True)]
    digests = np.array([_digest(key) for key in keys], np.uint64)
    num_dev = max(round(section.dev_share * len(keys)), 1)
    is_dev = digests <= np.sort(digests)[num_dev - 1]
    if is_dev.all():
        raise ValueError(
            f"task.dev_share: expected rows on both sides of the split, got {is_dev.sum()} of "
            f"{len(keys)} rows of {section.train} in dev; give another share, or a dev file"
        )
    train, dev = (examples.take(np.flatnonzero(side).tolist()) for side in (~is_dev, is_dev))
    return train, dev


def _digest(text: str) -> int:
    """A number below 2^64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _task_data(
    section: TaskSection, train: Examples, dev: Examples, unlabelled: Examples | None
) -> TaskData:
    most = section.max_train_rows
    if section.unlabelled == "rest":
        unlabelled = train.take(slice(most, None))
    return TaskData(train.take(slice(most)), dev.take(slice(section.max_dev_rows)), unlabelled)
