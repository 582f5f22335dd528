"""builtin: the text of the quickstart is reproducible, balanced, free of leaks and English."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tinybert_jax.data.builtin import builtin_corpus, builtin_task

CODE = re.compile(r">>>|```|::|[_=<>{}\[\]\\|@#$^~*`]|https?:|\.\.|\w\(\)| [.,;)]|[^\x20-\x7e]")
NAMES = re.compile(r"\b(?:huggingface\w*|jax\w*|orbax\w*|pandas|scipy\w*|transformers|numpy\w*)\b")


@pytest.fixture(scope="module")
def corpus():
    return builtin_corpus()


@pytest.fixture(scope="module")
def task():
    return {split: builtin_task(split) for split in ("train", "dev")}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_text_does_not_depend_on_the_hash_seed_and_imports_no_package():
    code = (
        "import hashlib, sys\n"
        "from tinybert_jax.data import builtin\n"
        "builtin._MAX_CHARS = 10_000\n"  # ten times faster than all text
        "parts = repr((builtin.builtin_corpus(), builtin.builtin_task('train')))\n"
        "print(hashlib.sha1(parts.encode()).hexdigest())\n"
        "heavy = {'jax', 'flax', 'transformers', 'datasets', 'pandas', 'scipy'}\n"
        "assert not heavy & set(sys.modules), sorted(heavy & set(sys.modules))\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert len(runs[0].strip()) == 40 and runs[0] == runs[1]


def test_two_calls_return_the_same_task(task):
    again = builtin_task("dev")
    assert again.text == task["dev"].text
    np.testing.assert_array_equal(again.labels, task["dev"].labels)


def test_corpus_and_task_are_large_enough(corpus, task):
    assert 1_500_000 < sum(map(len, corpus)) < 4_000_000
    assert 5_000 <= len(task["train"].text) <= 6 * 2000
    assert 800 <= len(task["dev"].text) <= 0.2 * len(task["train"].text)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_classes_are_balanced_and_mixed(task, split):
    texts = task[split]
    assert texts.text_pair is None and texts.labels.dtype == np.int32
    assert len(texts.label_names) == 6 and "science" in texts.label_names
    counts = np.bincount(texts.labels)
    assert len(counts) == 6 and counts.min() == counts.max()
    first = np.bincount(texts.labels[:300], minlength=6)
    assert first.min() > 20  # sorted classes would show one label at a time in training


def test_smaller_max_per_class_is_a_subset(task):
    few = builtin_task("train", max_per_class=50)
    assert np.bincount(few.labels).tolist() == [50] * 6
    assert set(few.text) < set(task["train"].text)


def test_no_sentence_is_repeated_or_in_both_splits(corpus, task):
    train, dev = ({" ".join(_words(text)) for text in task[s].text} for s in ("train", "dev"))
    assert len(train) == len(task["train"].text) and len(dev) == len(task["dev"].text)
    assert not train & dev
    seen = {
        " ".join(_words(sentence)) for text in corpus for sentence in re.split("(?<=[.]) |\n", text)
    }
    assert len(train & seen) > 0.95 * len(train)  # the regex above finds most sentences
    assert not dev & seen


def test_dev_sentences_share_at_most_half_of_their_four_word_sequences_with_train(task):
    def ngrams(text: str) -> list[tuple[str, ...]]:
        words = _words(text)
        return list(zip(*(words[i:] for i in range(4)), strict=False))

    in_train = {ngram for text in task["train"].text for ngram in ngrams(text)}
    for text in task["dev"].text:
        num_shared = sum(ngram in in_train for ngram in ngrams(text))
        assert 2 * num_shared <= max(1, len(ngrams(text))), text


def test_sentences_are_english(task):
    for split in task.values():
        for text in split.text:
            assert text[0].isupper() and text[-1] == "." and len(_words(text)) >= 5, text
            assert not CODE.search(text), text
            assert not NAMES.search(text.lower()), text
            assert sum(c.isalpha() or c == " " for c in text) >= 0.8 * len(text), text


def test_corpus_is_english(corpus):
    assert len(set(corpus)) > 0.98 * len(corpus)
    for document in corpus:
        assert "\n\n" not in document and document == document.strip()
        for paragraph in document.split("\n"):
            assert not CODE.search(paragraph), paragraph
    common = sum(_words(document).count("the") for document in corpus)
    assert common > 0.04 * sum(len(document.split()) for document in corpus)


def test_prose_of_a_docstring_is_found_without_markup():
    from tinybert_jax.data.builtin import _is_prose, _paragraphs, _sentences

    docstring = """\
Return the sum of `values` along an :class:`~pkg.Axis`, see :meth:`the guide <pkg.guide>`.

Parameters
----------
values : array_like, optional
    The values that are *added* together here.
    They may be of ``any`` numeric type you like.
axis (`int`, *optional*): The axis along
    which the sum is taken.

.. math::

    Not a sentence of English prose at all.

.. note::
    This note is a sentence to be kept.

    * A listed sentence is kept as it stands.

The result is shown here by an example::

    This looks like prose but is code.

```python
This is also code and not prose.
```
>>> print(total)
This is printed. This is the second sentence that is printed.

Returns
-------
Series
    A series that holds the sum of each row.

Texts that cite another text [1]_ go away as a whole.
The value of :math:`x` is gone with its sentence too.

References
----------
Anybody wrote this reference and it is left out.
"""
    found = [s for p in _paragraphs(docstring) for s in _sentences(p) if _is_prose(s)]
    assert found == [
        "Return the sum of values along an Axis, see the guide.",
        "The values that are added together here.",
        "They may be of any numeric type you like.",
        "The axis along which the sum is taken.",
        "This note is a sentence to be kept.",
        "A listed sentence is kept as it stands.",
        "A series that holds the sum of each row.",
    ]


def test_finds_the_docstrings_that_ast_finds():
    """Independent reference: Python's parser, on a package with many quoting styles."""
    import ast
    import importlib.util
    import inspect
    from pathlib import Path

    from tinybert_jax.data.builtin import _EXCLUDED_FILES, _docstrings

    (root,) = importlib.util.find_spec("optax").submodule_search_locations
    expected = set()
    for file in Path(root).rglob("*.py"):
        if _EXCLUDED_FILES.search(f"optax/{file.relative_to(root).as_posix()}"):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                expected.add(ast.get_docstring(node) or "")
    expected = {text for text in expected if "\n" in text and "\\" not in text}
    found = {inspect.cleandoc(text) for text in _docstrings("optax")}
    assert len(expected) > 150
    assert len(expected - found) <= 0.01 * len(expected)


def test_wrong_arguments_and_missing_packages_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="expected split 'train' or 'dev', got 'test'"):
        builtin_task("test")
    with pytest.raises(ValueError, match="expected max_per_class of 1 or more, got 0"):
        builtin_task("dev", max_per_class=0)
    from tinybert_jax.data.builtin import _docstrings

    with pytest.raises(ValueError, match="package 'no_such_package'.*fix: reinstall"):
        next(_docstrings("no_such_package"))
