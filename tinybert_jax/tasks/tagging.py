"""Tagging: one tag per word, such as a named entity or a part of speech.

The model scores the first piece of every word. Entity tags are converted from the scheme of the
file to IOB2. A word beyond `max_length` counts as O.
"""

import functools
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tinybert_jax.batches.batch import TokenRows
from tinybert_jax.config.tasks import TaggingTask
from tinybert_jax.data.conll import TaggedText, read_tagged
from tinybert_jax.data.errors import listed
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import Reading
from tinybert_jax.data.wordpiece import plain_backend
from tinybert_jax.metrics.tagging import (
    Scheme,
    convert_tags,
    count_entities,
    detect_scheme,
    entities_of,
    entity_scores_per_kind,
    is_tag,
    scores_of_counts,
)
from tinybert_jax.models.heads import make_token_classifier
from tinybert_jax.tasks.task import Scored, Settings, Task, softmax

# BERT's tokenizers also split at these characters; ranges as in BertNormalizer of `tokenizers`.
_CHINESE = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf"
    "\U0002f800-\U0002fa1f]"
)


def read(path: str, section: TaggingTask, how: Reading) -> Examples:
    """Reads a CoNLL or JSON-lines file; labels are one array of class ids per sentence."""
    if how.split is not None:
        raise ValueError(
            f"{path}: expected no split for a file of tags, got {how.split!r}; leave it out"
        )
    options = {
        "tokens": section.text,
        "format": section.format,
        "drop_empty_tokens": section.drop_empty_tokens,
    }
    if not how.is_labelled:
        found = read_tagged(path, tags=None, keep_empty_sentences=how.keep_blank, **options)
        return Examples(found.words, None, None, None)
    is_plain = section.scheme == "plain"
    options |= {"tags": section.label, "plain": is_plain}
    found = read_tagged(path, **options)
    tags: list[list[str]] = found.tags or []
    names = how.label_names or _names_of(section)
    if is_plain:
        names = tuple(names or sorted({tag for row in tags for tag in row}))
        read_tagged(path, known_tags=names, **options)
    else:
        scheme = _scheme_of(section, found)
        _check_classes(path, names or ("O",))
        known = None if names is None else _tags_of_kinds(_kinds_of(names))
        read_tagged(path, scheme=scheme, known_tags=known, **options)
        tags = [convert_tags(row, scheme, "iob2") for row in tags]
        kinds = {entity.kind for row in tags for entity in entities_of(row)}
        names = tuple(names or _iob2_names(sorted(kinds)))
    ids = {name: place for place, name in enumerate(names)}
    labels = [np.array([ids[tag] for tag in row], np.int32) for row in tags]
    return Examples(found.words, None, labels, names)


def _names_of(section: TaggingTask) -> tuple[str, ...] | None:
    """The classes that `task.labels` names; None without `task.labels`."""
    if section.labels is None:
        return None
    kinds = tuple(section.labels)
    return kinds if section.scheme == "plain" else _iob2_names(kinds)


def _iob2_names(kinds: Sequence[str]) -> tuple[str, ...]:
    """O, and B- and I- of each kind: the classes of a model."""
    return ("O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI"))


def _check_classes(path: str, names: Sequence[str]) -> None:
    """Raises ValueError for classes that are not a complete set of IOB2 tags."""
    missing = sorted(set(_iob2_names(_kinds_of(names))) - set(names))
    if missing or not all(is_tag(name) for name in names):
        raise ValueError(
            f"{path}: expected a model whose classes are O, and B- and I- of each kind of entity, "
            f"got {listed(names)}; use a model that was trained on IOB2 tags, or task.scheme plain"
        )


def _kinds_of(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name[2:] for name in names if name != "O"))


def _tags_of_kinds(kinds: Sequence[str]) -> list[str]:
    return ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BIES")]


