"""Scores of answers that are parts of a text: exact match and F1 of words, as SQuAD defines them.

Rajpurkar et al. 2016 (arXiv 1606.05250) and 2018 (arXiv 1806.03822), section 5.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SIGNS = str.maketrans("", "", string.punctuation)


def words_of(answer: str) -> list[str]:
    """The words that are compared: lower case, without ASCII punctuation and articles."""
    return _ARTICLES.sub(" ", answer.lower().translate(_SIGNS)).split()


def answer_scores(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) of an answer, each against the gold answer for which it is highest.

    No gold answer, or only such without words, means that the text has none: the answer then has
    to be empty.
    """
    kept = [words for words in map(words_of, golds) if words] or [[]]
    words = words_of(answer)
    return float(words in kept), max(_f1(words, gold) for gold in kept)


def _f1(words: Sequence[str], gold: Sequence[str]) -> float:
    """2 · common / (words + gold); with an empty side 1 if both are empty, else 0."""
    if not words or not gold:
        return float(not words and not gold)
    return 2 * sum((Counter(words) & Counter(gold)).values()) / (len(words) + len(gold))
