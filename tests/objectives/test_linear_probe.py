"""The linear probe against scikit-learn's linear models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from tinybert_jax.objectives.linear_probe import fit_head
from tinybert_jax.runs.head_init import _mean_loss

NUM, DIM = 60, 5
FEATURES = np.random.default_rng(0).normal(size=(NUM, DIM)).astype(np.float32)
SCALE = float(np.square(FEATURES).sum(1).mean())
WITH_ONE = np.concatenate([FEATURES, np.ones((NUM, 1))], axis=1)  # the bias is penalised too
LABELS = np.random.default_rng(1).integers(0, 3, NUM)


def _zero(num_outputs=3):
    return {"kernel": jnp.zeros((DIM, num_outputs)), "bias": jnp.zeros(num_outputs)}


def _logits(head):
    return FEATURES @ np.asarray(head["kernel"]) + np.asarray(head["bias"])


@pytest.mark.parametrize("c", [1.0, 100.0])
def test_classes_are_fitted_as_by_logistic_regression(c):
    head = fit_head(_zero(), FEATURES, LABELS, _mean_loss("softmax", False), c)
    theirs = LogisticRegression(C=c / SCALE, fit_intercept=False, tol=1e-8, max_iter=5000)
    wanted = theirs.fit(WITH_ONE, LABELS).predict_proba(WITH_ONE)
    np.testing.assert_allclose(jax.nn.softmax(_logits(head)), wanted, atol=1e-3)


def test_yes_or_no_outputs_are_fitted_one_by_one():
    targets = np.random.default_rng(1).integers(0, 2, (NUM, 3)).astype(np.int32)
    head = fit_head(_zero(), FEATURES, targets, _mean_loss("sigmoid", False), 2.0)
    for output in range(3):
        theirs = LogisticRegression(C=2.0 / SCALE, fit_intercept=False, tol=1e-8, max_iter=5000)
        wanted = theirs.fit(WITH_ONE, targets[:, output]).predict_proba(WITH_ONE)[:, 1]
        np.testing.assert_allclose(jax.nn.sigmoid(_logits(head)[:, output]), wanted, atol=1e-3)


def test_numbers_are_fitted_as_by_ridge_regression():
    values = np.random.default_rng(1).normal(size=NUM).astype(np.float32)
    head = fit_head(_zero(1), FEATURES, values, _mean_loss("square", False), 2.0)
    theirs = Ridge(alpha=SCALE / (2 * 2.0), fit_intercept=False).fit(WITH_ONE, values)
    np.testing.assert_allclose(head["kernel"][:, 0], theirs.coef_[:-1], atol=1e-3)
    np.testing.assert_allclose(head["bias"][0], theirs.coef_[-1], atol=1e-3)


@pytest.mark.parametrize("form", ["softmax", "sigmoid", "square"])
def test_a_teacher_whose_head_is_linear_is_found_again(form):
    teacher = np.random.default_rng(2).normal(size=(DIM, 3)).astype(np.float32)
    logits = FEATURES @ teacher
    head = fit_head(_zero(), FEATURES, logits, _mean_loss(form, True), 1e5)
    said, wanted = _logits(head), logits
    if form == "softmax":
        said, wanted = jax.nn.softmax(said), jax.nn.softmax(wanted)
    np.testing.assert_allclose(said, wanted, atol=2e-2)


def test_strong_regularisation_stays_near_the_start():
    start = {**_zero(), "kernel": jnp.asarray(np.random.default_rng(3).normal(size=(DIM, 3)))}
    far = {}
    for c in (1e-4, 1.0):
        head = fit_head(start, FEATURES, LABELS, _mean_loss("softmax", False), c)
        far[c] = float(jnp.abs(head["kernel"] - start["kernel"]).max())
    assert far[1e-4] < 1e-3 < 0.1 < far[1.0]


@pytest.mark.parametrize("c", [1.0, 100.0])
def test_a_class_that_nothing_has_stays_within_reach(c):
    head = fit_head(_zero(4), FEATURES, LABELS, _mean_loss("softmax", False), c)
    assert -5 < head["bias"][3] < 0 and jnp.abs(head["kernel"]).max() < 10


def test_the_loss_is_not_above_that_of_the_start_even_where_it_has_no_end():
    """Classes that a plane parts, and hardly a penalty: the weights would grow for ever."""
    labels = (FEATURES[:, 0] > 0).astype(np.int32)
    loss = _mean_loss("softmax", False)
    head = fit_head(_zero(2), 1e3 * FEATURES, labels, loss, 1e8)
    scaled = {name: np.asarray(leaf) for name, leaf in head.items()}
    assert all(np.isfinite(leaf).all() for leaf in scaled.values())
    said = 1e3 * FEATURES @ scaled["kernel"] + scaled["bias"]
    assert loss(jnp.asarray(said), jnp.asarray(labels)) < 0.1 * np.log(2)


@pytest.mark.parametrize("features", [np.full((2, DIM), np.nan, np.float32), FEATURES[:0]])
def test_features_that_cannot_be_fitted_are_refused(features):
    with pytest.raises(ValueError, match="linear probe: expected finite features of one unit"):
        fit_head(_zero(), features, LABELS[: len(features)], _mean_loss("softmax", False), 1.0)
