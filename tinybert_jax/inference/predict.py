"""Predictions, metrics and sentence vectors of a model folder, as the commands give them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinybert_jax.batches.tokenize import MIN_TOKENS
from tinybert_jax.config.load import validate
from tinybert_jax.config.tasks import TaskSection
from tinybert_jax.data.errors import prefix_errors, short
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.json_text import is_utf8
from tinybert_jax.data.splits import Reading
from tinybert_jax.huggingface.encoder_decoder import is_encoder_decoder
from tinybert_jax.huggingface.folder import read_model, start_params
from tinybert_jax.huggingface.head import Head
from tinybert_jax.huggingface.hub import check_table, load_tokenizer
from tinybert_jax.inference.columns import kept_columns, text_columns
from tinybert_jax.inference.scorer import Scorer, finite_examples, make_scorer
from tinybert_jax.metrics.cosines import unit_vectors
from tinybert_jax.models.params import Params
from tinybert_jax.report.console import printable
from tinybert_jax.tasks.classification import CLASSIFICATION
from tinybert_jax.tasks.table import task_of
from tinybert_jax.tasks.task import Scored, Settings, Task
from tinybert_jax.tasks.translation import TRANSLATION

# The settings of a task in a config that `evaluate_file` takes.
READING_SETTINGS = (
    "text",
    "text_pair",
    "label",
    "format",
    "separator",
    "label_columns",
    "scheme",
    "drop_empty_tokens",
    "target",
    "dev_target",
    "blank",
    "words",
)


def predict(
    model: str,
    data: str | Sequence[str],
    *,
    split: str | None = None,
    max_length: int | None = None,
    pairs: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    has_logits: bool = True,
    say: Callable[[str], None] = lambda line: None,
    **columns: str | None,
) -> list[dict[str, Any]]:
    """One object per text, in order: `row` from 1, `text`, and the prediction of the model's task.

    `data` is a file or a list of texts, `pairs` their second texts. `columns`: settings of the task
    that name the columns of the file; `say` is told which one of the text is chosen where none is
    given and the file has no column `text`, and how many texts are cut. `keep`: columns of the file
    that are copied. `has_logits`: whether a class comes with the logits by class. A blank text has
    `problem` instead of a prediction; where the model's outputs are not finite, every entry of the
    prediction is None beside a `problem`. Texts longer than `max_length` (default: the model's
    positions) are cut, but a tagging model refuses a text that does not fit its positions.
    Raises ValueError for a model without a task head, for one of pairs that gets single texts, and
    for columns that cannot be kept.
    """
    loaded = Model(model, max_length)
    examples = _read(loaded, data, pairs, split, columns, say)
    filled = [place for place, text in enumerate(examples.text) if _has_text(text)]
    kept: dict[str, list[Any]] = {}
    if keep:
        first = loaded.answer(examples.take(filled[:1])) if filled else []
        names = {"row", "text", "problem"}.union(*first)
        names -= set() if has_logits else {"logits"}
        kept = kept_columns(data, split, keep, names, len(examples.text))
    answers: dict[int, dict[str, Any]] = {}
    if filled:
        answers = dict(zip(filled, loaded.answer(examples.take(filled)), strict=True))
        if told := loaded.cut_line():
            say(told)
    if not has_logits:
        for answer in answers.values():
            answer.pop("logits", None)
    return [
        {
            "row": place + 1,
            "text": _plain(text),
            **{column: values[place] for column, values in kept.items()},
            **answers.get(place, {"problem": "no text"}),
        }
        for place, text in enumerate(examples.text)
    ]


def _read(
    loaded: "Model",
    data: str | Sequence[str],
    pairs: Sequence[str] | None,
    split: str | None,
    columns: Mapping[str, str | None],
    say: Callable[[str], None],
) -> Examples:
    """The texts of a file, or those that are given; see `predict`."""
    if isinstance(data, str):
        columns = text_columns(data, columns, loaded.task, loaded.head, split, say)
        section = _section(loaded.task, data, columns)
        how = Reading(split, is_labelled=False, keep_blank=True)
        return loaded.task.read(data, section, how)
    if pairs is not None and "text_pair" not in loaded.task.section.model_fields:
        raise ValueError(
            f"{loaded.name}: expected single texts for a model of {loaded.task.kind}, got pairs; "
            "leave the second texts out (tinybert ask takes questions about a text)"
        )
    return _given(data, pairs)


def _given(texts: Sequence[str], pairs: Sequence[str] | None) -> Examples:
    """Texts, with second texts or without; ValueError for what no file may hold."""
    for name, own in (("text", texts), ("second text", pairs or ())):
        for number, text in enumerate(own, 1):
            if not is_utf8(text):
                raise ValueError(
                    f"{name} {number}: expected UTF-8, got {short(text)}; convert the text, or "
                    "read it from a file"
                )
    if pairs is not None and len(pairs) != len(texts):
        raise ValueError(
            f"expected a second text for each of {len(texts)}, got {len(pairs)}; give one each"
        )
    return Examples(list(texts), None if pairs is None else list(pairs), None, None)


def ask(
    model: str, text: str, questions: Sequence[str], *, max_length: int | None = None
) -> list[dict[str, Any]]:
    """One object per question about `text`: `question`, and what the task answers.

    Texts longer than `max_length` are read in windows that overlap. Raises ValueError for a model
    of another task, and for a blank text or question.
    """
    loaded = Model(model, max_length)
    if loaded.task.unit != "span":
        raise ValueError(
            f"{model}: expected a model that answers questions, got one for {loaded.task.kind}; "
            "fine-tune one with task.kind=question_answering, or use tinybert predict"
        )
    if not text.strip():
        raise ValueError("expected a text with answers in it, got only white space; give another")
    blank = [place for place, question in enumerate(questions, 1) if not question.strip()]
    if blank or not questions:
        raise ValueError(
            f"expected questions, got {f'a blank one in place {blank[0]}' if blank else 'none'}; "
            "write one"
        )
    found = loaded.answer(Examples(list(questions), [text] * len(questions), None, None))
    return [{"question": q, **answer} for q, answer in zip(questions, found, strict=True)]


def embed(
    model: str,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    width: int | None = None,
) -> np.ndarray:
    """fp32 [texts, dim]: a vector per text, of length 1 if the model's folder says so.

    `width`: only the first columns, of a model that was trained with them (task.widths). Raises
    ValueError for a model of another task, a blank text and vectors that are not finite.
    """
    loaded = Model(model, max_length)
    if loaded.task.unit != "text":
        raise ValueError(
            f"{model}: expected a model of sentence vectors (modules.json), got one for "
            f"{loaded.task.kind}; train one with task.kind=embeddings, or use tinybert predict"
        )
    blank = [place for place, text in enumerate(texts, 1) if not text.strip()]
    if blank or not texts:
        raise ValueError(
            f"expected texts, got {f'a blank one in place {blank[0]}' if blank else 'none'}; "
            "fill it in, or remove it"
        )
    dim = loaded.source.config.hidden_size
    if not 1 <= (width or dim) <= dim:
        raise ValueError(
            f"width: expected from 1 to {dim}, the width of the model, got {width}; change it"
        )
    vectors = loaded.score(Examples(list(texts), None, None, None)).logits
    if not np.isfinite(vectors).all():
        raise ValueError(
            f"{model}: expected finite outputs, got NaN or infinite ones; the weights have "
            "diverged: take another checkpoint"
        )
    vectors = vectors[:, :width]
    return unit_vectors(vectors) if loaded.task.normalises else vectors


def evaluate_file(
    model: str,
    data: str,
    *,
    split: str | None = None,
    max_length: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """The task's metrics on labelled text; its labels are the model's label names or their ids.

    `settings`: those of `task` in a config that say how the file is read (`READING_SETTINGS`).
    Raises ValueError for a wrong setting or file.
    """
    scored_file = score_file(model, data, split, max_length, settings)
    metrics = scored_file.task.measure(scored_file.scored, scored_file.settings)
    return {**metrics, "num_examples": len(scored_file.scored.examples.text)}


class ScoredFile(NamedTuple):
    """Labelled text with the logits of a model, and what makes answers of them."""

    task: Task
    scored: Scored
    settings: Settings  # of the model's head


def score_file(
    model: str,
    data: str,
    split: str | None = None,
    max_length: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> ScoredFile:
    """The logits of a model folder for labelled text; see `evaluate_file`.

    Raises ValueError for a wrong setting or file, and for logits that are not finite.
    """
    if is_encoder_decoder(model):
        return _score_translations(model, data, split, max_length, settings or {})
    loaded = Model(model, max_length)
    say = lambda line: print(printable(line))  # noqa: E731
    columns = text_columns(data, settings or {}, loaded.task, loaded.head, split, say)
    section = _section(loaded.task, data, columns)
    examples = loaded.task.read(data, section, Reading(split, is_dev=True))
    names = loaded.head.label_names
    if examples.label_names is not None:
        ids, raw = tuple(str(i) for i in range(len(names))), set(examples.label_names)
        known = ids if raw <= set(ids) and not raw <= set(names) else names
        with prefix_errors(f"{model} does not know all labels"):
            examples = loaded.task.read(data, section, Reading(split, known, is_dev=True))
    scored = loaded.score(examples)
    bad = np.flatnonzero(~finite_examples(scored))
    if len(bad):
        raise ValueError(
            f"{model}: expected finite outputs, got NaN or infinite ones for {len(bad)} of "
            f"{len(examples.text)} rows, the first row {bad[0] + 1}; the weights have diverged or "
            "are too large: take another checkpoint"
        )
    return ScoredFile(loaded.task, scored, loaded.head.settings)


def _score_translations(
    model: str, data: str, split: str | None, max_length: int | None, settings: Mapping[str, Any]
) -> ScoredFile:
    """The greedy translations of the sources of a file, which hold `max_length` tokens at most."""
    from tinybert_jax.inference.seq2seq import TinyBertForConditionalGeneration, translate

    loaded = TinyBertForConditionalGeneration.from_pretrained(model)
    section = _section(TRANSLATION, data, settings)
    assert TRANSLATION.configure is not None
    task = TRANSLATION.configure(section, loaded.tokenizers and loaded.tokenizers.target)
    examples = task.read(data, section, Reading(split, is_dev=True))
    length = max_length or loaded.config.max_position_embeddings
    found = translate(loaded, examples.text, max_length=length, max_new_tokens=length)
    if told := found.describe():
        print(told)
    texts = found.lines
    assert loaded.tokenizers is not None, "translate has refused a folder without tokenizers"
    rows = task.encode(loaded.tokenizers.source, examples, length)
    return ScoredFile(task, Scored(np.zeros((len(texts), 0)), rows, examples, texts), {})


def check_has_logits(model: str) -> None:
    """Raises ValueError for a model that does not give a text one of several labels."""
    if (kind := Model(model).task.kind) != (wanted := CLASSIFICATION.kind):
        raise ValueError(f"--logits: expected a model of {wanted}, got one of {kind}; leave it out")


class Model:
    """A model folder, its head and its task; the weights are read once, for the first score.

    `max_length`: tokens of a text; None: as many as the task and the model's positions allow.
    """

    def __init__(self, model: str, max_length: int | None = None):
        self.name, self.source = model, read_model(model)
        self.task, self.head = task_of(self.source), self.source.head or Head("", None, ())
        self._given_length = max_length
        self._num_cut = self._num_read = 0  # texts of the last score

    def answer(self, examples: Examples) -> list[dict[str, Any]]:
        """The predictions; None for each entry of those whose logits are not finite."""
        scored = self.score(examples._replace(label_names=self.head.label_names))
        is_finite = finite_examples(scored)
        logits = np.nan_to_num(scored.logits, posinf=0.0, neginf=0.0)
        with np.errstate(over="ignore"):  # exp of a large logit: the probability is 0 or 1
            found = self.task.answers(scored._replace(logits=logits), self.head.settings)
        problem = {"problem": "the model's outputs are not finite"}
        return [
            answer if fine else {**dict.fromkeys(answer), **problem}
            for answer, fine in zip(found, is_finite, strict=True)
        ]

    def score(self, examples: Examples) -> Scored:
        """The examples with the logits of the model; ValueError for a wrong `max_length`."""
        if self.head.reads_pairs and examples.text_pair is None:
            raise ValueError(
                f"{self.name}: expected pairs of texts, as the model was trained on, got single "
                "texts; give the second ones too (--text-pair, in Python text_pair)"
            )
        tokenizer, max_length = self._tokenizer, self._max_length
        if self.task.check_lengths is not None:
            positions = self.source.config.max_position_embeddings
            self.task.check_lengths(tokenizer, examples, positions)
        score, params = self._scorer
        rows = self.task.encode(tokenizer, examples, max_length)
        self._num_cut, self._num_read = rows.num_truncated, len(examples.text)
        return Scored(score(params, rows), rows, examples)

    def cut_line(self) -> str:
        """How many texts of the last score are cut; "" where none is."""
        if not self._num_cut:
            return ""
        what, most = "texts", self._max_length
        if self.task.unit == "span":  # a text is read in windows
            what, most = "questions", most // 2
        verb = "has" if self._num_cut == 1 else "have"
        return (
            f"{self._num_cut:,} of {self._num_read:,} {what} {verb} more than {most:,} tokens: "
            "the rest is not read"
        )

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.source.folder)
        check_table(tokenizer, self.source.config, "the model")
        return tokenizer

    @property
    def _max_length(self) -> int:
        positions, length = self.source.config.max_position_embeddings, self._given_length
        if length is None:
            length = min(self.task.max_length or positions, positions)
        if not MIN_TOKENS <= length <= positions:
            raise ValueError(
                f"max_length: expected at least {MIN_TOKENS} and at most {positions} (the model's "
                f"positions), got {length}; change it"
            )
        return length

    @functools.cached_property
    def _scorer(self) -> tuple[Scorer, Params]:
        apply, init = self.task.make_head(self.source.config, len(self.head.label_names))
        is_quiet = self.task.unit == "text"  # such a folder may have a pooler, which nothing reads
        params = start_params(self.source.folder, init, whole=True, is_quiet=is_quiet)
        length = self._max_length
        buckets = [width for width in (16, 32, 64, 128, 256) if width < length] + [length]
        pad_token_id = self._tokenizer.pad_token_id
        return make_scorer(apply, buckets=buckets, pad_token_id=pad_token_id), params


def _section(task: Task, data: str, settings: Mapping[str, Any]) -> TaskSection:
    """The task's settings for one file; raises ValueError for those that the task lacks."""
    given = {name: value for name, value in settings.items() if value is not None}
    known = [name for name in READING_SETTINGS if name in task.section.model_fields]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"expected only what a file for a {task.kind} model can have, {known}, got {unknown}; "
            "remove them"
        )
    if "dev_target" in given:
        given["train_target"] = given["dev_target"]
    return validate(task.section, {"train": data, "dev": data, **given}, f"task of {task.kind}")


def _plain(text: str | Sequence[str]) -> str:
    """The text, or the words joined by spaces; offsets of predictions refer to it."""
    return text if isinstance(text, str) else " ".join(text)


def _has_text(text: str | Sequence[str]) -> bool:
    return bool(text.strip() if isinstance(text, str) else text)
