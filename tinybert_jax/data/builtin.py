"""The built-in data set of the quickstart, made of text that every installation has on disk.

The text is the English prose in the docstrings of installed packages; the labelled task is to tell
what a sentence is about, which is the topic of the package that it comes from. Packages are read as
files, never imported. The text changes slightly with the package versions; in one installation
every call returns the same text.

The task drops sentences that name a package, because the name gives the label away. The hash of
its text puts a whole docstring into train or dev. Dropped are also sentences found in two packages
or in both splits, and dev sentences that share most four-word sequences with train. The corpus
excludes the dev docstrings, so no stage of training sees dev text.
"""

import functools
import hashlib
import importlib.util
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinybert_jax.data.examples import Examples

_TOPICS = {
    "huggingface_hub": "model hub",
    "jax": "array programs",
    "orbax": "checkpoints",
    "pandas": "tables",
    "scipy": "science",
    "transformers": "language models",
}
# Corpus only: packages with little text, or with text that is too similar to a topic.
_TEXT_ONLY = ("datasets", "flax", "numpy", "optax", "pydantic")
_MAX_CHARS = 300_000  # of prose per package, so that scipy does not dominate the corpus
_MIN_WORDS = 6  # per sentence
_DEV_EVERY = 8  # one docstring in eight goes to dev


def builtin_corpus() -> list[str]:
    """About 2 MB of English: one document per docstring, one paragraph per line."""
    return [
        "\n".join(" ".join(sentences) for sentences in doc.paragraphs)
        for doc in _documents()
        if not doc.is_dev
    ]


def builtin_task(split: str, *, max_per_class: int = 2000) -> Examples:
    """Sentences labelled with their topic, in a fixed order that mixes the classes.

    Every class has as many sentences as the smallest class, at most `max_per_class`; a smaller
    limit selects a subset. Raises ValueError for split not in train, dev and missing packages.
    """
    if split not in ("train", "dev"):
        raise ValueError(f"built-in task: expected split 'train' or 'dev', got {split!r}")
    if max_per_class < 1:
        raise ValueError(f"built-in task: expected max_per_class of 1 or more, got {max_per_class}")
    per_class = _task_sentences()[split]
    count = min(max_per_class, *map(len, per_class))
    rows = sorted(
        (_stable_hash(text), text, label)
        for label, texts in enumerate(per_class)
        for text in texts[:count]
    )
    return Examples(
        text=[text for _, text, _ in rows],
        text_pair=None,
        labels=np.array([label for *_, label in rows], np.int32),
        label_names=tuple(_TOPICS.values()),
    )


class _Document(NamedTuple):
    package: str
    is_dev: bool
    paragraphs: list[list[str]]  # sentences of each paragraph


@functools.cache
def _task_sentences() -> dict[str, list[list[str]]]:
    """Split -> sentences of every class, sorted by hash."""
    origins: dict[str, set[tuple[str, bool]]] = defaultdict(set)
    for doc in _documents():
        for sentence in _document_sentences(doc):
            origins[_normalise(sentence)].add((doc.package, doc.is_dev))

    train: dict[str, dict[str, str]] = {package: {} for package in _TOPICS}
    dev: dict[str, dict[str, str]] = {package: {} for package in _TOPICS}
    for doc in _documents():
        if doc.package not in _TOPICS:
            continue
        for sentence in _document_sentences(doc):
            words = _normalise(sentence)
            if len(origins[words]) == 1 and not _NAMES_A_PACKAGE.search(sentence):
                (dev if doc.is_dev else train)[doc.package].setdefault(words, sentence)

    in_train = {ngram for texts in train.values() for words in texts for ngram in _ngrams(words)}
    for texts in dev.values():
        for words in list(texts):
            ngrams = _ngrams(words)
            if 2 * sum(ngram in in_train for ngram in ngrams) > len(ngrams):
                del texts[words]
    return {
        name: [sorted(texts.values(), key=_stable_hash) for texts in split.values()]
        for name, split in (("train", train), ("dev", dev))
    }


@functools.cache
def _documents() -> tuple[_Document, ...]:
    """All docstrings with prose; keeps only the first of repeated paragraphs (boilerplate)."""
    documents, seen = [], set()
    for package in (*_TOPICS, *_TEXT_ONLY):
        num_chars = 0
        for docstring in _docstrings(package):
            paragraphs = []
            for paragraph in _paragraphs(docstring):
                sentences = [s for s in _sentences(paragraph) if _is_prose(s)]
                key = (package, *map(_normalise, sentences))
                if sentences and key not in seen:
                    seen.add(key)
                    paragraphs.append(sentences)
                    num_chars += sum(map(len, sentences))
            if paragraphs:
                is_dev = _stable_hash(docstring) % _DEV_EVERY == 0
                documents.append(_Document(package, is_dev, paragraphs))
            if num_chars >= _MAX_CHARS:
                break
    return tuple(documents)


