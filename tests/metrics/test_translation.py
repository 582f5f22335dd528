"""Scores of translations: closed forms, and the signature that makes them comparable."""

import pytest

from tinybert_jax.metrics.translation import translation_scores

LINES = ["ein Hund läuft über die Wiese .", "zwei Kinder spielen am Strand ."]


def test_scores_of_corpora():
    bleu, chrf = translation_scores(LINES, LINES)
    assert (bleu.name, chrf.name) == ("BLEU", "chrF2")
    assert bleu.value == pytest.approx(100) and chrf.value == pytest.approx(100)
    assert "tok:13a" in bleu.signature and "version:" in bleu.signature
    worse, _ = translation_scores(["ein Hund läuft .", LINES[1]], LINES)
    # n-grams found / made: 10/10, 8/8 − 1, 5/6 − 1, 3/4 − 1 of 4 + 6 words against 7 + 6
    assert 0 < worse.value < 80
    chinese = ["一个男人在公园里跑步。"], ["一个男人在公园里跑。"]
    by_word, by_character = (translation_scores(*chinese, words)[0] for words in ("13a", "zh"))
    assert by_word.value < 1e-6 < 50 < by_character.value
    assert "tok:zh" in by_character.signature
