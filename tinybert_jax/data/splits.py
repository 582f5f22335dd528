"""The text of a run, as its config names it: a task's splits and a corpus's documents."""

import collections
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinybert_jax.config.data import CorpusSection
from tinybert_jax.config.tasks import TaskSection
from tinybert_jax.data import builtin
from tinybert_jax.data.corpus import read_corpus
from tinybert_jax.data.errors import short
from tinybert_jax.data.examples import Examples, join_old


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
    select: Examples | None = None  # chooses checkpoints, seeds and thresholds; None: dev does

    @property
    def selection(self) -> Examples:
        """The examples that choose checkpoints, seeds and thresholds."""
        return self.dev if self.select is None else self.select

    @property
    def selection_name(self) -> str:
        return "dev" if self.select is None else "select"

    @property
    def distilled(self) -> Examples:
        """All text that a teacher can label: the training text, then the unlabelled."""
        if self.unlabelled is None:
            return self.train
        first, more = self.train.text_pair, self.unlabelled.text_pair
        pairs, text = None, [*self.train.text, *self.unlabelled.text]
        if first is not None and more is not None:
            pairs = first + more
        elif first is not None or more is not None:  # sentences of files with and without pairs
            text += first or more or []
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
    if section.old:
        old = read(section.old, section, Reading(section.train_split, train.label_names))
        return _with_old(section, train, old)
    unlabelled = None
    if section.unlabelled and section.unlabelled != "rest":
        unlabelled = _read_unlabelled(section, read)
    if section.dev_share:
        train, dev = _split_share(section, "dev_share", train)
        return _task_data(section, train, dev, unlabelled)
    # Labels named only by the training split are the only ones that the dev split may hold.
    assert section.dev is not None  # or there is a dev_share
    dev = read(section.dev, section, Reading(section.dev_split, train.label_names, is_dev=True))
    return _task_data(section, train, dev, unlabelled)


def _read_unlabelled(section: TaskSection, read: Reader) -> Examples:
    paths = section.unlabelled or ()
    paths = (paths,) if isinstance(paths, str) else paths
    first, *others = (read(path, section, Reading(is_labelled=False)) for path in paths)
    for more in others:
        first = TaskData(first, first, more).distilled
    return first


def _with_old(section: TaskSection, new: Examples, old: Examples) -> TaskData:
    """New and old rows, each with its share of dev and of those that choose."""
    changes = {"train": section.old, "max_train_rows": section.max_old_rows}
    old_section = section.model_copy(update=changes)
    parts = []
    for part_section, examples in ((section, new), (old_section, old)):
        rest, dev = _split_share(part_section, "dev_share", examples)
        parts.append(_task_data(part_section, rest, dev, None))
    one, two = parts
    select = join_old(one.select, two.select) if one.select and two.select else None
    return TaskData(join_old(one.train, two.train), join_old(one.dev, two.dev), None, select)


def describe_labels(
    data: TaskData, count: Callable[[Examples], np.ndarray], unit: str = "row"
) -> str:
    """How many units have which label, and what may be a mistake in them: a line each."""
    chooses = f", {len(data.select.text):,} that choose" if data.select else ""
    told = f"task: {len(data.train.text):,} rows to train on{chooses}"
    told += f", {len(data.dev.text):,} in dev"
    names = data.label_names
    if unit == "text":
        more = len(data.unlabelled.text) if data.unlabelled else 0
        return told + (f"; {more:,} more without labels" if more else "")
    if names is None:
        told += ", labelled with numbers"
    else:
        trained = count(data.train)
        if unit == "span":
            told += f": {trained[0]:,} have an answer, {trained[1]:,} have none"
        else:
            order = np.argsort(-trained, kind="stable")
            counts = [f"{short(names[i])} {trained[i]:,}" for i in order]
            told += f", of {len(names)} labels: {_first(counts)}"
    return "\n".join([told, *(f"task: {note}" for note in data_notes(data, count, unit))])


def data_notes(
    data: TaskData, count: Callable[[Examples], np.ndarray], unit: str = "row"
) -> list[str]:
    """What may be a mistake in the data: dev rows that are also trained on, and odd labels."""
    judged = collections.Counter(_keys(data.dev))
    repeated = sum(judged[key] for key in set(_keys(data.train)) & judged.keys())
    told = f"{repeated:,} of the {len(data.dev.text):,} in dev are also among those to train on"
    fix = "their scores say little of new text: remove them from one side"
    return [f"{told}; {fix}"] * (repeated > 0) + _label_notes(data, count, unit)