def _scheme_of(section: TaggingTask, found: TaggedText) -> Scheme:
    """The scheme in the settings, or else the scheme that most entities of the file follow."""
    if section.scheme not in ("auto", "plain"):
        return section.scheme  # type: ignore[return-value]
    tags = found.tags or []
    scheme = detect_scheme(tags)
    if scheme == "iob1":
        # Where most entities start with B-, an entity that starts with I- is an error in IOB2.
        starts = [row[entity.start] for row in tags for entity in entities_of(row)]
        num_b = sum(tag.startswith("B-") for tag in starts)
        scheme = "iob2" if 2 * num_b > len(starts) else "iob1"
    return scheme


def encode(tokenizer: Any, examples: Examples, max_length: int) -> TokenRows:
    """Rows [CLS] pieces [SEP]; the first piece of a word is a unit with the label of the word."""
    backend = plain_backend(tokenizer)
    backend.enable_truncation(max_length)
    # Each word has a piece, so that later words are cut anyway.
    sentences = [words[:max_length] for words, _ in _split_all(examples)]
    encoded = _encode_words(backend, tokenizer, sentences)
    ids = [np.asarray(e.ids, np.int32) for e in encoded]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    is_unit = np.concatenate([_first_pieces(e.word_ids) for e in encoded])
    labels = None
    if examples.labels is not None:
        kept = [ids[: _num_words(e)] for ids, e in zip(examples.labels, encoded, strict=True)]
        labels = np.full(len(is_unit), -1, np.int32)
        labels[is_unit] = np.concatenate(kept)
    return TokenRows(
        ids=np.concatenate(ids),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second=lengths.astype(np.int32),
        labels=labels,
        num_truncated=sum(bool(e.overflowing) for e in encoded),
        is_unit=is_unit,
    )


def _encode_words(backend: Any, tokenizer: Any, sentences: Sequence[Sequence[str]]) -> list[Any]:
    """Encodings in which every word has a piece; a word that the tokenizer drops becomes [UNK]."""
    encoded = backend.encode_batch([list(words) for words in sentences], is_pretokenized=True)
    for place, (words, encoding) in enumerate(zip(sentences, encoded, strict=True)):
        pieces = [encoding, *encoding.overflowing]
        with_piece = {i for part in pieces for i in part.word_ids if i is not None}
        if len(with_piece) < len(words):
            filled = [w if i in with_piece else tokenizer.unk_token for i, w in enumerate(words)]
            encoded[place] = backend.encode(filled, is_pretokenized=True)
    return encoded


def _first_pieces(word_ids: Sequence[int | None]) -> np.ndarray:
    """bool [pieces]: the first piece of each word."""
    words = np.array([-1 if word is None else word for word in word_ids])
    return (words >= 0) & (np.diff(words, prepend=-2) != 0)


def _num_words(encoding: Any) -> int:
    """The number of words whose first piece is in the encoding."""
    return int(_first_pieces(encoding.word_ids).sum())


_FAR_TOO_LONG = 16  # times the positions: further words are not counted


def check_lengths(tokenizer: Any, examples: Examples, positions: int) -> None:
    """Raises ValueError for a sentence with more pieces than `positions`."""
    backend = plain_backend(tokenizer)
    sentences = [words[: _FAR_TOO_LONG * positions] for words, _ in _split_all(examples)]
    encoded = _encode_words(backend, tokenizer, sentences)
    long = [(place, len(e.ids)) for place, e in enumerate(encoded, 1) if len(e.ids) > positions]
    if long:
        shown = ", ".join(f"sentence {place}: {length}" for place, length in long[:5])
        raise ValueError(
            f"expected sentences of at most {positions} pieces with [CLS] and [SEP] (the model's "
            f"positions), got more in {len(long)} of {len(encoded)} ({shown}"
            f"{', …' if len(long) > 5 else ''}); split these sentences"
        )


