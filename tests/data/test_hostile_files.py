"""Readers of .csv, .tsv, .jsonl and .conll: rows or a ValueError that names the file and line."""

import json
import re
import shutil

import hypothesis
import pytest
from hypothesis import strategies as st

from tinybert_jax.data import records
from tinybert_jax.data.conll import read_tagged
from tinybert_jax.data.corpus import read_corpus
from tinybert_jax.data.errors import ColumnError, listed, short
from tinybert_jax.data.records import Options
from tinybert_jax.data.tables import read_labelled

_TOLD = (ValueError, ColumnError)  # and not one of the kinds that Python itself raises
TEXTS = ["a fine film", 'he said "no", twice', "tea\u2028and\x85jam", "中文。", "e\u0301"]
GOOD = {
    "csv": 'text,label\n"a ""fine"" film",pos\r\ntea,neg\n"two\nlines",pos\n',
    "tsv": "text\tlabel\na fine film\tpos\ntea\tneg\n\u2028jam\tpos\r\n",
    "jsonl": "".join(
        json.dumps({"text": text, "label": place % 2, "n": [1]}) + "\n"
        for place, text in enumerate(TEXTS)
    ),
    "conll": "-DOCSTART- O\n\nIn O\nRome B-LOC\n\n# O\nJo B-PER\nDoe I-PER\n",
}
# What a mutation puts somewhere: separators, brackets, escapes, halves of characters, no UTF-8.
PIECES = [
    *(b"\n", b"\r", b"\t", b",", b'"', b"\x00", b" ", b"\\", b"{", b"}", b"[", b"]", b":", b"-"),
    *(b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xc2\x85", b"\\ud800", b"\\udc00", b"NaN"),
    *(b"1e999", b"null", b'"text"', b"[" * 3000, b"9" * 5000, b"# ", b"I-LOC", b"-DOCSTART-"),
]


def _mutations(good):
    """Up to four changes of a file: a part is cut out, replaced or repeated."""
    change = st.tuples(
        st.integers(0, len(good)),
        st.integers(0, 9),
        st.sampled_from(PIECES) | st.binary(max_size=4) | st.just(b""),
    )

    def mutate(changes):
        content = good
        for start, length, piece in changes:
            content = content[:start] + piece + content[start + length :]
        return content

    return st.lists(change, max_size=4).map(mutate)


def _read(path):
    if path.suffix == ".conll":
        return read_tagged(path).words
    return read_labelled(path, text="text", label="label").text


def _check(path, content):
    """Rows, or a message of one line that names the file, what was expected and what was got."""
    path.write_bytes(content)
    try:
        rows = _read(path)
    except ValueError as error:
        message = str(error)
        assert type(error) in _TOLD
        assert message.startswith(str(path))
        assert re.search(r": expected .*; got .*; fix: ", message, re.DOTALL)
        assert len(message) < 3000
    else:
        assert rows
        texts = rows if path.suffix != ".conll" else [word for words in rows for word in words]
        assert all(text.strip() and text.encode() for text in texts)


@pytest.mark.parametrize("kind", GOOD)
@hypothesis.settings(max_examples=200)
@hypothesis.given(data=st.data())
def test_a_mutated_file_gives_rows_or_a_message(tmp_path_factory, kind, data):
    content = data.draw(_mutations(GOOD[kind].encode()))
    _check(tmp_path_factory.mktemp("mutated") / f"a.{kind}", content)


@pytest.mark.parametrize("kind", GOOD)
@hypothesis.settings(max_examples=100)
@hypothesis.given(content=st.binary(max_size=80) | st.lists(st.sampled_from(PIECES)).map(b"".join))
def test_any_bytes_give_rows_or_a_message(tmp_path_factory, kind, content):
    _check(tmp_path_factory.mktemp("bytes") / f"a.{kind}", content)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "txt"])
@hypothesis.settings(max_examples=100)
@hypothesis.given(data=st.data())
def test_a_mutated_file_gives_records_of_which_the_bad_ones_have_a_reason(
    tmp_path_factory, kind, data
):
    """The readers of `data prepare`: the whole file is read, in order, or a message names it."""
    good = GOOD.get(kind, GOOD["csv"]).encode()
    path = tmp_path_factory.mktemp("records") / f"a.{kind}"
    path.write_bytes(data.draw(_mutations(good)))
    options = Options("text", None, "line", 256)
    try:
        sources = records.find_sources([str(path)])
        found = [
            record
            for chunk in records.read_chunks(0, sources, options)
            for record in records.read_records(chunk, options)
        ]
    except ValueError as error:
        assert type(error) in _TOLD and str(error).startswith(str(path))
        return
    lines = [int(record.place.removeprefix("line ")) for record in found]
    assert lines == sorted(set(lines))
    for record in found:
        assert (record.text is None) == bool(record.reason)
        assert record.text is None or record.text.encode().strip()


