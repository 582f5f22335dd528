"""Classification: what the report of many classes is made of."""

import tracemalloc

import numpy as np

from tinybert_jax.batches.batch import TokenRows
from tinybert_jax.data.examples import Examples
from tinybert_jax.metrics.intervals import interval, resampled_scores
from tinybert_jax.tasks.classification import CLASSIFICATION, MAX_CONFUSION
from tinybert_jax.tasks.task import Scored


def _scored(num_classes: int, num_rows: int = 60) -> Scored:
    """Right answers but for every third row, whose answer is the next class."""
    labels = (np.arange(num_rows) // 3 % num_classes).astype(np.int32)
    answers = np.where(np.arange(num_rows) % 3 == 0, (labels + 1) % num_classes, labels)
    logits = np.zeros((num_rows, num_classes), np.float32)
    logits[np.arange(num_rows), answers] = 5.0
    names = tuple(f"class {n}" for n in range(num_classes))
    offsets = np.arange(num_rows + 1)
    rows = TokenRows(np.zeros(num_rows, np.int32), offsets, np.ones(num_rows, np.int32), labels, 0)
    return Scored(logits, rows, Examples(["tea"] * num_rows, None, labels, names))


def test_up_to_200_classes_have_a_confusion_matrix():
    details = CLASSIFICATION.details(_scored(MAX_CONFUSION), {})
    counts = np.array(details["confusion"])
    assert counts.shape == (MAX_CONFUSION, MAX_CONFUSION) and counts.sum() == 60
    assert "mistakes" not in details


def test_more_classes_have_the_most_frequent_mistakes_and_take_little_memory():
    scored = _scored(10_000)
    tracemalloc.start()
    details = CLASSIFICATION.details(scored, {})
    found = CLASSIFICATION.outcomes(scored, {})
    resampled_scores(lambda rows: CLASSIFICATION.metrics(rows, scored.label_names), found)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "confusion" not in details and len(details["mistakes"]) == 15
    assert details["mistakes"][0] == {"true": 0, "predicted": 1, "count": 1, "support": 3}
    assert peak < 100e6  # the matrix took 1.3 GB


def test_the_interval_of_f1_lies_around_it_where_classes_are_rare():
    """Twelve classes with a row each, which are all missed, beside six that are known."""
    labels = np.concatenate([np.repeat(np.arange(6), 20), 6 + np.arange(12)])
    answers = np.where(labels < 6, labels, 0)
    found, names = np.stack([labels, answers], axis=1), [f"class {n}" for n in range(20)]
    score = CLASSIFICATION.metrics(found, names)["f1"]
    scores = CLASSIFICATION.resampled(found, names)
    low, high = interval(scores["f1"])
    assert low < score < high
    plain = resampled_scores(lambda rows: CLASSIFICATION.metrics(rows, names), found)
    assert interval(plain["f1"])[0] > score  # without the classes that a resample lacks
    for name in ("accuracy", "matthews"):
        np.testing.assert_array_equal(scores[name], plain[name])


def test_a_class_of_two_that_a_resample_lacks_keeps_its_f1():
    found = np.stack([np.arange(40) == 0] * 2, axis=1).astype(np.int64)
    f1 = CLASSIFICATION.resampled(found, ["no", "yes"])["f1"]
    assert set(f1) == {1.0} and CLASSIFICATION.metrics(found[1:], ["no", "yes"])["f1"] == 0.0