def _split_all(examples: Examples) -> Iterator[tuple[list[str], list[tuple[int, int]]]]:
    """(words, (start, end) of each word in the text) of each example; a text is split into words.

    The text of a list of words is the words joined by spaces.
    """
    for text in examples.text:
        if isinstance(text, str):
            spans = _word_spans(text)
            yield [text[start:end] for start, end in spans], spans
        else:
            ends = np.cumsum([len(word) + 1 for word in text]) - 1
            spans = [(int(end) - len(word), int(end)) for word, end in zip(text, ends, strict=True)]
            yield list(text), spans


def _word_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each word; as in BERT's tokenizers, white space and signs separate words."""
    spans: list[tuple[int, int]] = []
    is_open = False
    for place, char in enumerate(text):
        if char.isspace():
            is_open = False
            continue
        is_alone = _is_word_alone(char)
        start = spans.pop()[0] if is_open and not is_alone else place
        spans.append((start, place + 1))
        is_open = not is_alone
    return spans


@functools.lru_cache(1 << 16)
def _is_word_alone(char: str) -> bool:
    """Whether the character is a word: punctuation or Chinese, but no accent or vowel sign."""
    is_sign = char in string.punctuation or unicodedata.category(char).startswith("P")
    return is_sign or _CHINESE.match(char) is not None


def _predicted(scored: Scored) -> list[tuple[list[str], np.ndarray]]:
    """(tag of each word, probability of that tag) of each example."""
    rows, names, found = scored.rows, scored.label_names, []
    assert rows.is_unit is not None
    outside = names.index("O") if "O" in names else 0
    for place, (words, _) in enumerate(_split_all(scored.examples)):
        part = slice(rows.offsets[place], rows.offsets[place + 1])
        logits = scored.logits[part][rows.is_unit[part]]
        chosen = logits.argmax(-1).tolist()
        probabilities = softmax(logits)[np.arange(len(chosen)), chosen]
        num_cut = len(words) - len(chosen)
        tags = [names[i] for i in [*chosen, *[outside] * num_cut]]
        found.append((tags, np.append(probabilities, np.zeros(num_cut))))
    return found


def _gold(scored: Scored) -> list[list[str]]:
    """The true tag of each word of each example."""
    return [[scored.label_names[i] for i in labels] for labels in scored.examples.labels]


def _is_plain(names: Sequence[str]) -> bool:
    """Whether the classes are plain tags, not entity tags."""
    return not all(is_tag(name) for name in names)


def outcomes(scored: Scored, settings: Settings) -> np.ndarray:
    """Counts per sentence: of entities, see `count_entities`, or of plain tags, [n, tags, 3]."""
    gold, predicted = _gold(scored), [tags for tags, _ in _predicted(scored)]
    names = scored.label_names
    if not _is_plain(names):
        return count_entities(gold, predicted, _kinds_of(names))
    ids = {name: place for place, name in enumerate(names)}
    counts = np.zeros((len(gold), len(names), 3), np.int64)  # correct, predicted, gold words
    for row, true, guess in zip(counts, gold, predicted, strict=True):
        for tag, guessed in zip(true, guess, strict=True):
            row[ids[tag]] += (tag == guessed, 0, 1)
            row[ids[guessed], 1] += 1
    return counts