@pytest.mark.parametrize(
    "line, got",
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "a", "label": ' + b"[" * 900 + b"]" * 900 + b"}", "[[["),
        (b'{"text": "a", "label": {"a": 1}}', "{'a': 1}"),
        (b'{"text": "a\\ud800", "label": "x"}', "ud800"),
        (b'{"text": "a", "label": "\\udfff"}', "udfff"),
        (b'{"text": "a", "label": ' + b"9" * 5000 + b"}", "a number with too many digits"),
        (b'{"text": "' + b"word " * 4_000_000 + b'"', "Expecting ',' delimiter"),
        (b"\x00" * 5000, "Expecting value at column 1"),
    ],
)
def test_a_hostile_line_is_named(tmp_path, line, got):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "tea", "label": "x"}\n' + line + b"\n")
    with pytest.raises(ValueError) as caught:
        read_labelled(path, text="text", label="label")
    message = str(caught.value)
    assert message.startswith(f"{path}: expected ") and "1 of 2 lines (line 2: " in message
    assert got in message and len(message) < 600
    if b'"text": "a", ' not in line:  # the text itself is wrong
        with pytest.raises(ValueError, match="a.jsonl: expected "):
            read_corpus([str(path)])


def test_pairs_of_escapes_and_long_lines_are_text(tmp_path):
    path = tmp_path / "a.jsonl"
    long = "word " * 4_000_000
    rows = [("\U0001f600", "x"), ("nul \x00 in it", "y"), (long, "x"), ("\\ud800 in words", "y")]
    path.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows))
    assert read_labelled(path, text="text", label="label").text == [text for text, _ in rows]
    assert json.dumps(rows[0][0]) == '"\\ud83d\\ude00"'


def test_many_labels_and_columns_are_read_in_time_and_named_in_a_short_message(tmp_path):
    num = 100_000
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n" + "".join(f"tea\tlabel {n}\n" for n in range(num)))
    found = read_labelled(path, text="text", label="label")
    assert len(found.label_names) == num and len(set(found.labels.tolist())) == num
    with pytest.raises(ValueError) as caught:
        read_labelled(path, text="text", label="label", labels=found.label_names[1:])
    assert len(str(caught.value)) < 1000
    path.write_text("\t".join(f"column {n}" for n in range(num)) + "\n" + "\t" * (num - 1) + "\n")
    with pytest.raises(ValueError, match="expected a column 'text'; got columns 'column 0', .*, …"):
        read_labelled(path, text="text", label=None)
    assert listed(["a", "b"]) == "'a', 'b'" and listed(["a"] * 21).endswith("'a', …")


def test_short_shows_a_value_of_any_depth():
    value: list = []
    for _ in range(100_000):
        value = [value]
    assert short(value) == "a list that is nested too deeply"
    while value:  # freeing it at once would recurse too
        value = value.pop()


GARBAGE = [b"", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"_data_files": 1}', b"\x00" * 999, None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("saved") / "set"
    data = datasets.Dataset.from_dict({"text": ["tea and jam"] * 50, "label": [0, 1] * 25})
    data.save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("content", GARBAGE, ids=lambda content: repr(content)[:20])
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_garbled_datasets_folder_is_refused_with_its_path(saved, tmp_path, name, content):
    folder = tmp_path / "set"
    shutil.copytree(saved, folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    if (name, content) == ("dataset_info.json", b'{"_data_files": 1}'):
        return  # unknown keys are ignored
    with pytest.raises(ValueError, match=f"{folder}: expected a folder written by save_to_disk; "):
        read_labelled(folder, text="text", label="label")


def test_a_flipped_bit_in_the_text_of_a_datasets_folder_is_refused_or_read(saved, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(saved, folder)
    path = folder / "data-00000-of-00001.arrow"
    content = bytearray(path.read_bytes())
    content[content.index(b"tea and jam")] ^= 0x80  # no UTF-8
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{folder}: expected UTF-8; got "):
        read_labelled(folder, text="text", label="label")
    options = Options("text", None, "line", 256)
    with pytest.raises(ValueError, match=f"{folder}: expected a file that can be read to its end"):
        list(records.read_chunks(0, records.find_sources([str(folder)]), options))
