"""Exact search in blocks against all cosines at once."""

import numpy as np
import pytest

from tinybert_jax.inference.search import nearest, read_texts


@pytest.mark.parametrize("block", [1, 4, 7, 64])
def test_blocks_find_what_all_cosines_say(block):
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(30, 5)).astype(np.float32)
    queries = draw.normal(size=(9, 5)).astype(np.float32)
    scores, places = nearest(vectors, queries, 3, block=block)
    units = [own / np.linalg.norm(own, axis=1, keepdims=True) for own in (vectors, queries)]
    cosines = units[1] @ units[0].T
    expected = np.argsort(-cosines, axis=1)[:, :3]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, expected, 1), atol=1e-6)


def test_equal_texts_come_in_their_order_and_no_more_than_there_are():
    vectors = np.array([[0, 1], [1, 0], [2, 0], [3, 0]], np.float32)
    scores, places = nearest(vectors, np.array([[1, 0]], np.float32), 9, block=2)
    assert places.tolist() == [[1, 2, 3, 0]] and scores.tolist() == [[1, 1, 1, 0]]


def test_columns_of_tables_and_lines(tmp_path):
    table, plain = tmp_path / "a.jsonl", tmp_path / "a.txt"
    table.write_text('{"q": "tea", "a": 3}\n{"q": "jam", "a": null}\n')
    found = read_texts(str(table), "q", "a")
    assert (list(found.rows), found.texts, found.labels) == ([1, 2], ["tea", "jam"], [3, None])
    plain.write_text("\ntea\n\njam \n")
    found = read_texts(str(plain))
    assert (list(found.rows), found.texts, found.labels) == ([2, 4], ["tea", "jam"], None)
    with pytest.raises(ValueError, match="expected no label for plain text"):
        read_texts(str(plain), label="a")


def test_the_column_of_questions_is_found(tmp_path):
    table, told = tmp_path / "faq.csv", []
    table.write_text("question,answer\nWhere is tea?,Here\n")
    assert read_texts(str(table), label="answer", say=told.append).texts == ["Where is tea?"]
    assert told == [f"{table}: text in column 'question'; if not: --text"]
    table.write_text("question,text\nWhere is tea?,Tea is here.\n")
    assert read_texts(str(table)).texts == ["Tea is here."]
    table.write_text("question,title\nWhere is tea?,Tea\n")
    with pytest.raises(ValueError, match="'question'.*'title'") as caught:
        read_texts(str(table))
    assert "--text-pair" not in str(caught.value)
    assert read_texts(str(table), label="title").texts == ["Where is tea?"]
