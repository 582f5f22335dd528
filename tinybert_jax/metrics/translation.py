"""Scores of translations against references, by sacreBLEU (extra `translation`)."""

import importlib.util
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

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
    check_installed()
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    assert len(translations) == len(references)
    found = []
    for metric in (BLEU(tokenize=words), CHRF()):
        score = metric.corpus_score(list(translations), [list(references)])
        found.append(Score(score.name, float(score.score), metric.get_signature().format()))
    return found