def _document_sentences(doc: _Document) -> Iterator[str]:
    for sentences in doc.paragraphs:
        yield from sentences


def _normalise(sentence: str) -> str:
    return " ".join(re.findall(r"[a-z]+", sentence.lower()))


def _ngrams(words: str, length: int = 4) -> list[tuple[str, ...]]:
    """The overlapping sequences of `length` words; one shorter sequence if there are fewer."""
    split = words.split()
    return [tuple(split[i : i + length]) for i in range(max(1, len(split) - length + 1))]


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


_NAMES_A_PACKAGE = re.compile(
    r"\b(?:datasets|(?:flax|hf|hugging|jax|numpy|optax|orbax|pydantic|scipy)\w*|hub|jnp|np|ocp"
    r"|pandas|pd|transformers)\b",
    re.IGNORECASE,
)
_EXCLUDED_FILES = (
    re.compile(  # tests, vendored code, jax's copies of numpy and scipy docstrings, boilerplate
        r"/(?:\w*_)?test(?:s|ing)?(?:_\w+)?(?:/|\.py)|/conftest\.py|/_?(?:vendor|extern)\w*/"
        r"|^jax/(?:_src/)?(?:numpy|scipy)/|^transformers/models/"
    )
)
# Scans Python source in one pass; matches comments and other strings as well, so that quotes inside
# them do not start a docstring. Ten times faster than `ast`, and finds the texts of `add_newdoc`.
_TOKEN = re.compile(
    r"""(?=[#"'])(?:"""
    r"""#[^\n]*+"""
    r"""|(\"\"\"|\'\'\')(.*?)(?<!\\)\1"""
    r"""|"(?:[^"\\\n]++|\\.)*+\""""
    r"""|'(?:[^'\\\n]++|\\.)*+')""",
    re.DOTALL,
)


