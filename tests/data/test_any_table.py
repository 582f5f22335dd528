"""Tables with any text are read as they were written; rows of another width are named."""

import csv

import hypothesis
import pytest
from hypothesis import strategies as st

from tinybert_jax.data.tables import read_labelled


def _texts(exclude=""):
    """Any text that is not blank, without surrogates, which UTF-8 cannot hold."""
    special = [character for character in "\"',\t\n\r" if character not in exclude]
    characters = st.characters(exclude_categories=["Cs"], exclude_characters=exclude)
    return st.text(characters | st.sampled_from(special), min_size=1).filter(str.strip)


def _rows(texts):
    return st.lists(st.tuples(texts, texts, st.sampled_from(["yes", "no"])), min_size=1, max_size=9)


def _columns(path):
    options = {"text_pair": "second", "label": "label", "labels": ["no", "yes"]}
    got = read_labelled(path, text="first", **options)
    labels = [got.label_names[label] for label in got.labels]
    return list(zip(got.text, got.text_pair, labels, strict=True))


@hypothesis.given(_rows(_texts()), st.sampled_from(["excel", "unix"]))
def test_any_text_in_a_csv_is_read_as_it_was_written(tmp_path_factory, rows, dialect):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, dialect)
        writer.writerows([("first", "second", "label"), *rows])
    assert _columns(path) == rows


@hypothesis.given(_rows(_texts(exclude="\t\n")), st.sampled_from(["\n", "\r\n"]))
def test_any_text_in_a_tsv_is_read_as_it_was_written(tmp_path_factory, rows, line_break):
    path = tmp_path_factory.mktemp("tsv") / "a.tsv"
    lines = ["\t".join(row) + line_break for row in [("first", "second", "label"), *rows]]
    path.write_bytes("".join(lines).encode())
    assert _columns(path) == rows


@pytest.mark.parametrize("format", ["csv", "tsv"])
@hypothesis.given(data=st.data())
def test_any_rows_with_more_or_fewer_columns_are_named_by_line(tmp_path_factory, format, data):
    separator = "," if format == "csv" else "\t"
    text = st.text("ab \n\"'" if format == "csv" else "ab \"'", min_size=1).filter(str.strip)
    rows = data.draw(st.lists(st.lists(text, min_size=1, max_size=4), min_size=1, max_size=12))
    content, bad = separator.join(["first", "second"]) + "\n", []
    for row in rows:
        if len(row) != 2:
            bad.append(f"line {content.count(chr(10)) + 1}: {len(row)}")
        quoted = ['"' + field.replace('"', '""') + '"' for field in row]
        content += separator.join(quoted if format == "csv" else row) + "\n"
    hypothesis.assume(bad)
    path = tmp_path_factory.mktemp("bad") / f"a.{format}"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        read_labelled(path, text="first", text_pair="second", label=None)
    named = ", ".join(bad[:5]) + (", …" if len(bad) > 5 else "")
    got = f"got other in {len(bad)} of {len(rows)} lines ({named})"
    assert f"expected 2 columns in every row; {got}" in str(caught.value)
