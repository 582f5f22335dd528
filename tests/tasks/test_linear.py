"""The linear model beside the Transformers: its layout for each form, and real text."""

import os
from pathlib import Path

import numpy as np
import pytest

from tinybert_jax.config.tasks import ClassificationTask
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import read_task
from tinybert_jax.tasks import linear
from tinybert_jax.tasks.classification import CLASSIFICATION
from tinybert_jax.tasks.multi_label import MULTI_LABEL
from tinybert_jax.tasks.regression import REGRESSION
from tinybert_jax.tasks.table import TASKS
from tinybert_jax.tasks.task import Scored

TEXTS = ["tea and jam", "a dull film", "jam on toast", "a fine film"] * 5


def _score(task, train, examples):
    scores = linear.fit(task, train, examples)
    scored = Scored(scores.logits[0], None, examples)
    return scores, task.measure(scored, task.best_settings(scored))


def test_classes_that_no_training_row_has_are_never_predicted():
    labels = np.array([0, 2, 0, 2] * 5)
    train = Examples(TEXTS, None, labels, ("food", "sport", "film"))
    scores, metrics = _score(CLASSIFICATION, train, train)
    assert scores.logits[0].shape == (20, 3) and scores.logits[0].dtype == np.float32
    assert metrics["accuracy"] == 1.0 and (scores.logits[0][:, 1] == -30).all()
    # 9 words, 9 pairs of words and a bias, for each class
    words = {word for text in TEXTS for word in text.split()}
    pairs = {" ".join(text.split()[i : i + 2]) for text in TEXTS for i in range(2)}
    pairs = {pair for pair in pairs if " " in pair}
    assert scores.num_parameters == 3 * (len(words) + len(pairs) + 1)
    only = Examples(TEXTS, None, 0 * labels + 2, train.label_names)
    assert _score(CLASSIFICATION, only, only)[1]["accuracy"] == 1.0


def test_as_many_classes_as_rows_are_fitted_without_a_word_of_the_library():
    labels = np.arange(30)
    train = Examples([f"w{n}" for n in labels], None, labels, tuple(map(str, labels)))
    assert _score(CLASSIFICATION, train, train)[1]["accuracy"] == 1.0


def test_each_label_of_several_has_a_logit():
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]] * 5)
    train = Examples(TEXTS, None, labels, ("food", "film", "war"))
    scores, metrics = _score(MULTI_LABEL, train, train)
    assert scores.logits[0].shape == (20, 3) and metrics["f1_micro"] == 1.0
    assert (scores.logits[0][:, 2] < -20).all()


def test_a_pair_is_compared_by_the_cosine_of_its_texts():
    """Words alone cannot tell which pairs are alike: each word occurs in both kinds."""
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(30)]
    first = [" ".join(rng.choice(words, 6, replace=False)) for _ in range(400)]
    other = [" ".join(rng.choice(words, 6, replace=False)) for _ in range(400)]
    alike = rng.random(400) < 0.5
    second = [a if same else b for a, b, same in zip(first, other, alike, strict=True)]
    pairs = Examples(first, second, alike.astype(np.float32), None)
    scores, metrics = _score(REGRESSION, pairs.take(slice(300)), pairs.take(slice(300, None)))
    assert scores.logits[0].shape == (100, 1)
    assert metrics["pearson"] > 0.9


def test_words_of_a_sentence_have_no_linear_model():
    without = {kind for kind, task in TASKS.items() if not linear.can_fit(task)}
    assert without == {"tagging", "question_answering", "embeddings", "translation"}


def test_it_is_no_straw_man_on_reviews():
    folder = os.environ.get("TINYBERT_DATA")
    if not folder:
        pytest.skip("TINYBERT_DATA is not set")
    rows = Path(folder) / "cls" / "sst2"
    section = ClassificationTask(
        text="sentence",
        train=str(rows / "train.tsv"),
        dev=str(rows / "dev.tsv"),
        max_train_rows=5000,
    )
    data = read_task(section, CLASSIFICATION.read)
    assert _score(CLASSIFICATION, data.train, data.dev)[1]["accuracy"] > 0.75
