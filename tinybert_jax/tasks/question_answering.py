"""Extractive question answering: the answer is a part of a text, or the text has none.

A row is [CLS] question [SEP] window of the text [SEP]; the windows of a long text overlap. The
model scores every token of a window as the start and as the end of the answer, and [CLS] as "no
answer in this window".
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tinybert_jax.batches.batch import TokenRows, Windows
from tinybert_jax.config.tasks import QuestionAnsweringTask
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import Reading
from tinybert_jax.data.squad import Answer, read_questions
from tinybert_jax.data.wordpiece import plain_backend
from tinybert_jax.metrics.spans import answer_scores
from tinybert_jax.models.heads import make_span_scorer
from tinybert_jax.tasks.task import Scored, Settings, Task, softmax

LABEL_NAMES = ("start", "end")  # of the two outputs of a token
_OVERLAP = 3  # two windows have a third of `max_length` in common
_LEAST_LENGTH = 8
_MAX_ANSWER = 30  # tokens
_NUM_BEST = 20  # answers that share the probability
_NUM_SHOWN = 3
_THRESHOLD = "no_answer_threshold"  # no answer where [CLS] scores higher than the best by more


def read(path: str, section: QuestionAnsweringTask, how: Reading) -> Examples:
    """Reads questions as `text`, texts as `text_pair`, a tuple of `Answer`s each as labels."""
    if how.split is not None:
        raise ValueError(
            f"{path}: expected no split for a file of questions, got {how.split!r}; leave it out"
        )
    found = read_questions(
        path, format=section.format, is_labelled=how.is_labelled, keep_blank=how.keep_blank
    )
    names = LABEL_NAMES if how.is_labelled else None
    return Examples(found.questions, found.texts, found.answers, names, found.articles)


def encode(tokenizer: Any, examples: Examples, max_length: int) -> TokenRows:
    """Windows of at most `max_length` tokens; `labels` mark the first of the answers.

    A window without the whole answer has its marks at [CLS]. A question is cut at half of
    `max_length`; `num_truncated` counts those.
    """
    texts = examples.text_pair
    if texts is None:
        raise ValueError("expected a text for every question, got none; give question and context")
    if max_length < _LEAST_LENGTH:
        raise ValueError(
            f"max_length: expected at least {_LEAST_LENGTH} tokens for a question and a part of a "
            f"text, got {max_length}; raise it"
        )
    backend = plain_backend(tokenizer)
    asked = [e.ids for e in backend.encode_batch(list(examples.text), add_special_tokens=False)]
    distinct = list(dict.fromkeys(texts))
    encoded = backend.encode_batch(distinct, add_special_tokens=False)
    by_text = {
        text: (np.array(e.ids, np.int32), np.array(e.offsets, np.int32).reshape(-1, 2))
        for text, e in zip(distinct, encoded, strict=True)
    }
    most = max_length // 2
    rows: list[_Window] = []
    for place, (question, text) in enumerate(zip(asked, texts, strict=True)):
        answer = None
        if examples.labels is not None and examples.labels[place]:
            answer = examples.labels[place][0]
        rows += _windows(tokenizer, place, question[:most], *by_text[text], answer, max_length)
    lengths = [len(row.ids) for row in rows]
    return TokenRows(
        ids=np.concatenate([row.ids for row in rows]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second=np.array([row.second for row in rows], np.int32),
        labels=None if examples.labels is None else np.concatenate([row.marks for row in rows]),
        num_truncated=sum(len(question) > most for question in asked),
        is_unit=np.concatenate([row.answerable for row in rows]),
        windows=Windows(
            np.array([row.example for row in rows]), np.concatenate([row.chars for row in rows])
        ),
    )


class _Window(NamedTuple):
    """A row; see `TokenRows` for the arrays."""

    example: int
    ids: np.ndarray
    second: int
    marks: np.ndarray
    answerable: np.ndarray
    chars: np.ndarray


def _windows(
    tokenizer: Any,
    example: int,
    question: Sequence[int],
    ids: np.ndarray,
    chars: np.ndarray,
    answer: Answer | None,
    max_length: int,
) -> list[_Window]:
    second = len(question) + 2
    room = max_length - second - 1
    step = room - min(max_length // _OVERLAP, room // 2)
    span = None if answer is None else _tokens_of(answer, chars)
    found = []
    for start in range(0, max(len(ids) - room, 0) + step, step):
        stop = min(start + room, len(ids))
        held = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id]
        length = second + stop - start + 1
        row = _Window(
            example,
            np.array([*held, *ids[start:stop], tokenizer.sep_token_id], np.int32),
            second,
            np.zeros((length, 2), np.float32),
            np.zeros(length, bool),
            np.zeros((length, 2), np.int32),
        )
        row.answerable[[0, *range(second, length - 1)]] = True
        row.chars[second : length - 1] = chars[start:stop]
        places = (0, 0)
        if span is not None and start <= span[0] and span[1] < stop:
            places = second + span[0] - start, second + span[1] - start
        row.marks[places, (0, 1)] = 1
        found.append(row)
    return found


def _tokens_of(answer: Answer, chars: np.ndarray) -> tuple[int, int] | None:
    """(first, last) token of the answer; None where no token has a part of it."""
    is_part = (chars[:, 1] > answer.start) & (chars[:, 0] < answer.start + len(answer.text))
    places = np.flatnonzero(is_part)
    return (int(places[0]), int(places[-1])) if places.size else None


class _Best(NamedTuple):
    """The best parts of a text for a question, best first, and the score of "no answer"."""

    scores: np.ndarray  # fp32 [answers], start + end
    spans: list[tuple[int, int]]  # characters of the text
    none: float


def _best(scored: Scored) -> list[_Best]:
    """Per example the best spans of all its windows."""
    rows, texts = scored.rows, scored.examples.text_pair
    assert rows.windows is not None and rows.is_unit is not None and texts is not None
    found: list[list[tuple[float, int, int]]] = [[] for _ in texts]
    none = np.full(len(texts), np.inf)
    for place, example in enumerate(rows.windows.examples):
        part = slice(rows.offsets[place], rows.offsets[place + 1])
        logits, chars = scored.logits[part], rows.windows.chars[part]
        none[example] = min(none[example], float(logits[0].sum()))
        tokens = np.flatnonzero(rows.is_unit[part])[1:]
        for score, first, last in _best_pairs(logits[tokens]):
            span = int(chars[tokens[first], 0]), int(chars[tokens[last], 1])
            found[example].append((score, *span))
    results = []
    for own, score in zip(found, none, strict=True):
        unique = {(start, end): value for value, start, end in sorted(own)}  # the highest stays
        best = sorted(unique.items(), key=lambda item: -item[1])[:_NUM_BEST]
        scores = np.array([value for _, value in best], np.float32)
        results.append(_Best(scores, [span for span, _ in best], float(score)))
    return results


def _best_pairs(logits: np.ndarray) -> list[tuple[float, int, int]]:
    """(start + end, first, last) of the best parts of at most `_MAX_ANSWER` tokens."""
    num_tokens = len(logits)
    longest = min(_MAX_ANSWER, num_tokens)
    if not num_tokens:
        return []
    sums = np.full((longest, num_tokens), -np.inf, np.float32)  # [length − 1, first]
    for more in range(longest):
        sums[more, : num_tokens - more] = logits[: num_tokens - more, 0] + logits[more:, 1]
    flat = sums.ravel()
    best = np.argpartition(-flat, min(_NUM_BEST, flat.size - 1))[:_NUM_BEST]
    more, first = np.divmod(best[np.isfinite(flat[best])], num_tokens)
    return [
        (float(sums[m, f]), int(f), int(f + m))
        for m, f in zip(more.tolist(), first.tolist(), strict=True)
    ]


def _is_answered(best: _Best, settings: Settings) -> bool:
    if not best.spans:
        return False
    threshold = settings.get(_THRESHOLD, math.inf)
    return best.none - float(best.scores[0]) <= threshold


def _text_of(best: _Best, text: str, settings: Settings) -> str:
    """The answer; "" for none."""
    if not _is_answered(best, settings):
        return ""
    start, end = best.spans[0]
    return text[start:end]


def tune(scored: Scored) -> Settings:
    """The threshold with the best F1; none where every question has an answer."""
    golds = scored.examples.labels
    if all(golds):
        return {}
    found, texts = _best(scored), scored.examples.text_pair or []
    gains = np.array(
        [
            answer_scores(_text_of(best, text, {}), [a.text for a in gold])[1] - (not gold)
            for best, text, gold in zip(found, texts, golds, strict=True)
        ]
    )
    margins = np.array([own.none - own.scores[0] if own.spans else np.inf for own in found])
    order = np.argsort(margins, kind="stable")
    totals = np.concatenate([[0.0], np.cumsum(gains[order])])  # with so many answered
    totals[1:][~np.isfinite(margins[order])] = -np.inf
    num_answered = int(np.argmax(totals))
    edges = margins[order][np.isfinite(margins[order])]
    if not edges.size:
        return {_THRESHOLD: 0.0}
    below = edges[num_answered - 1] if num_answered else edges[0] - 2.0
    above = edges[num_answered] if num_answered < len(edges) else below + 2.0
    return {_THRESHOLD: float((below + above) / 2)}


def outcomes(scored: Scored, settings: Settings) -> np.ndarray:
    """[n, 3]: exact match and F1 of each question, and whether it has an answer."""
    texts, rows = scored.examples.text_pair or [], []
    for best, text, golds in zip(_best(scored), texts, scored.examples.labels, strict=True):
        scores = answer_scores(_text_of(best, text, settings), [gold.text for gold in golds])
        rows.append((*scores, float(bool(golds))))
    return np.array(rows)


def metrics(found: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """F1 and exact match, as fractions; of questions with and without an answer if there are both.

    `f1_answerable` is the F1 of the questions that have an answer, `unanswerable` the share of the
    others that got none.
    """
    exact, f1, has_answer = found.T
    scores = {"f1": float(f1.mean()), "exact_match": float(exact.mean())}
    if 0 < has_answer.sum() < len(found):
        scores["f1_answerable"] = float(f1[has_answer > 0].mean())
        scores["unanswerable"] = float(exact[has_answer == 0].mean())
    return scores


def answers(scored: Scored, settings: Settings) -> list[dict[str, Any]]:
    """Per question `answer` ("" for none), `start` and `end` in the text, and `probability`.

    `candidates`: the best parts of the text, each with the same keys. A probability is that among
    the best parts of the text and, for a model with a threshold, "no answer".
    """
    found = []
    for best, text in zip(_best(scored), scored.examples.text_pair or [], strict=True):
        can_be_none = _THRESHOLD in settings or not best.spans
        scores = np.append(best.scores, best.none if can_be_none else -np.inf)
        probabilities = softmax(scores)
        candidates = [
            {"answer": text[start:end], "start": start, "end": end, "probability": float(share)}
            for (start, end), share in zip(best.spans, probabilities, strict=False)
        ]
        none = {"answer": "", "start": None, "end": None, "probability": float(probabilities[-1])}
        chosen = candidates[0] if _is_answered(best, settings) else none
        found.append({**chosen, "candidates": candidates[:_NUM_SHOWN]})
    return found


def in_words(answer: dict[str, Any]) -> str:
    """The answer, or that there is none."""
    return answer["answer"] or "no answer"


def count_labels(examples: Examples) -> np.ndarray:
    """[2]: the numbers of questions with and without an answer."""
    num_answered = sum(map(bool, examples.labels))
    return np.array([num_answered, len(examples.labels) - num_answered])


QUESTION_ANSWERING = Task(
    section=QuestionAnsweringTask,
    form=QuestionAnsweringTask.form,
    make_head=make_span_scorer,
    unit="span",
    read=read,
    encode=encode,
    count_labels=count_labels,
    floor=lambda examples: float(count_labels(examples)[1] / len(examples.labels)),
    floor_metric="f1",
    outcomes=outcomes,
    metrics=metrics,
    answers=answers,
    details=lambda scored, settings: {"settings": dict(settings)},
    in_words=in_words,
    truth=lambda examples: [own[0].text if own else "no answer" for own in examples.labels],
    hf_head="QuestionAnswering",
    problem_type=None,
    rights=lambda scored, settings: outcomes(scored, settings)[:, 0] > 0,
    tune=tune,
)
