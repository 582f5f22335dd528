"""Semicolons between the columns of a .csv file: decided by its first line, for the whole file."""

import csv

import pytest

from tinybert_jax.data.guess import guess_task
from tinybert_jax.data.records import Options, find_sources, read_chunks, read_records
from tinybert_jax.data.tables import read_labelled

ROWS = [("Where is it, and why?", "cards"), ('he said "no"; twice', "fees"), ("a\nb", "cards")]
ROWS += [(f"text {place}", ("cards", "fees")[place % 2]) for place in range(9)]


def _write(path, header, separator=";", **options):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator, **options).writerows([header, *ROWS])
    return str(path)


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_semicolons_give_the_rows_that_commas_give(tmp_path, quoting):
    found = []
    for separator in ",;":
        path = _write(tmp_path / "a.csv", ("the body", "team"), separator, quoting=quoting)
        found.append(read_labelled(path, text="the body", label="team"))
        guess = guess_task(path, {})
        assert guess.settings["text"] == "the body" and guess.settings["label"] == "team"
        assert ("columns separated by ';'" in guess.told) == (separator == ";")
    assert found[0].text == found[1].text == [text for text, _ in ROWS]
    assert found[0].labels.tolist() == found[1].labels.tolist()


def test_a_corpus_is_read_with_semicolons_too(tmp_path):
    path = _write(tmp_path / "a.csv", ("body", "team"))
    options = Options("body", None, "line", 1000)
    chunks = read_chunks(0, find_sources([path]), options)
    read = [record.text for chunk in chunks for record in read_records(chunk, options)]
    assert read == [text for text, _ in ROWS]


@pytest.mark.parametrize(
    ("content", "text", "expected"),
    [
        ("body,n\na; b,1\nc;d,2\n", "body", ["a; b", "c;d"]),
        ('"body; raw"\na; b\nc\n', "body; raw", ["a; b", "c"]),
        ("body; raw\na; b\nc\n", "body; raw", ["a; b", "c"]),
        ("body\na; b\nc\n", "body", ["a; b", "c"]),
        ("a; b\nc\n", "0", ["a; b", "c"]),
        ("a; b\n", "0", ["a; b"]),
        ("a;b\nc;d\n", "0", ["a;b", "c;d"]),
        ("a;b\nc;d\n", "1", ["b", "d"]),
    ],
)
def test_semicolons_in_a_single_column_are_text(tmp_path, content, text, expected):
    (tmp_path / "a.csv").write_text(content)
    assert read_labelled(tmp_path / "a.csv", text=text, label=None).text == expected


def test_rows_that_are_narrower_than_the_first_line_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("body;team\na;b\nc\nd,e\n")
    told = "expected 2 columns in every row; got other in 2 of 3 lines .line 3: 1, line 4: 1.; fix:"
    with pytest.raises(ValueError, match=told):
        read_labelled(tmp_path / "a.csv", text="body", label="team")
