"""The expected calibration error by hand, and of probabilities that are right by construction."""

import numpy as np
import pytest

from tinybert_jax.metrics.calibration import calibration


def test_two_bins_counted_by_hand():
    confidence = np.array([0.95, 0.91, 0.55, 0.51, 1.0])
    got = calibration(confidence, np.array([True, False, True, True, True]))
    assert got.count == [2, 3]
    assert got.confidence == pytest.approx([0.53, (0.95 + 0.91 + 1.0) / 3])
    assert got.accuracy == pytest.approx([1.0, 2 / 3])
    expected = (2 * (1 - 0.53) + 3 * abs(2 / 3 - (0.95 + 0.91 + 1.0) / 3)) / 5
    assert got.error == pytest.approx(expected)


def test_probabilities_that_come_true_have_an_error_near_0_and_bold_ones_the_excess():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1.0, 200_000)
    is_right = rng.random(len(confidence)) < confidence
    assert calibration(confidence, is_right).error < 0.005
    shifted = np.minimum(confidence + 0.1, 1.0)
    bold = calibration(shifted, rng.random(len(confidence)) < confidence)
    assert bold.error == pytest.approx(np.mean(shifted - confidence), abs=0.005)
