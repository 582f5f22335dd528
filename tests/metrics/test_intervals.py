"""Bootstrap intervals: their coverage of the truth in simulations, and pairing."""

import numpy as np
import pytest

from tinybert_jax.metrics.classification import classification_metrics
from tinybert_jax.metrics.intervals import interval, mean_over_seeds, resampled_scores

NUM_WORLDS, NUM_EXAMPLES, NUM_RESAMPLES = 1000, 400, 400


def _draw_answers(rng, num_examples):
    """(labels, answers of a good and of a poorer model), which err on the same hard examples."""
    labels = (rng.random(num_examples) < 0.4).astype(int)
    hardness = rng.normal(size=num_examples)

    def answers(skill):
        is_right = hardness + 0.5 * rng.normal(size=num_examples) < skill
        return np.where(is_right, labels, 1 - labels)

    return labels, answers(1.2), answers(0.9)


def _scores(labels, predictions):
    """Accuracy and F1 of class 1, [..., n] -> [...]."""
    hits = (labels & predictions).sum(-1)
    return {
        "accuracy": (labels == predictions).mean(-1),
        "f1": 2 * hits / (labels.sum(-1) + predictions.sum(-1)),
    }


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Of accuracy, F1 and paired differences; the truth is that of two million examples.

    The draws are those of `resampled_scores`; its scores are computed for all draws together here.
    """
    rng = np.random.default_rng(0)
    truth = [_scores(*pair) for pair in _pairs(_draw_answers(rng, 2_000_000))]
    covered = {(name, what): 0 for name in ("accuracy", "f1") for what in ("score", "difference")}
    for _ in range(NUM_WORLDS):
        drawn = []

        def record(rows, drawn=drawn):
            drawn.append(rows)
            return {"score": 0.0}

        resampled_scores(record, np.arange(NUM_EXAMPLES), num_resamples=NUM_RESAMPLES)
        world = [answers[np.stack(drawn)] for answers in _draw_answers(rng, NUM_EXAMPLES)]
        good, poor = (_scores(*pair) for pair in _pairs(world))
        for name in ("accuracy", "f1"):
            wanted = truth[0][name], truth[0][name] - truth[1][name]
            for what, values, true in zip(
                ("score", "difference"), (good[name], good[name] - poor[name]), wanted, strict=True
            ):
                low, high = interval(values)
                covered[name, what] += low <= true <= high
    shares = {key: count / NUM_WORLDS for key, count in covered.items()}
    assert all(0.93 <= share <= 0.97 for share in shares.values()), shares


def _pairs(world):
    labels, good, poor = world
    return (labels, good), (labels, poor)


def test_models_are_scored_on_the_same_draws_and_means_keep_them():
    rng = np.random.default_rng(1)
    labels, good, poor = _draw_answers(rng, 300)

    def metrics(found):
        return classification_metrics(found[:, 1], found[:, 0], 2)

    resampled = [
        resampled_scores(metrics, np.stack([labels, answers], axis=1), num_resamples=200)
        for answers in (good, poor, good)
    ]
    np.testing.assert_array_equal(resampled[0]["f1"], resampled[2]["f1"])
    paired = np.std(resampled[0]["accuracy"] - resampled[1]["accuracy"])
    independent = np.hypot(*(np.std(own["accuracy"]) for own in resampled[:2]))
    assert paired < 0.9 * independent
    mean = mean_over_seeds(resampled[:2])["accuracy"]
    np.testing.assert_allclose(
        mean, (resampled[0]["accuracy"] + resampled[1]["accuracy"]) / 2, rtol=1e-12
    )
    low, high = interval(resampled[0]["accuracy"])
    assert low < (labels == good).mean() < high


def test_an_interval_leaves_out_values_that_are_not_finite():
    values = np.append(np.linspace(0, 1, 1001), [np.nan, np.inf])
    assert interval(values) == pytest.approx((0.025, 0.975))
    assert interval(values, 0.5) == pytest.approx((0.25, 0.75))


def test_a_score_that_some_draws_lack_has_an_interval_of_the_others():
    """As that of the questions without an answer, of which a draw may have none."""

    def metrics(rows):
        own = rows[rows[:, 1] > 0, 0]
        return {"all": float(rows[:, 0].mean())} | ({"own": float(own.mean())} if len(own) else {})

    outcomes = np.stack([np.arange(100) % 2, np.arange(100) < 2], axis=1).astype(float)
    scores = resampled_scores(metrics, outcomes)
    assert 0.05 < np.isnan(scores["own"]).mean() < 0.25  # exp(-2) of the draws
    low, high = interval(scores["own"])
    assert 0 <= low <= high <= 1 and not np.isnan(scores["all"]).any()
