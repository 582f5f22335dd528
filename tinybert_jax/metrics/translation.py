"""Scores of translations against references, by sacreBLEU (extra `translation`)."""

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

# Ways to split text into words; `zh` is for Chinese. sacreBLEU's others download models.
Words = Literal["13a", "intl", "zh", "char", "none"]
WORDS: tuple[str, ...] = get_args(Words)


class Score(NamedTuple):
    """A score of a corpus with what makes it comparable."""

    name: str
    value: float  # 0 to 100
    signature: str


def check_installed() -> None:
    """Raises ValueError without sacreBLEU."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise ValueError(
            "expected sacrebleu for the scores of translations, got none; install it with "
            "pip install 'tinybert-jax[translation]'"
        )


def translation_scores(
    translations: Sequence[str], references: Sequence[str], words: Words = "13a"
) -> list[Score]:
    """BLEU (arXiv 1804.08771) and chrF of a corpus with one reference a line."""
    assert len(translations) == len(references)
    found = []
    for metric in _metrics(words):
        score = metric.corpus_score(list(translations), [list(references)])
        found.append(Score(score.name, float(score.score), metric.get_signature().format()))
    return found


def sentence_counts(
    translations: Sequence[str], references: Sequence[str], words: Words = "13a"
) -> np.ndarray:
    """int64 [n, counts]: of each pair; the sum over pairs is what a corpus score is made of."""
    assert len(translations) == len(references)
    sides = list(translations), [list(references)]
    parts = [metric._extract_corpus_statistics(*sides) for metric in _metrics(words)]
    return np.concatenate([np.array(part, np.int64) for part in parts], axis=1)


def corpus_scores(counts: np.ndarray) -> dict[str, float]:
    """{bleu, chrf}, 0 to 100, of the pairs with these `sentence_counts`."""
    sums = counts.sum(0)
    bleu, chrf = _metrics("13a")  # words are counted already
    return {
        "bleu": float(bleu._compute_score_from_stats(sums[:_BLEU_COUNTS].tolist()).score),
        "chrf": float(chrf._compute_score_from_stats(sums[_BLEU_COUNTS:].tolist()).score),
    }


_BLEU_COUNTS = 10  # two lengths, and for one to four words the right ones and all


def _metrics(words: Words) -> tuple[Any, Any]:
    check_installed()
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU(tokenize=words), CHRF()
