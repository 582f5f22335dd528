"""Scores of sets of labels against scikit-learn; the threshold against all other thresholds."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from tinybert_jax.metrics.multi_label import best_threshold, multilabel_metrics, scores_per_label


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learn(seed, density):
    rng = np.random.default_rng(seed)
    labels = (rng.random((40, 6)) < density).astype(np.int32)
    predictions = (rng.random((40, 6)) < 0.3).astype(np.int32)
    predictions[:, 0] = labels[:, 1] = 0  # a label never predicted, and a label that never occurs
    got = multilabel_metrics(predictions, labels)
    for average in ("micro", "macro"):
        expected = f1_score(labels, predictions, average=average, zero_division=0.0)
        assert got[f"f1_{average}"] == pytest.approx(expected, abs=1e-12)
    assert got["subset_accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    expected = precision_recall_fscore_support(labels, predictions, zero_division=0.0)
    got = [[row[name] for row in scores_per_label(predictions, labels)] for name in NAMES]
    np.testing.assert_allclose(got, expected, atol=1e-12)


NAMES = ("precision", "recall", "f1", "support")


@pytest.mark.parametrize("seed", range(10))
def test_no_other_threshold_has_a_better_micro_f1(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (15, 3)).astype(np.int32)
    probabilities = np.round(rng.random((15, 3)), 1)  # with ties
    chosen = best_threshold(probabilities, labels)

    def score(threshold):
        return multilabel_metrics((probabilities >= threshold).astype(int), labels)["f1_micro"]

    assert score(chosen) == max(score(t) for t in np.linspace(0, 1.05, 211))


def test_the_threshold_without_any_label_is_one_half():
    assert best_threshold(np.full((3, 2), 0.7), np.zeros((3, 2), int)) == 0.5


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="expected at least one example, got none"):
        multilabel_metrics(np.zeros((0, 2), int), np.zeros((0, 2), int))