def _docstrings(package: str) -> Iterator[str]:
    """Yields the triple-quoted strings that start a line, files sorted by hash."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"built-in data: expected the package {package!r}, whose docstrings are part of the"
            " data; got no such package; fix: reinstall tinybert_jax with its dependencies"
        )
    files = {
        f"{package}/{file.relative_to(root).as_posix()}": file
        for root in spec.submodule_search_locations
        for file in Path(root).rglob("*.py")
    }
    for name in sorted(files, key=_stable_hash):
        if _EXCLUDED_FILES.search(name):
            continue
        source = files[name].read_text(encoding="utf-8", errors="replace")
        for token in _TOKEN.finditer(source):
            line_start = source.rfind("\n", 0, token.start()) + 1
            if token[1] and source[line_start : token.start()].strip() in ("", "r"):
                yield inspect.cleandoc(token[2].removeprefix("\\\n"))


_SKIPPED_SECTIONS = {"methods", "reference", "references", "see also"}
_PROSE_DIRECTIVES = {
    "attention", "caution", "deprecated", "hint", "important", "note", "tip",
    "versionadded", "versionchanged", "warning",
}  # fmt: skip
_DIRECTIVE = re.compile(r"\.\. ?(?:([\w:-]+)::|\[|_)")
_UNDERLINE = re.compile(r"([=\-~^\"*+#.])\1{2,}$")
_TITLE = re.compile(r"[A-Z][\w ]{2,30}:$")
_NUMPY_ENTRY = re.compile(r"\*{0,2}[\w.]+(?:, ?\*{0,2}[\w.]+)* ?: |.*, optional$|.*, default ")
_ENTRY = re.compile(  # `name (type): `, `name: ` and list markers, which precede prose
    r"(?:[-*+•]|\(?\d+[.)]) +"
    r"|\*{0,2}[`\"']?[\w.]+[`\"']?(?: ?\((?:[^()]|\([^()]*\))*\))?(?::| --?)(?: +|$)"
)


def _paragraphs(docstring: str) -> Iterator[str]:
    """Yields the paragraphs of a docstring without code, headings, references, `name : type`."""
    lines: list[str] = []
    last_indent, hanging, skipping = 0, False, False
    for indent, text in [*_without_code(docstring), (0, "")]:
        if not text:
            if lines:
                yield " ".join(lines)
                lines.clear()
            continue
        heading = _heading(text, lines)
        if heading is not None:
            skipping = heading.lower() in _SKIPPED_SECTIONS
        elif indent > last_indent and len(lines) == 1 and not hanging:
            lines.clear()  # drop a type that stands alone above an indented description
        is_header = heading is not None or bool(_NUMPY_ENTRY.match(text))
        entry = _ENTRY.match(text)
        if lines and (is_header or entry):
            yield " ".join(lines)
            lines.clear()
        if not is_header and not skipping:
            hanging = bool(entry) or (hanging and bool(lines))
            lines.append(text[entry.end() :] if entry else text)
        last_indent = indent


def _heading(text: str, lines: list[str]) -> str | None:
    """Section title of a line such as `Returns:` or an underline, which takes it off `lines`."""
    if _UNDERLINE.match(text):
        return lines.pop() if lines else ""
    return text[:-1] if _TITLE.match(text) else None


def _without_code(docstring: str) -> Iterator[tuple[int, str]]:
    """Yields (indent, text) of every line; no text for fences, doctests, directives and code."""
    fenced = doctest = False
    block: int | None = None  # indent of a literal block; deeper lines belong to the block
    for line in docstring.split("\n"):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        is_fence = text.startswith(("```", "~~~"))
        directive = _DIRECTIVE.match(text)
        fenced ^= is_fence
        doctest = bool(text) and (doctest or text.startswith((">>>", "$ ", "In [")))
        if block is not None and text and indent <= block:
            block = None
        if fenced or is_fence or doctest or block is not None:
            yield indent, ""
        elif directive:
            block = None if directive[1] in _PROSE_DIRECTIVES else indent
            yield indent, ""
        else:
            block = indent if text.endswith("::") else None
            yield indent, text.removeprefix("> ")


_MARKUP = [  # (text that every match contains, pattern, replacement)
    (needed, re.compile(pattern), replacement)
    for needed, pattern, replacement in (
        ("`", r":math:`[^`]*`", r"\\"),  # a backslash, so that _is_prose drops the sentence
        ("`", r":[\w:+-]+:`~?([^`<]*?) ?<[^`]*>`", r"\1"),
        ("`", r":[\w:+-]+:`~?(?:[\w.]*\.)?([^`]*)`", r"\1"),
        ("<", r"`([^`<]+?) ?<[^`]*>`__?", r"\1"),
        ("[", r"\[`~?(?:[\w.]*\.)?([^`\]]*)`\](?:\([^)]*\))?", r"\1"),
        ("[", r"\[([^\]]+)\]\([^)]*\)", r"\1"),
        ("<", r"</?[A-Za-z]+>", ""),
        ("`", r"`{1,2}([^`]*)`{1,2}_?", r"\1"),
        ("*", r"\*{1,2}([^*\s](?:[^*]*[^*\s])?)\*{1,2}", r"\1"),
        ("’", "[‘’]", "'"),
        ("”", "[“”]", '"'),
        ("  ", " {2,}", " "),
    )
]
_SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\betc\.)(?<!\bvs\.)(?<!\bcf\.)(?<!\bal\.)(?<!\bEq\.)"
    r"(?<!\bFig\.)(?<!\bRef\.)(?<!\bDr\.)(?<![ .][A-Z]\.) +(?=[\"'(]?[A-Z])"
)
_PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()%/.\-]*\.")
_WORD = re.compile(r"[Aa]|[A-Za-z]{2,}(?:['/-][A-Za-z]+)*")
_CODE_LIKE = re.compile(
    r"[A-Za-z]\.\w|\w\.[A-Za-z]|\(\)|\.\.|--|//|::| [.,;)]|[a-z]{2}\. [a-z]|\. -|[a-z0-9]: [A-Z]"
)


def _sentences(paragraph: str) -> list[str]:
    if paragraph.count(" ") < _MIN_WORDS - 1 or "." not in paragraph:
        return []
    if not _PLAIN.fullmatch(paragraph):
        for needed, pattern, replacement in _MARKUP:
            if needed in paragraph:
                paragraph = pattern.sub(replacement, paragraph)
    return [sentence.strip() for sentence in _SENTENCE_END.split(paragraph)]


def _is_prose(sentence: str) -> bool:
    """Whether a text looks like a sentence: capital, full stop, 6 to 45 words, few symbols."""
    if not _PLAIN.fullmatch(sentence):
        return False
    words = [word.strip(",;:'\"()%.") for word in sentence.split()]
    if not _MIN_WORDS <= len(words) <= 45 or sentence.count('"') % 2:
        return False
    if sentence.count("(") != sentence.count(")"):
        return False
    if sum(c.isalpha() or c == " " for c in sentence) < 0.8 * len(sentence):
        return False  # mostly symbols, such as a list of quoted values
    if _CODE_LIKE.search(sentence.replace("e.g.", "eg").replace("i.e.", "ie")):
        return False
    return sum(bool(_WORD.fullmatch(word)) for word in words) >= 0.85 * len(words)