def metrics(found: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Entity scores as in conlleval; for plain tags accuracy and the means over classes."""
    if not _is_plain(names):
        return scores_of_counts(found)
    counts = found.sum(axis=0)
    rows = [row for row in _class_rows(names, counts) if row["support"]]
    return {
        "accuracy": float(counts[:, 0].sum() / counts[:, 2].sum()),
        **{name: float(np.mean([r[name] for r in rows])) for name in ("f1", "precision", "recall")},
    }


def _class_rows(names: Sequence[str], counts: np.ndarray) -> list[dict[str, Any]]:
    hits, found, gold = counts.T
    return [
        {
            "name": name,
            "precision": float(h / f) if f else 0.0,
            "recall": float(h / g) if g else 0.0,
            "f1": float(2 * h / (f + g)) if f + g else 0.0,
            "support": int(g),
        }
        for name, h, g, f in zip(names, hits, gold, found, strict=True)
    ]


def answers(scored: Scored, settings: Settings) -> list[dict[str, Any]]:
    """Per example `entities` with character offsets, or for plain tags `words` and `tags`."""
    is_plain, found = _is_plain(scored.label_names), []
    texts = zip(scored.examples.text, _split_all(scored.examples), strict=True)
    for (text, (words, spans)), (tags, probabilities) in zip(
        texts, _predicted(scored), strict=True
    ):
        whole = text if isinstance(text, str) else " ".join(text)
        if is_plain:
            found.append({"words": words, "tags": tags})
            continue
        entities = []
        for first, end, kind in entities_of(tags):
            start, stop = spans[first][0], spans[end - 1][1]
            entities.append(
                {
                    "label": kind,
                    "text": whole[start:stop],
                    "start": start,
                    "end": stop,
                    "probability": float(np.min(probabilities[first:end])),
                }
            )
        found.append({"entities": entities})
    return found


def in_words(answer: dict[str, Any]) -> str:
    """The entities, or the plain tags, of one answer."""
    if "tags" in answer:
        return " ".join(answer["tags"])
    return "; ".join(f"{e['text']} ({e['label']})" for e in answer["entities"]) or "none"


def truth(examples: Examples) -> list[str]:
    """The entities, or the plain tags, of each example."""
    names, found = examples.label_names or (), []
    for words, labels in zip(examples.text, examples.labels, strict=True):
        tags: list[str] = [names[label] for label in labels]
        entities = [] if _is_plain(names) else entities_of(tags)
        named = [{"text": " ".join(words[e.start : e.end]), "label": e.kind} for e in entities]
        found.append(in_words({"tags": tags} if _is_plain(names) else {"entities": named}))
    return found


def details(scored: Scored, settings: Settings) -> dict[str, Any]:
    """Scores per kind of entity, or per plain tag."""
    if _is_plain(scored.label_names):
        rows = _class_rows(scored.label_names, outcomes(scored, settings).sum(axis=0))
        return {"per_class_title": "Scores per tag", "per_class": rows}
    gold, predicted = _gold(scored), [tags for tags, _ in _predicted(scored)]
    by_kind = entity_scores_per_kind(gold, predicted)
    rows = [{"name": kind, **scores} for kind, scores in by_kind.items()]
    return {"per_class_title": "Scores per entity kind", "per_class": rows}


def count_labels(examples: Examples) -> np.ndarray:
    """Number of words per class, [classes]."""
    return np.bincount(np.concatenate(examples.labels), minlength=examples.num_outputs)


def floor(examples: Examples) -> float:
    """The F1 of predicting the most frequent tag for every word; 0 for entity tags."""
    names, counts = examples.label_names or (), count_labels(examples)
    if not _is_plain(names):
        return 0.0
    share = counts.max() / counts.sum()
    return float(2 * share / (1 + share) / (counts > 0).sum())


def rights(scored: Scored, settings: Settings) -> np.ndarray:
    """bool [n]: the sentences whose words all have the right tag."""
    pairs = zip(_gold(scored), _predicted(scored), strict=True)
    return np.array([gold == tags for gold, (tags, _) in pairs])


TAGGING = Task(
    section=TaggingTask,
    form=TaggingTask.form,
    make_head=make_token_classifier,
    unit="word",
    read=read,
    encode=encode,
    count_labels=count_labels,
    floor=floor,
    floor_metric="f1",
    outcomes=outcomes,
    metrics=metrics,
    answers=answers,
    details=details,
    in_words=in_words,
    truth=truth,
    hf_head="TokenClassification",
    problem_type=None,
    rights=rights,
    check_lengths=check_lengths,
)
