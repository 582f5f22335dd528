"""The comparison of students with teacher, baseline and linear model."""

import numpy as np
import pytest

from tinybert_jax.runs.results import compare_students


def _compare(**scores):
    """Comparisons of models with these accuracies on 2,000 resamples around them."""
    names = {"teacher": "big", "linear": "words"}
    rng = np.random.default_rng(0)
    models, resampled = [], {}
    for role, score in scores.items():
        name = names.get(role, "small")
        models.append({"role": role, "name": name, "metrics": {"accuracy": score}})
        resampled[role, name] = score + 0.01 * rng.normal(size=2000)
    return compare_students(models, resampled, "accuracy")["small"]


def test_the_gap_closed_is_the_share_of_the_teachers_lead():
    found = _compare(teacher=0.9, student=0.85, baseline=0.7, linear=0.8)
    assert found["gap_closed"]["value"] == pytest.approx(0.75)
    low, high = found["gap_closed"]["interval"]
    assert 0.5 < low < 0.72 and 0.78 < high < 1.0
    assert found["linear"]["difference"] == pytest.approx(0.05)
    low, high = found["baseline"]["interval"]
    assert high - low == pytest.approx(2 * 1.96 * 0.01 * np.sqrt(2), rel=0.1)


def test_a_lead_that_may_be_nothing_gives_the_gap_no_interval():
    found = _compare(teacher=0.71, student=0.7, baseline=0.695)
    assert found["gap_closed"]["interval"] is None
    assert found["gap_closed"]["value"] == pytest.approx(1 / 3)


def test_without_a_lead_of_the_teacher_there_is_no_gap():
    for teacher in (0.7, 0.6):
        found = _compare(teacher=teacher, student=0.65, baseline=0.7)
        assert "gap_closed" not in found and set(found) == {"teacher", "baseline"}
    assert set(_compare(student=0.65)) == set()
