"""The fitted head against scikit-learn's linear models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from tinybert_jax.losses.forms import FORMS
from tinybert_jax.objectives.linear_probe import fit_head

NUM, DIM = 60, 5
FEATURES = np.random.default_rng(0).normal(size=(NUM, DIM)).astype(np.float32)
SCALE = float(np.square(FEATURES).sum(1).mean())
ZERO = {"kernel": jnp.zeros((DIM, 3)), "bias": jnp.zeros(3)}


def _loss(form, targets, *, of_teacher=False):
    chosen = FORMS[form].teacher_loss if of_teacher else FORMS[form].label_loss
    ones = jnp.ones(NUM)
    return functools.partial(lambda logits: chosen(logits, targets, ones, count=ones.sum()))


@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_classes_are_fitted_as_by_logistic_regression(strength):
    labels = np.random.default_rng(1).integers(0, 3, NUM)
    head = fit_head(ZERO, FEATURES, _loss("softmax", jnp.asarray(labels)), strength)
    theirs = LogisticRegression(C=strength / SCALE, tol=1e-8, max_iter=5000).fit(FEATURES, labels)
    ours = jax.nn.softmax(FEATURES @ head["kernel"] + head["bias"][None])
    np.testing.assert_allclose(ours, theirs.predict_proba(FEATURES), atol=2e-3)


def test_numbers_are_fitted_as_by_ridge_regression():
    values = np.random.default_rng(1).normal(size=NUM).astype(np.float32)
    start = {"kernel": jnp.zeros((DIM, 1)), "bias": jnp.zeros(1)}
    head = fit_head(start, FEATURES, _loss("square", jnp.asarray(values)), 2.0)
    theirs = Ridge(alpha=SCALE / (2 * 2.0)).fit(FEATURES, values)
    np.testing.assert_allclose(head["kernel"][:, 0], theirs.coef_, atol=1e-3)
    np.testing.assert_allclose(head["bias"][0], theirs.intercept_, atol=1e-3)


@pytest.mark.parametrize("form", ["softmax", "sigmoid", "square"])
def test_a_teacher_whose_head_is_linear_is_found_again(form):
    teacher = np.random.default_rng(2).normal(size=(DIM, 3)).astype(np.float32)
    logits = jnp.asarray(FEATURES @ teacher)
    head = fit_head(ZERO, FEATURES, _loss(form, logits, of_teacher=True), 1e5)
    said = FEATURES @ head["kernel"] + head["bias"][None]
    if form == "softmax":
        said, logits = jax.nn.softmax(said), jax.nn.softmax(logits)
    np.testing.assert_allclose(said, logits, atol=3e-2)


def test_a_weak_fit_stays_near_its_start():
    labels = jnp.asarray(np.random.default_rng(1).integers(0, 3, NUM))
    start = {**ZERO, "kernel": jnp.asarray(np.random.default_rng(3).normal(size=(DIM, 3)))}
    far = {}
    for strength in (1e-4, 1.0):
        head = fit_head(start, FEATURES, _loss("softmax", labels), strength)
        far[strength] = float(jnp.abs(head["kernel"] - start["kernel"]).max())
    assert far[1e-4] < 1e-3 < 0.1 < far[1.0]
