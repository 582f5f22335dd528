"""Exact match and F1 of answers against the official definition, written out anew here."""

import random
import re
import string
from collections import Counter

import pytest

from tinybert_jax.metrics.spans import answer_scores

CASES = [
    ("the Eiffel Tower", ["Eiffel Tower"]),
    ("An apple, a day.", ["apple day", "apples"]),
    ("", []),
    ("something", []),
    ("", ["something"]),
    ("the", ["a"]),
    ("the", ["cat"]),
    ("cat cat dog", ["cat dog dog", "dog"]),
    ("U.S.", ["US", "U S"]),
    ("well-known", ["well known"]),
    ("thé atheist", ["atheist"]),
    ("«Rome»", ["Rome"]),
    ("1,000", ["1000"]),
    ("  two\twords\n", ["two words"]),
    ("!?", ["Rome"]),
    ("Rome", ["!?", "an"]),
]


def _normalised(text):
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _official(answer, golds):
    golds = [gold for gold in golds if _normalised(gold)] or [""]

    def f1(gold):
        words, wanted = _normalised(answer).split(), _normalised(gold).split()
        if not words or not wanted:
            return float(words == wanted)
        common = sum((Counter(words) & Counter(wanted)).values())
        if not common:
            return 0.0
        precision, recall = common / len(words), common / len(wanted)
        return 2 * precision * recall / (precision + recall)

    exact = max(float(_normalised(answer) == _normalised(gold)) for gold in golds)
    return exact, max(map(f1, golds))


@pytest.mark.parametrize(("answer", "golds"), CASES)
def test_edge_cases(answer, golds):
    assert answer_scores(answer, golds) == pytest.approx(_official(answer, golds))


def test_random_answers():
    draw = random.Random(0)
    words = ["a", "the", "an", "Rome", "rome.", "in", "18", "(old)", "-", "theme"]
    for _ in range(2000):
        sides = [" ".join(draw.choices(words, k=draw.randrange(5))) for _ in range(4)]
        golds = sides[1 : 1 + draw.randrange(4)]
        assert answer_scores(sides[0], golds) == pytest.approx(_official(sides[0], golds))


def test_known_values():
    assert answer_scores("the cat", ["A cat!"]) == (1.0, 1.0)
    assert answer_scores("black cat", ["cat"]) == (0.0, pytest.approx(2 / 3))
    assert answer_scores("", []) == (1.0, 1.0)
    assert answer_scores("cat", []) == (0.0, 0.0)