def _label_notes(data: TaskData, count: Callable[[Examples], np.ndarray], unit: str) -> list[str]:
    """What may be a mistake in the labels; empty for labels that are numbers or answers."""
    names = data.label_names
    if names is None or unit == "span":
        return []
    trained, judged = count(data.train), count(data.dev)
    order, notes = np.argsort(-trained, kind="stable"), []
    absent = [f"{short(names[i])} ({judged[i]:,} in dev)" for i in order if not trained[i]]
    is_update = data.train.is_old is not None  # of a model that knows labels without rows
    if absent:
        fix = "; the model may forget it: give more old rows" if is_update else ""
        notes.append(f"no {unit} to train on has the label {_first(absent)}{fix}")
    known = np.zeros_like(trained)  # rows that an earlier model was trained on
    if data.train.is_old is not None:
        known = count(data.train.take(np.flatnonzero(data.train.is_old).tolist()))
    rare = [
        f"{short(names[i])} {trained[i]}" for i in order if 0 < trained[i] <= _RARE and not known[i]
    ]
    if rare:
        fix = f"nobody learns a label from so few: add {unit}s, or leave the label out"
        notes.append(f"labels of one or two {unit}s: {_first(rare, 3)}; {fix}")
    missing = [f"{short(n)} {trained[i]:,}" for i, n in enumerate(names) if _is_missing(n)]
    if missing:
        fix = f"leave these {unit}s out if they have no label"
        notes.append(f"labels that look like missing values: {_first(missing)}; {fix}")
    if len(names) >= _MANY and sum(map(_is_fraction, names)) > len(names) / 2:
        fix = "if they are scores, set task.kind=regression"
        notes.append(f"most of the {len(names)} labels are numbers with a fraction; {fix}")
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(name.strip().casefold(), []).append(short(name))
    twins = [" and ".join(own) for own in alike.values() if len(own) > 1]
    if twins:
        fix = "task.labels can give them one name"
        notes.append(f"labels that differ in case or blanks alone: {_first(twins)}; {fix}")
    return notes


_RARE, _MANY = 2, 10
_MISSING = frozenset({"", "nan", "none", "null", "n/a", "na", "?", "-"})


def _is_missing(name: str) -> bool:
    return name.strip().casefold() in _MISSING


def _is_fraction(name: str) -> bool:
    try:
        number = float(name)
        return math.isfinite(number) and not number.is_integer()
    except ValueError:
        return False


def _first(items: Sequence[str], num_shown: int = 8) -> str:
    more = f", and {len(items) - num_shown} more" if len(items) > num_shown else ""
    return ", ".join(items[:num_shown]) + more


def _split_share(
    section: TaskSection, setting: str, examples: Examples
) -> tuple[Examples, Examples]:
    """(rest, part): the part is the share of rows of least hash.

    Rows of one group, or else equal texts, are on one side.
    """
    share = getattr(section, setting)
    keys = examples.groups or _keys(examples)
    if section.kind == "translation":  # a source is on one side with all its translations
        counts = collections.Counter(examples.text)
        keys = [
            text if counts[text] > 1 else key for text, key in zip(examples.text, keys, strict=True)
        ]
    digests = np.array([_digest(key) for key in keys], np.uint64)
    num_chosen = max(round(share * len(keys)), 1)
    is_chosen = digests <= np.sort(digests)[num_chosen - 1]
    if is_chosen.all() and examples.groups:
        raise ValueError(
            f"task.{setting}: expected questions about several articles or texts, which stay "
            f"together, got {len(keys)} about {len(set(keys))}; give more texts, or "
            + ("a file as dev" if setting == "dev_share" else f"set task.{setting}=null")
        )
    if is_chosen.all():
        raise ValueError(
            f"task.{setting}: expected rows on both sides of the split, got {is_chosen.sum()} of "
            f"{len(keys)} rows of {section.train or 'the built-in data'} in that part; give "
            "another share, or more rows"
        )
    rest, part = (examples.take(np.flatnonzero(side).tolist()) for side in (~is_chosen, is_chosen))
    return rest, part


def _keys(examples: Examples) -> list[str]:
    """The text of each row, or its pair of texts."""
    pairs = examples.text_pair or [""] * len(examples.text)
    return [f"{one}\n{two}" for one, two in zip(examples.text, pairs, strict=True)]


def _digest(text: str) -> int:
    """A number below 2^64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _task_data(
    section: TaskSection, train: Examples, dev: Examples, unlabelled: Examples | None
) -> TaskData:
    most = section.max_train_rows
    if section.unlabelled == "rest":
        unlabelled = train.take(slice(most, None))
    train, dev = train.take(slice(most)), dev.take(slice(section.max_dev_rows))
    select = None
    if section.select_share:
        train, select = _split_share(section, "select_share", train)
    return TaskData(train, dev, unlabelled, select)
