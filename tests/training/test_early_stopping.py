"""The best scores of several models and seeds, and the end of training."""

import numpy as np

from tinybert_jax.training.early_stopping import compare_with_best


def _run(evaluations, patience):
    """(best scores, number of the evaluation that ended training or None)."""
    scores, num_evals = None, None
    for number, new_scores in enumerate(evaluations, start=1):
        standing = compare_with_best(new_scores, scores, num_evals, patience)
        scores, num_evals = standing.best_scores, standing.evals_since_best
        if standing.is_over:
            return scores, number
    return scores, None


def test_every_seed_has_a_best_score():
    standing = compare_with_best({"a": [0.5, 0.7]}, {"a": [0.6, 0.6]}, {"a": 1}, 3)
    np.testing.assert_array_equal(standing.is_better["a"], [False, True])
    assert standing.best_scores == {"a": [0.6, 0.7]}
    assert standing.evals_since_best == {"a": 0}
    assert not standing.is_over


def test_an_equal_score_is_no_improvement():
    standing = compare_with_best({"a": [0.6]}, {"a": [0.6]}, {"a": 1}, 2)
    assert standing.evals_since_best == {"a": 2} and standing.is_over


def test_training_without_patience_does_not_end():
    assert _run([{"a": [0.9]}] + [{"a": [0.1]}] * 50, None) == ({"a": [0.9]}, None)


def test_a_member_that_is_done_keeps_its_best_until_all_members_are_done():
    early = [[0.5, 0.5], [0.4, 0.4], [0.3, 0.3], [0.9, 0.9], [0.9, 0.9], [0.9, 0.9]]
    late = [[0.1, 0.1], [0.2, 0.1], [0.3, 0.1], [0.3, 0.2], [0.1, 0.1], [0.1, 0.2]]
    together = [{"early": a, "late": b} for a, b in zip(early, late, strict=True)]
    alone = [_run([{name: e[name]} for e in together], 2) for name in ("early", "late")]
    assert [end for _, end in alone] == [3, 6]
    assert _run(together, 2) == ({**alone[0][0], **alone[1][0]}, 6)
