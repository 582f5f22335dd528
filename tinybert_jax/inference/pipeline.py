"""`pipeline`: a model folder that answers calls with texts, as that of transformers does."""

import enum
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinybert_jax.data.examples import Examples
from tinybert_jax.inference.predict import Model
from tinybert_jax.tasks.classification import CLASSIFICATION
from tinybert_jax.tasks.task import softmax

# The hub's names of what a model does -> the head of transformers' model; None: sentence vectors.
_HEADS = {
    "text-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
    "sentence-similarity": None,
    "feature-extraction": None,
}
_ALIASES = {"sentiment-analysis": "text-classification"}
_ENTITY = {"label": "entity_group", "text": "word", "probability": "score"}


class _Default(enum.Enum):
    """What `top_k` is where none is given: None has a meaning."""

    BEST = "the best label, not in a list"


_DEFAULT = _Default.BEST


class Pipeline:
    """Answers calls; the model is read once. See `pipeline`."""

    def __init__(self, model: Model):
        self._model = model
        self._has_warned = False  # of texts that are cut

    def __call__(
        self,
        texts: str | Sequence[str] | None = None,
        text_pair: str | Sequence[str] | None = None,
        *,
        question: str | Sequence[str] | None = None,
        context: str | Sequence[str] | None = None,
        top_k: int | None | _Default = _DEFAULT,
    ) -> Any:
        """The answer to a text (or pair), or a list of answers to a list of them.

        Classification as in transformers: a list of one {label, score}, or of one for each text of
        a list; with `top_k` a list of so many labels for each text (None: all), the best first.
        Several labels: {labels, scores}. Regression: {score}. Tagging: a list of {entity_group,
        score, word, start, end}. Questions (`question` and `context`): {answer, score, start, end}.
        Sentence vectors: fp32 [dim] or [texts, dim]. Texts with more tokens than the model reads
        are cut, with one warning. Raises ValueError for a blank text.
        """
        first, second = (texts, text_pair) if question is None else (question, context)
        if first is None:
            raise ValueError("expected a text, or a question with its context, got neither")
        is_one = isinstance(first, str)
        rows = [first] if is_one else list(first)
        pairs = [second] * len(rows) if isinstance(second, str) else second
        self._check(rows, pairs)
        is_class = self._model.task.kind == CLASSIFICATION.kind
        _check_top(top_k, self._model.task.kind)
        answers = self._model.answer(
            Examples(rows, None if pairs is None else list(pairs), None, None)
        )
        self._warn()
        if "vector" in answers[0]:
            vectors = np.array([answer["vector"] for answer in answers], np.float32)
            return vectors[0] if is_one else vectors
        if is_class and not isinstance(top_k, _Default):
            ranked = [_ranked(answer, top_k) for answer in answers]
            return ranked[0] if is_one else ranked
        found = [_renamed(answer) for answer in answers]
        return found[0] if is_one and not is_class else found

    def _warn(self) -> None:
        told = self._model.cut_line()
        if told and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"{self._model.name}: {told}", stacklevel=3)

    def _check(self, rows: list[str], pairs: Sequence[str] | None) -> None:
        needs_context = self._model.task.unit == "span"
        if needs_context and pairs is None:
            raise ValueError("expected question=… and context=…, got one text; give both")
        if pairs is not None and len(pairs) != len(rows):
            raise ValueError(f"expected {len(rows)} second texts, got {len(pairs)}; give one each")
        blank = [place for place, text in enumerate([*rows, *(pairs or ())]) if not text.strip()]
        if blank or not rows:
            got = f"a blank one in place {blank[0] % len(rows) + 1}" if blank else "none"
            raise ValueError(f"expected texts, got {got}; fill it in, or remove it")


def pipeline(task: str, model: str | Path, *, max_length: int | None = None) -> Pipeline:
    """A `Pipeline` for `model`, a folder or hub id, in the way of `transformers.pipeline`.

    `task`: text-classification (or sentiment-analysis), token-classification, question-answering,
    sentence-similarity or feature-extraction. A model of classes answers as that of transformers
    does; for the others see `Pipeline.__call__`. Raises ValueError for a model of another task.
    """
    task = _ALIASES.get(task, task)
    if task not in _HEADS:
        raise ValueError(f"task: expected one of {[*_HEADS, *_ALIASES]}, got '{task}'; choose one")
    loaded = Model(str(model), max_length)
    if loaded.task.hf_head != _HEADS[task]:
        fits = next(name for name, own in _HEADS.items() if own == loaded.task.hf_head)
        raise ValueError(
            f"{model}: expected a model for {task}, got one for {loaded.task.kind}; "
            f"use pipeline('{fits}', …)"
        )
    return Pipeline(loaded)


def _check_top(top_k: Any, kind: str) -> None:
    if isinstance(top_k, _Default):
        return
    if kind != CLASSIFICATION.kind:
        raise ValueError(
            f"top_k: expected a model that gives a text one of several labels, got one of "
            f"{kind}; leave top_k out"
        )
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k: expected 1 or more, or None for all labels, got {top_k!r}")


def _ranked(answer: dict[str, Any], top_k: int | None) -> list[dict[str, Any]]:
    """The best labels of a text; [answer] where the outputs are not finite."""
    if "problem" in answer:
        return [_renamed(answer)]
    scores = softmax(np.array(list(answer["logits"].values()), np.float32))
    pairs = zip(answer["logits"], scores.tolist(), strict=True)
    found = [{"label": label, "score": score} for label, score in pairs]
    return sorted(found, key=lambda own: -own["score"])[:top_k]


def _renamed(answer: dict[str, Any]) -> Any:
    """An answer of a task with the keys of transformers."""
    if "problem" in answer:
        return answer
    if "entities" in answer:
        return [{_ENTITY.get(key, key): own for key, own in e.items()} for e in answer["entities"]]
    if "labels" in answer:
        return {"labels": answer["labels"], "scores": answer["probabilities"]}
    if "value" in answer or "similarity" in answer:
        return {"score": answer.get("value", answer.get("similarity"))}
    named = {"score" if key == "probability" else key: own for key, own in answer.items()}
    return {key: own for key, own in named.items() if key not in ("logits", "candidates")}
