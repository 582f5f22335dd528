"""Embeddings: a vector per text. Pairs of texts with scores measure them by their cosines."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinybert_jax.batches.batch import TokenRows
from tinybert_jax.batches.tokenize import tokenize_texts
from tinybert_jax.config.tasks import EmbeddingsTask
from tinybert_jax.data.corpus import is_plain_text, read_lines
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import Reading
from tinybert_jax.data.tables import read_labelled
from tinybert_jax.huggingface.sentence_folder import (
    SentenceFolder,
    read_sentence_folder,
    sentence_files,
)
from tinybert_jax.metrics.cosines import cosines, unit_vectors
from tinybert_jax.metrics.regression import regression_metrics
from tinybert_jax.models.heads import make_sentence_encoder
from tinybert_jax.settings.section import Pooling
from tinybert_jax.tasks.classification import columns_of
from tinybert_jax.tasks.task import Scored, Settings, Task


def read(path: str, section: EmbeddingsTask, how: Reading) -> Examples:
    """Reads texts, with their partners, negatives and scores as `section.rows` has them."""
    is_scored = how.is_labelled and (how.is_dev or section.has_scores)
    columns = columns_of(section, how.is_dev, is_scored)
    if how.is_dev and not columns["text_pair"]:
        raise ValueError(
            f"{path}: expected pairs of texts with scores, got no column of a second text; set "
            "text_pair, or for dev alone dev_columns: {text_pair: …}"
        )
    if is_plain_text(path, section.format):
        if is_scored or section.rows != "sentences":
            what = "scores" if is_scored else section.rows
            raise ValueError(f"{path}: expected {what}, got plain text; give a table with columns")
        return Examples(read_lines(path, keep_blank=how.keep_blank), None, None, None)
    columns |= {"format": "auto"} if section.format == "text" else {}
    options: dict[str, Any] = {"split": how.split, "keep_blank": how.keep_blank}
    examples = read_labelled(path, **columns, numbers=is_scored, **options)
    if section.rows == "triplets" and not how.is_dev and how.is_labelled:
        third = {**columns, "text": section.negative, "text_pair": None}
        return examples._replace(negatives=list(read_labelled(path, **third, **options).text))
    return examples


def encode(tokenizer: Any, examples: Examples, max_length: int) -> TokenRows:
    """A row per text; the texts of an example are in rows one after the other."""
    parts = (examples.text, examples.text_pair, examples.negatives)
    texts = [part for part in parts if part is not None]
    labels = None if examples.labels is None else np.repeat(examples.labels, len(texts))
    flat = [text for own in zip(*texts, strict=True) for text in own]
    return tokenize_texts(tokenizer, Examples(flat, None, labels, None), max_length)


def pair_cosines(scored: Scored, width: int | None = None) -> np.ndarray:
    """fp64 [n]: between the two texts of each example, of the first `width` columns."""
    return cosines(scored.logits[::2, :width], scored.logits[1::2, :width])


def metrics(found: np.ndarray, names: Sequence[str], widths: Sequence[int]) -> dict[str, float]:
    """Spearman and Pearson correlation of cosines and scores; `spearman_64` of the first 64."""

    def correlations(column: int) -> dict[str, float]:
        return regression_metrics(found[:, column], found[:, 0])

    whole = correlations(1)
    narrow = {f"spearman_{w}": correlations(2 + i)["spearman"] for i, w in enumerate(widths)}
    return {"spearman": whole["spearman"], "pearson": whole["pearson"], **narrow}


def answers(scored: Scored, settings: Settings, normalise: bool) -> list[dict[str, Any]]:
    """The `similarity` of the two texts of each example, or the `vector` of its only one."""
    if scored.examples.text_pair is not None:
        return [{"similarity": float(value)} for value in pair_cosines(scored)]
    vectors = unit_vectors(scored.logits) if normalise else scored.logits
    return [{"vector": [float(value) for value in row]} for row in vectors]


def in_words(answer: dict[str, Any]) -> str:
    """The similarity, or the width of the vector."""
    if "similarity" in answer:
        return f"{answer['similarity']:.2f}"
    return f"{len(answer['vector'])} numbers"


def rights(scored: Scored, settings: Settings) -> np.ndarray:
    """bool [n]: cosines whose score by the line of least squares is within half a deviation."""
    labels, found = np.asarray(scored.examples.labels, np.float64), pair_cosines(scored)
    slope, offset = np.polyfit(found, labels, 1)
    return np.abs(slope * found + offset - labels) <= labels.std() / 2


def _check_pooling(folder: Path, pooling: Pooling) -> None:
    own = read_sentence_folder(folder)
    if own is not None and own.pooling != pooling:
        raise ValueError(
            f"task.pooling: expected {own.pooling}, as the model in {folder} pools its tokens, got "
            f"{pooling}; set task.pooling={own.pooling}"
        )


@functools.lru_cache(maxsize=64)
def make_embeddings(
    pooling: Pooling = "mean",
    normalise: bool = True,
    widths: tuple[int, ...] = (),
    max_length: int | None = None,
) -> Task:
    """The task with its settings; `max_length`: tokens of a text if a model's folder says it."""
    own = SentenceFolder(pooling, normalise, max_length)

    def outcomes(scored: Scored, settings: Settings) -> np.ndarray:
        """[n, 2 + widths]: the score and the cosines of each example."""
        given = [pair_cosines(scored, width) for width in (None, *widths)]
        return np.stack([np.asarray(scored.examples.labels, np.float64), *given], axis=1)

    return Task(
        section=EmbeddingsTask,
        form=EmbeddingsTask.form,
        make_head=functools.partial(make_sentence_encoder, pooling=pooling),
        unit="text",
        read=read,
        encode=encode,
        count_labels=lambda examples: np.zeros(0, np.int64),
        floor=lambda examples: None,
        floor_metric="spearman",
        outcomes=outcomes,
        metrics=functools.partial(metrics, widths=widths),
        answers=functools.partial(answers, normalise=normalise),
        details=lambda scored, settings: {},
        in_words=in_words,
        truth=lambda examples: [f"{label:.3g}" for label in examples.labels],
        hf_head=None,
        problem_type=None,
        rights=rights,
        configure=lambda section, target_tokenizer: make_embeddings(
            section.pooling, section.normalise, section.widths
        ),
        max_length=max_length,
        normalises=normalise,
        more_files=functools.partial(sentence_files, own),
        check_folder=functools.partial(_check_pooling, pooling=pooling),
    )


EMBEDDINGS = make_embeddings()
