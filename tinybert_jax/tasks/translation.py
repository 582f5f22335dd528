"""Translation: a text for each text. A unit is a token of a target, a class a word.

A model is scored by the texts that it makes, not by its logits.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinybert_jax.batches.tokenize import tokenize_pairs
from tinybert_jax.config.task_kinds import TranslationTask
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.parallel import check_sides, read_parallel, without_blank
from tinybert_jax.data.splits import Reading
from tinybert_jax.data.wordpiece import plain_backend
from tinybert_jax.metrics.translation import Words, check_installed, corpus_scores, sentence_counts
from tinybert_jax.models.seq2seq import make_seq2seq
from tinybert_jax.settings.sizes import EncoderDecoderConfig
from tinybert_jax.tasks.task import Scored, Settings, Task

_NUM_SAMPLES = 20  # translations that the report shows


def read(path: str, section: TranslationTask, how: Reading) -> Examples:
    """Reads the pairs; rows with a blank side are left out where `section.blank` says so.

    Raises ValueError without sacreBLEU, which every run needs at its first score.
    """
    check_installed()
    examples = read_parallel(
        path,
        section.dev_target if how.is_dev else section.train_target,
        text=section.text,
        target=section.target,
        format=section.format,
        split=how.split,
        keep_blank=section.blank == "drop" or how.keep_blank,
    )
    check_sides(path, examples)
    if how.keep_blank:
        return examples
    examples, num_blank = without_blank(examples)
    if num_blank:
        print(f"{path}: {num_blank:,} rows with a blank side are left out", flush=True)
    if not examples.text:
        raise ValueError(f"{path}: expected text on both sides, got blank rows alone; fill them in")
    return examples


def fits(
    tokenizer: Any, examples: Examples, max_length: int, *, target_tokenizer: Any = None
) -> np.ndarray:
    """bool [n]: the pairs whose sides both have at most `max_length` tokens."""
    sides = (
        (tokenizer, examples.text),
        (target_tokenizer or tokenizer, examples.text_pair or []),
    )
    lengths = [
        [len(row.ids) for row in plain_backend(own).encode_batch(list(side))] for own, side in sides
    ]
    # A decoder reads a target without its last token.
    most = np.array([[max_length], [max_length + 1]])
    return np.all(np.array(lengths) <= most, axis=0)


def make_model(sizes: EncoderDecoderConfig, num_outputs: int, **options: Any) -> Any:
    """(apply, init) of an encoder-decoder; `options`: those of `Encoder`."""
    return make_seq2seq(sizes, **options)


def translations(scored: Scored) -> list[str]:
    assert scored.texts is not None, "translations are made, not read off logits"
    return scored.texts


def outcomes(scored: Scored, settings: Settings, words: Words) -> np.ndarray:
    """[n, counts]: of each pair what BLEU and chrF of any selection of them need."""
    return sentence_counts(translations(scored), scored.examples.text_pair or [], words)


def metrics(found: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF of the corpus, 0 to 100."""
    return corpus_scores(found)


def answers(scored: Scored, settings: Settings) -> list[dict[str, Any]]:
    return [{"translation": text} for text in translations(scored)]


def details(scored: Scored, settings: Settings) -> dict[str, Any]:
    """`translations`: the first dev rows with the reference and the model's translation."""
    pairs = (scored.examples.text, scored.examples.text_pair or [], translations(scored))
    rows = list(zip(*pairs, strict=True))[:_NUM_SAMPLES]
    keys = ("source", "reference", "translation")
    return {"translations": [dict(zip(keys, row, strict=True)) for row in rows]}


def make_translation(words: Words = "13a", target_tokenizer: Any = None) -> Task:
    """The task; `words`: what BLEU counts; `target_tokenizer`: None where both sides have one."""
    own = {"target_tokenizer": target_tokenizer}
    return Task(
        section=TranslationTask,
        form=TranslationTask.form,
        make_head=make_model,
        unit="text",
        read=read,
        encode=functools.partial(tokenize_pairs, **own),
        count_labels=lambda examples: np.zeros(0, np.int64),
        floor=lambda examples: None,
        floor_metric="bleu",
        outcomes=lambda scored, settings: outcomes(scored, settings, words),
        metrics=metrics,
        answers=answers,
        details=details,
        in_words=lambda answer: answer["translation"],
        truth=lambda examples: list(examples.text_pair or []),
        hf_head=None,
        problem_type=None,
        configure=lambda section, target_tokenizer: make_translation(
            section.words, target_tokenizer
        ),
        generates=True,
        fits=functools.partial(fits, **own),
    )


TRANSLATION = make_translation()
