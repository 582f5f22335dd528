"""Classification and regression metrics against SciPy, closed forms and cases counted by hand."""

import tracemalloc

import numpy as np
import pytest
from scipy import stats

from tinybert_jax.metrics.classification import (
    classification_metrics,
    confusion_matrix,
    frequent_mistakes,
    predicted_classes,
)
from tinybert_jax.metrics.regression import regression_metrics


def one_hot(classes, num_labels):
    """Logits whose arg-max is exactly these classes."""
    return np.eye(num_labels)[classes]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_rows_of_the_confusion_matrix_are_true_classes():
    counts = confusion_matrix(np.array([1, 1, 0, 2]), np.array([0, 1, 0, 1]), 3)
    np.testing.assert_array_equal(counts, [[1, 1, 0], [0, 1, 1], [0, 0, 0]])


def test_binary_metrics_equal_a_count_by_hand():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    labels = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    predictions = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    got = classification_metrics(predictions, labels, 2)
    assert got["accuracy"] == pytest.approx(0.7)
    assert got["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert got["matthews"] == pytest.approx((3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6))


def test_binary_matthews_is_the_pearson_correlation_of_the_classes(rng):
    labels, predictions = rng.integers(0, 2, (2, 200))
    got = classification_metrics(predictions, labels, 2)
    assert got["matthews"] == pytest.approx(stats.pearsonr(predictions, labels).statistic)


def test_multiclass_matthews_is_the_correlation_of_one_hot_matrices(rng):
    labels, predictions = rng.integers(0, 5, (2, 300))
    x, y = (m - m.mean(0) for m in (one_hot(predictions, 5), one_hot(labels, 5)))
    expected = np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y))
    got = classification_metrics(predictions, labels, 5)
    assert got["matthews"] == pytest.approx(expected)


def test_macro_f1_is_the_mean_over_the_classes_of_the_labels(rng):
    labels, predictions = rng.integers(0, 3, (2, 100))
    scores = []
    for c in range(3):
        hits = np.sum((predictions == c) & (labels == c))
        precision, recall = hits / np.sum(predictions == c), hits / np.sum(labels == c)
        scores.append(2 * precision * recall / (precision + recall))
    # A fourth class that is neither a label nor a prediction must not lower the mean.
    for num_labels in (3, 4):
        got = classification_metrics(predictions, labels, num_labels)
        assert got["f1"] == pytest.approx(np.mean(scores))


def test_a_class_that_is_predicted_alone_does_not_join_the_mean():
    labels, predictions = np.array([0, 0, 1, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 2])
    got = classification_metrics(predictions, labels, 3)
    assert got["f1"] == pytest.approx((1 + 6 / 7) / 2)


def test_perfect_and_inverted_predictions_score_1_and_0():
    labels = np.array([0, 1, 1, 0])
    perfect = classification_metrics(labels, labels, 2)
    assert perfect == {"accuracy": 1.0, "f1": 1.0, "matthews": 1.0}
    inverted = classification_metrics(1 - labels, labels, 2)
    assert inverted == {"accuracy": 0.0, "f1": 0.0, "matthews": -1.0}


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_constant_prediction_has_matthews_correlation_zero(num_labels):
    labels = np.array([0, 1, 0, 1, 0])
    got = classification_metrics(np.zeros(5, int), labels, num_labels)
    assert got["matthews"] == 0.0
    assert got["accuracy"] == pytest.approx(0.6)


def test_regression_equals_scipy_with_ties(rng):
    labels = rng.integers(0, 6, 150).astype(np.float32)  # like STS-B: many equal scores
    predictions = np.round(labels + rng.normal(size=150), 1).astype(np.float32)
    got = regression_metrics(predictions, labels)
    assert got["pearson"] == pytest.approx(stats.pearsonr(predictions, labels).statistic, rel=1e-6)
    assert got["spearman"] == pytest.approx(stats.spearmanr(predictions, labels).statistic)
    assert got["mse"] == pytest.approx(np.mean((predictions.astype(float) - labels) ** 2))


def test_correlation_ignores_scale_and_shift(rng):
    labels, noise = rng.normal(size=(2, 50))
    predictions = labels + noise
    expected = regression_metrics(predictions, labels)
    for scale in (1e-200, 1e200):
        with np.errstate(over="ignore", under="ignore"):
            got = regression_metrics(scale * predictions, labels)
        assert got["pearson"] == pytest.approx(expected["pearson"])
    got = regression_metrics(np.exp(predictions), labels)
    assert got["spearman"] == pytest.approx(expected["spearman"])


def test_constant_predictions_correlate_zero_not_nan():
    # 0.1 in float32: the mean of equal values may round to another value.
    got = regression_metrics(np.full(7, 0.1, np.float32), np.arange(7.0, dtype=np.float32))
    assert got["pearson"] == 0.0
    assert got["spearman"] == 0.0
    assert regression_metrics(np.array([1.0]), np.array([3.0])) == {
        "pearson": 0.0,
        "spearman": 0.0,
        "mse": 4.0,
    }


def test_bad_inputs_raise_an_error_that_names_the_mistake():
    with pytest.raises(ValueError, match="at least one example"):
        classification_metrics(np.zeros(0, int), np.zeros(0, int), 2)
    with pytest.raises(ValueError, match=r"labels in 0\.\.1, got -1\.\.0"):
        classification_metrics(np.zeros(2, int), np.array([0, -1]), 2)
    with pytest.raises(ValueError, match="regression_metrics"):
        predicted_classes(np.zeros((2, 1)))
    with pytest.raises(ValueError, match="2 NaN and 0 infinite of 4"):
        predicted_classes(np.array([[np.nan, 0], [np.nan, 1]]))
    with pytest.raises(ValueError, match="1 NaN and 1 infinite of 3"):
        regression_metrics(np.array([np.nan, 1.0, np.inf]), np.array([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("num_classes", [2, 3, 40])
def test_the_scores_are_those_of_the_confusion_matrix(rng, num_classes):
    labels, predictions = rng.integers(0, num_classes, (2, 500))
    predictions = np.where(rng.random(500) < 0.6, labels, predictions)
    counts = confusion_matrix(predictions, labels, num_classes)
    got = classification_metrics(predictions, labels, num_classes)
    f1 = 2 * np.diag(counts) / (counts.sum(0) + counts.sum(1))
    assert got["accuracy"] == np.trace(counts) / counts.sum()
    assert got["f1"] == (f1[1] if num_classes == 2 else f1.mean())
    wrong = counts - np.diag(np.diag(counts))
    pairs = sorted(
        ((-wrong[i, j], i, j) for i, j in zip(*np.nonzero(wrong), strict=True)),
    )
    expected = [(i, j, -count) for count, i, j in pairs[:7]]
    assert frequent_mistakes(predictions, labels, 7) == expected
    assert frequent_mistakes(labels, labels, 7) == []


def test_scores_of_many_classes_take_little_memory(rng):
    num_classes = 100_000
    labels = rng.integers(0, num_classes, 300)
    predictions = np.where(np.arange(300) < 200, labels, 0)
    tracemalloc.start()
    got = classification_metrics(predictions, labels, num_classes)
    pairs = frequent_mistakes(predictions, labels, 15)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got["accuracy"] == pytest.approx(np.mean(predictions == labels))
    assert len(pairs) == 15 and all(predicted == 0 for _, predicted, _ in pairs)
    assert peak < 20e6  # a matrix would take 80 GB
