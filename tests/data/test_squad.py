"""Questions and answers from both forms of file, and every mistake with its place."""

import json

import pytest

from tinybert_jax.data.squad import Answer, read_questions

TEXT = "Rome is old. Rome is large."


def _asked(question="Which city?", answers=((TEXT[:4], 0),), **more):
    own = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": "1", "question": question, "answers": own, **more}


def _squad(tmp_path, *questions, title="Rome", context=TEXT):
    paragraphs = [{"context": context, "qas": list(questions)}]
    tree = {"version": "v2.0", "data": [{"title": title, "paragraphs": paragraphs}]}
    file = tmp_path / "squad.json"
    file.write_text(json.dumps(tree))
    return file


def _lines(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_form_of_squad(tmp_path):
    answers = ((TEXT[:4], 0), (TEXT[:4], 13), (TEXT[:4], 0))
    impossible = _asked("How tall?", is_impossible=True, plausible_answers=[{"text": "old"}])
    found = read_questions(_squad(tmp_path, _asked(answers=answers), impossible))
    assert found.questions == ["Which city?", "How tall?"] and found.texts == [TEXT, TEXT]
    assert found.answers == [(Answer("Rome", 0), Answer("Rome", 13)), ()]
    assert found.articles == ["Rome", "Rome"]
    unlabelled = read_questions(_squad(tmp_path, {"question": "Why?"}), is_labelled=False)
    assert unlabelled.answers is None and unlabelled.questions == ["Why?"]


def test_lines_have_either_form_of_answers(tmp_path):
    row = {"question": "Which?", "context": TEXT}
    columns = {"text": ["old", "large"], "answer_start": [8, 21]}
    listed = [{"text": "old", "answer_start": 8}]
    file = _lines(
        tmp_path, row | {"answers": columns}, row | {"answers": listed}, row | {"answers": []}
    )
    found = read_questions(file)
    assert found.answers == [(Answer("old", 8), Answer("large", 21)), (Answer("old", 8),), ()]
    assert found.articles == [TEXT] * 3
    assert read_questions(_lines(tmp_path, row), is_labelled=False).answers is None


@pytest.mark.parametrize(("start", "place"), [(1, 0), (12, 13), (14, 13), (-5, 0), (99, 13)])
def test_an_answer_beside_its_place_is_found(tmp_path, start, place):
    found = read_questions(_squad(tmp_path, _asked(answers=(("Rome", start),))))
    assert found.answers == [(Answer("Rome", place),)]


@pytest.mark.parametrize(
    ("question", "parts"),
    [
        (_asked(answers=(("Paris", 0),)), ("parts of their contexts", "question 1: 'Paris'")),
        (_asked(question="  "), ("text as question", "question 1: '  '")),
        (_asked(question=None), ("text as question", "question 1: None")),
        ({"question": "Who?", "answers": "Rome"}, ("a list of answers", "question 1: 'Rome'")),
        ({"question": "Who?"}, ("a list of answers", "question 1: None")),
        ({"question": "Who?", "answers": [{"text": "Rome"}]}, ("a list of answers",)),
        ({"question": "Who?", "answers": {"text": ["old"], "answer_start": []}}, ("a list of",)),
        ("Who?", ("an object as question 1", "'Who?'")),
    ],
)
def test_wrong_questions(tmp_path, question, parts):
    with pytest.raises(ValueError) as caught:
        read_questions(_squad(tmp_path, question))
    for part in ("squad.json: expected ", "; got ", "; fix: ", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("[]", "a list 'data', as SQuAD has it"),
        ('{"data": 3}', "a list 'data', as SQuAD has it; got 3 in the file"),
        ('{"data": [{}]}', "a list 'paragraphs', as SQuAD has it; got None in article 1"),
        ('{"data": [{"paragraphs": [{"qas": 1}]}]}', "'qas', as SQuAD has it; got 1 in a para"),
        ('{"data": []}', "expected questions; got none"),
        ("{", "JSON in the form of SQuAD"),
        ('{"data": ["\\ud800"]}', "lone surrogates"),
        ("[" * 100_000, "JSON in the form of SQuAD"),
    ],
)
def test_wrong_files(tmp_path, content, part):
    file = tmp_path / "squad.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="fix: ") as caught:
        read_questions(file)
    assert part in str(caught.value)


def test_a_file_of_another_sort(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("question\n")
    with pytest.raises(ValueError, match="expected a suffix of .json, .jsonl; got the suffix"):
        read_questions(file)
    blank = _squad(tmp_path, _asked(question=" ", answers=()))
    assert read_questions(blank, keep_blank=True).questions == [""]
