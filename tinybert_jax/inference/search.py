"""`tinybert search`: the texts of a file that are closest to a question.

Without an index the search is exact.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinybert_jax.data.corpus import is_plain_text, read_lines
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.guess import guess_text
from tinybert_jax.data.tables import format_of, read_table, texts_in
from tinybert_jax.inference.predict import Model, embed
from tinybert_jax.inference.vector_index import search_index
from tinybert_jax.metrics.cosines import unit_vectors

_BLOCK = 16_384  # texts or questions whose cosines are in memory at one time
_CANDIDATES = 50  # texts that a second model reads


def search(
    model: str,
    data: str,
    questions: Sequence[str],
    *,
    top: int = 5,
    text: str | None = None,
    label: str | None = None,
    split: str | None = None,
    max_length: int | None = None,
    width: int | None = None,
    index: str | Path | None = None,
    rerank: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One object per question: `question` and its `results`, the closest texts of `data` first.

    A result has the `row` of the file from 1, `score` (the cosine), `text`, and `label`, the value
    of that column. `data`: a table whose column `text` is searched (None: see `read_texts`), or
    plain text, a text a line.
    `index`: a folder that keeps the vectors of the texts (see `vector_index`). `rerank`: a
    regression model of pairs, which reads the question with each of the closest texts, `top` or
    `_CANDIDATES` if that is more, cut at its own positions; `score` is its number then, and
    `cosine` the cosine. Raises ValueError for a model of another task and text that cannot be read.
    """
    if top < 1:
        raise ValueError(f"top: expected at least 1 result, got {top}; raise it")
    second = None if rerank is None else _pair_model(rerank)
    rows, texts, labels = read_texts(data, text, label, split, say)
    options = {"max_length": max_length, "width": width}
    asked = embed(model, questions, **options)
    make_vectors = functools.partial(embed, model, texts, **options)
    num_read = top if second is None else max(top, _CANDIDATES)
    if index is None:
        scores, places = nearest(make_vectors(), asked, num_read)
    else:
        place = Path(index)
        scores, places = search_index(place, model, texts, options, asked, num_read, make_vectors)
    found = []
    for question, own, near in zip(questions, scores, places, strict=True):
        results = []
        for score, place in zip(own.tolist(), near.tolist(), strict=True):
            result = {"row": rows[place], "score": round(score, 6), "text": texts[place]}
            results.append(result | ({} if labels is None else {"label": labels[place]}))
        if second is not None:
            results = _reranked(second, question, results)[:top]
        found.append({"question": question, "results": results})
    return found


def _pair_model(path: str) -> Model:
    """The model that reads a question and a text together; ValueError for another one."""
    loaded = Model(path)
    gives_numbers = loaded.task.form == "square" and loaded.task.unit == "row"
    if not gives_numbers or not loaded.head.reads_pairs:
        got = f"{loaded.task.kind} of {'pairs' if loaded.head.reads_pairs else 'single texts'}"
        raise ValueError(
            f"{path}: expected a regression of pairs to rank with, got {got}; train one: tinybert "
            "run --data pairs.csv --task regression"
        )
    return loaded


def _reranked(
    model: Model, question: str, results: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The results by the model's number for question and text, the highest first."""
    texts = [result["text"] for result in results]
    answers = model.answer(Examples([question] * len(texts), texts, None, None))
    if any(answer["value"] is None for answer in answers):
        raise ValueError(
            f"{model.name}: expected finite outputs, got NaN or infinite ones for {question!r}; "
            "the weights have diverged or are too large: take another checkpoint"
        )
    ranked = [
        {**result, "score": round(answer["value"], 6), "cosine": result["score"]}
        for result, answer in zip(results, answers, strict=True)
    ]
    return sorted(ranked, key=lambda result: -result["score"])


def nearest(
    vectors: np.ndarray, queries: np.ndarray, top: int, *, block: int = _BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, places) [queries, top] of the closest vectors, the highest first; exact.

    Of equal cosines the earlier place comes first. Fewer than `top` where there are fewer vectors.
    """
    top = min(top, len(vectors))
    scores = np.full((len(queries), top), -np.inf, np.float32)
    places = np.zeros((len(queries), top), np.int64)
    units, asked = (unit_vectors(own).astype(np.float32) for own in (vectors, queries))
    for begin in range(0, len(asked), block):
        some = slice(begin, begin + block)
        for start in range(0, len(units), block):
            cosines = asked[some] @ units[start : start + block].T
            chosen = np.argpartition(-cosines, min(top, cosines.shape[1]) - 1, axis=1)[:, :top]
            values = np.concatenate(
                [scores[some], np.take_along_axis(cosines, chosen, axis=1)], axis=1
            )
            where = np.concatenate([places[some], chosen + start], axis=1)
            order = np.lexsort((where, -values), axis=1)[:, :top]
            scores[some] = np.take_along_axis(values, order, axis=1)
            places[some] = np.take_along_axis(where, order, axis=1)
    return scores, places


class Texts(NamedTuple):
    """The texts of a file."""

    rows: Sequence[int]  # from 1; of plain text the lines, blank ones left out
    texts: list[str]
    labels: list[Any] | None  # values of another column


def read_texts(
    path: str,
    text: str | None = None,
    label: str | None = None,
    split: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Texts:
    """The column `text` of a table, or the lines of plain text; see `search`.

    Without `text`: the column of that name, else the only one with a name of text (`guess_text`);
    `say` is told which.
    """
    if is_plain_text(path, "auto"):
        if label is not None:
            raise ValueError(
                f"{path}: expected no label for plain text, got {label!r}; remove it, or give a "
                "table with columns"
            )
        lines = enumerate(read_lines(path, keep_blank=True), 1)
        filled = [(number, line) for number, line in lines if line]
        return Texts([number for number, _ in filled], [line for _, line in filled], None)
    if text is None:
        guess = guess_text(path, {"train_split": split, "label": label}, {}, reads_pairs=None)
        text = guess.settings.get("text", "text")
        if guess.told:
            say(f"{path}: {guess.told}; if not: --text")
    wanted = [text] if label is None else [text, label]
    table = read_table(path, format_of(path, "auto"), split, wanted)
    texts = texts_in(table, text)
    labels = None if label is None else table.columns[label]
    return Texts(range(1, len(texts) + 1), texts, labels)
