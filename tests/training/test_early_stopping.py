"""The best of models trained side by side: each seed's own, frozen once its member is done."""

import numpy as np

from tinybert_jax.training.early_stopping import compare_with_best


def _run(evaluations, patience):
    """Kept scores, and the evaluation after which all was over; saved and restored in between."""
    scores, waited = None, None
    for number, each in enumerate(evaluations, start=1):
        standing = compare_with_best(each, scores, waited, patience)
        scores, waited = standing.best_scores, standing.evals_since_best
        if standing.is_over:
            return scores, number
    return scores, None


def test_each_seed_keeps_its_own_best():
    standing = compare_with_best({"a": [0.5, 0.7]}, {"a": [0.6, 0.6]}, {"a": 1}, 3)
    np.testing.assert_array_equal(standing.is_better["a"], [False, True])
    assert standing.best_scores == {"a": [0.6, 0.7]}
    assert standing.evals_since_best == {"a": 0}
    assert not standing.is_over


def test_an_equal_score_is_no_better():
    standing = compare_with_best({"a": [0.6]}, {"a": [0.6]}, {"a": 1}, 2)
    assert standing.evals_since_best == {"a": 2} and standing.is_over


def test_without_patience_nothing_ends():
    assert _run([{"a": [0.9]}] + [{"a": [0.1]}] * 50, None) == ({"a": [0.9]}, None)


def test_a_member_that_is_done_keeps_its_best_until_all_are():
    early = [[0.5, 0.5], [0.4, 0.4], [0.3, 0.3], [0.9, 0.9], [0.9, 0.9], [0.9, 0.9]]
    late = [[0.1, 0.1], [0.2, 0.1], [0.3, 0.1], [0.3, 0.2], [0.1, 0.1], [0.1, 0.2]]
    together = [{"early": a, "late": b} for a, b in zip(early, late, strict=True)]
    alone = [_run([{name: own[name]} for own in together], 2) for name in ("early", "late")]
    assert [over for _, over in alone] == [3, 6]
    assert _run(together, 2) == ({**alone[0][0], **alone[1][0]}, 6)
