"""Labels and scores text with a classifier folder: what `tinybert predict` and `evaluate` do."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tinybert_jax.batches.tokenize import MIN_TOKENS, tokenize_task
from tinybert_jax.data.tables import LabelledText, read_labelled
from tinybert_jax.evaluation.scorer import make_scorer, task_metrics
from tinybert_jax.huggingface.folder import HfModel, read_model, start_params
from tinybert_jax.huggingface.hub import check_table, load_tokenizer
from tinybert_jax.models.heads import make_classifier


class Classifier(NamedTuple):
    label_names: tuple[str, ...]
    regression: bool
    logits: np.ndarray


def predict(
    model: str,
    data: str | Sequence[str],
    *,
    text: str = "text",
    text_pair: str | None = None,
    split: str | None = None,
    max_length: int | None = None,
) -> list[dict[str, Any]]:
    """One row a text, in order: `label`, `probability`, `logits`; for regression `value`.

    `data` is a file or a list of texts. Texts longer than `max_length` (default: the model's
    positions) are cut.
    """
    if isinstance(data, str):
        labelled = read_labelled(data, text=text, text_pair=text_pair, label=None, split=split)
    else:
        empty = [number for number, sentence in enumerate(data, 1) if not sentence.strip()]
        if empty:
            raise ValueError(f"expected text in every sentence, got none in number {empty[0]}")
        labelled = LabelledText(list(data), None, None, None)
    scored = _score(model, labelled, max_length)
    if scored.regression:
        return [{"value": float(row[0])} for row in scored.logits]
    shifted = np.exp(scored.logits - scored.logits.max(-1, keepdims=True))
    probabilities = shifted / shifted.sum(-1, keepdims=True)
    return [
        {
            "label": scored.label_names[best],
            "probability": float(p[best]),
            "logits": [float(value) for value in row],
        }
        for best, p, row in zip(scored.logits.argmax(-1), probabilities, scored.logits, strict=True)
    ]


def evaluate_file(
    model: str,
    data: str,
    *,
    text: str = "text",
    text_pair: str | None = None,
    label: str = "label",
    split: str | None = None,
    max_length: int | None = None,
) -> dict[str, float]:
    """The task's metrics on labelled text; raw labels are the model's names or their ids."""
    source = _read_classifier(model)
    regression = source.problem_type == "regression"
    raw = _read(data, text, text_pair, label, split, source.label_names, regression)
    assert raw.labels is not None
    scored = _score(model, raw, max_length)
    return {
        **task_metrics(scored.logits, raw.labels, regression=regression),
        "num_examples": len(raw.text),
    }


def _read(data, text, text_pair, label, split, names, regression) -> LabelledText:
    options = {"text": text, "text_pair": text_pair, "label": label, "split": split}
    if regression:
        return read_labelled(data, regression=True, **options)
    found = read_labelled(data, **options)
    ids = tuple(str(i) for i in range(len(names)))
    raw = set(found.label_names or ())
    known = ids if raw <= set(ids) and not raw <= set(names) else names
    return read_labelled(data, labels=known, **options)


def _read_classifier(model: str) -> HfModel:
    source = read_model(model)
    if "classifier.weight" not in source.tensors:
        raise ValueError(
            f"{model}: expected a model with a classification head, found none; fine-tune it first "
            "(tinybert finetune)"
        )
    return source


def _score(model: str, labelled: LabelledText, max_length: int | None) -> Classifier:
    source = _read_classifier(model)
    tokenizer = load_tokenizer(model)
    check_table(tokenizer, source.config, "the model")
    positions = source.config.max_position_embeddings
    max_length = positions if max_length is None else max_length
    if not MIN_TOKENS <= max_length <= positions:
        raise ValueError(
            f"max_length: expected at least {MIN_TOKENS} and at most {positions} (the model's "
            f"positions), got {max_length}"
        )
    names = source.label_names or ()
    apply, init = make_classifier(source.config, len(names))
    params = start_params(model, init, whole=True)
    rows = tokenize_task(tokenizer, labelled, max_length)
    buckets = [width for width in (16, 32, 64, 128, 256) if width < max_length] + [max_length]
    score = make_scorer(apply, buckets=buckets, pad_token_id=tokenizer.pad_token_id)
    return Classifier(names, source.problem_type == "regression", score(params, rows))
