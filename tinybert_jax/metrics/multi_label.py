"""Scores of predicted sets of labels: micro and macro F1, subset accuracy."""

import numpy as np
from jaxtyping import Float, Int


def multilabel_metrics(
    predictions: Int[np.ndarray, "n labels"],
    labels: Int[np.ndarray, "n labels"],
    absent_f1: Float[np.ndarray, " labels"] | None = None,
) -> dict[str, float]:
    """Micro F1, macro F1 and the share of examples with all labels correct, as fractions.

    The arrays hold 0 and 1. Macro F1 is the unweighted mean over labels; a label that occurs in
    neither array has F1 0, as in scikit-learn, or its `absent_f1`. Raises ValueError without
    examples.
    """
    f1 = f1_per_label(predictions, labels)
    correct, predicted, gold = _counts(predictions, labels)
    if absent_f1 is not None:
        f1 = np.where(predicted + gold > 0, f1, absent_f1)
    return {
        "f1_micro": _f1(correct.sum(), predicted.sum(), gold.sum()),
        "f1_macro": float(np.mean(f1)),
        "subset_accuracy": float((predictions == labels).all(axis=1).mean()),
    }


def f1_per_label(
    predictions: Int[np.ndarray, "n labels"], labels: Int[np.ndarray, "n labels"]
) -> Float[np.ndarray, " labels"]:
    """The F1 of each label; see `scores_per_label`."""
    return np.array([score["f1"] for score in scores_per_label(predictions, labels)])


def scores_per_label(
    predictions: Int[np.ndarray, "n labels"], labels: Int[np.ndarray, "n labels"]
) -> list[dict[str, float]]:
    """Precision, recall, F1 and support per label; a score with denominator 0 is 0.0."""
    assert predictions.shape == labels.shape, (predictions.shape, labels.shape)
    if not len(labels):
        raise ValueError("expected at least one example, got none; check the evaluation split")
    return [
        {
            "precision": float(c / p) if p else 0.0,
            "recall": float(c / g) if g else 0.0,
            "f1": _f1(c, p, g),
            "support": int(g),
        }
        for c, p, g in zip(*_counts(predictions, labels), strict=True)
    ]


def best_threshold(
    probabilities: Float[np.ndarray, "n labels"], labels: Int[np.ndarray, "n labels"]
) -> float:
    """The threshold for the probabilities of all labels that gives the best micro F1.

    Midway between the two probabilities that the threshold separates; 0.5 where no label occurs.
    """
    order = np.argsort(-probabilities, axis=None, kind="stable")
    ranked, hits = probabilities.ravel()[order], labels.ravel()[order]
    if not hits.any():
        return 0.5
    num_predicted = np.arange(1, len(hits) + 1)
    f1 = 2 * np.cumsum(hits) / (num_predicted + hits.sum())
    is_boundary = np.append(ranked[:-1] > ranked[1:], True)  # equal probabilities stay together
    last = int(np.argmax(np.where(is_boundary, f1, -1.0)))
    below = ranked[last + 1] if last + 1 < len(ranked) else 0.0
    return float((float(ranked[last]) + float(below)) / 2)


def _counts(predictions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Numbers of correct, predicted and gold occurrences per label."""
    return (predictions & labels).sum(0), predictions.sum(0), labels.sum(0)


def _f1(correct: np.integer, predicted: np.integer, gold: np.integer) -> float:
    return float(2 * correct / (predicted + gold)) if predicted + gold else 0.0
