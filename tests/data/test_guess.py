"""The guess of a task: what columns and values say, and when a person has to choose."""

import json

import pytest

from tinybert_jax.config.task_kinds import AnyTask
from tinybert_jax.data.guess import guess_task
from tinybert_jax.data.splits import Reading, read_task
from tinybert_jax.settings.section import Section
from tinybert_jax.tasks.table import TASKS

BODIES = ["Where is my card?", "I lost it", "The transfer failed", "It is late", "Pay", "Open it"]
FOLDERS = ["cards", "cards", "transfers", "transfers", "cards", "transfers"]
ANSWER = {"text": "Ada", "answer_start": 0}


class _Holder(Section):
    task: AnyTask


def _guess(tmp_path, name, content, **given):
    """The section of a config that the guess makes, after the reader of the task has read it."""
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    guess = guess_task(str(path), given)
    assert "\n" not in guess.told and "--task" in guess.told
    section = _Holder(task={"train": str(path), "dev_share": 0.1, **guess.settings, **given}).task
    examples = TASKS[section.kind].read(str(path), section, Reading())
    assert len(examples.text) > 0
    return section


def _csv(header, *columns, rows=6):
    lines = [",".join(str(column[i]) for column in columns) for i in range(rows)]
    return "\n".join([header, *lines] if header else lines) + "\n"


def test_a_table_of_mail_by_its_names(tmp_path):
    ids, subjects = range(6), ["Re: hello"] * 6
    content = _csv("id,subject,body,folder", ids, subjects, BODIES, FOLDERS)
    section = _guess(tmp_path, "mail.csv", content)
    assert (section.kind, section.text, section.label) == ("classification", "body", "folder")
    section = _guess(tmp_path, "mail.csv", content, text="subject", text_pair="body")
    assert (section.text, section.text_pair) == ("subject", "body")


def test_unknown_names_by_their_values(tmp_path):
    content = _csv("wann,was,wohin", range(6), BODIES, FOLDERS)
    section = _guess(tmp_path, "a.csv", content)
    assert (section.text, section.label) == ("was", "wohin")


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_a_first_line_that_is_a_row_names_no_columns(tmp_path, suffix):
    content = _csv("", FOLDERS, BODIES)
    if suffix == "tsv":
        content = content.replace(",", "\t")
    section = _guess(tmp_path, f"a.{suffix}", content)
    assert (section.kind, section.text, section.label) == ("classification", "1", "0")


def test_what_a_label_is(tmp_path):
    def kind_of(values, name="label", **given):
        section = _guess(tmp_path, "a.tsv", _tsv(name, values), **given)
        return section.kind

    def _tsv(name, labels):
        rows = (f"{text}\t{label}" for text, label in zip(BODIES, labels, strict=True))
        return "\n".join([f"text\t{name}", *rows]) + "\n"

    assert kind_of([0, 1, 0, 1, 2, 2]) == kind_of([1, 5, 4, 4, 1, 2], "stars") == "classification"
    assert kind_of([0.5, 1, 2, 3, 4.25, 5]) == kind_of([0, 1, 2, 3, 4, 5], "score") == "regression"
    lists = ["a", "b", "a,b", "b,c", "c", "a,b,c"]
    section = _guess(tmp_path, "a.tsv", _tsv("topics", lists))
    assert (section.kind, section.separator) == ("multi_label", ",")
    assert kind_of(["Rome, Italy", "Bern, Bern", "x", "x", "y", "y"]) == "classification"
    assert kind_of(lists, kind="classification", labels=sorted(lists)) == "classification"
    assert kind_of([0, 1, 0, 1, 1, 1], kind="regression") == "regression"


def test_two_texts_beside_scores_are_a_pair(tmp_path):
    others, scores = list(reversed(BODIES)), [0.5, 4.25, 3.0, 1.0, 0.0, 2.2]
    section = _guess(tmp_path, "a.csv", _csv("one,two,score", BODIES, others, scores))
    assert (section.kind, section.text, section.text_pair) == ("regression", "one", "two")
    assert section.label == "score"
    # Beside others they may be parts of one text, or one of them a text alone.
    for label, values in (("folder", FOLDERS), ("price", scores)):
        (tmp_path / "b.csv").write_text(_csv(f"one,two,{label}", BODIES, others, values))
        with pytest.raises(ValueError, match="--text COLUMN, and of a pair of texts --text-pair"):
            guess_task(str(tmp_path / "b.csv"), {})


def test_pairs_and_columns_of_0_and_1(tmp_path):
    content = _csv("sentence2,sentence1,label", BODIES, BODIES[::-1], FOLDERS)
    section = _guess(tmp_path, "a.csv", content)
    assert (section.text, section.text_pair) == ("sentence1", "sentence2")
    content = _csv("text,sport,money", BODIES, [0, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 1])
    section = _guess(tmp_path, "a.csv", content)
    assert section.kind == "multi_label" and section.label_columns == ("sport", "money")


def test_objects_questions_and_tags(tmp_path):
    def lines(*rows):
        return "".join(json.dumps(row) + "\n" for row in rows)

    rows = [{"body": text, "topics": [label]} for text, label in zip(BODIES, FOLDERS, strict=True)]
    assert _guess(tmp_path, "a.jsonl", lines(*rows)).kind == "multi_label"
    asked = {"question": "Who?", "context": "Ada did.", "answers": [ANSWER]}
    assert _guess(tmp_path, "q.jsonl", lines(asked)).kind == "question_answering"
    qas = [{"id": "1", "question": "Who?", "answers": [ANSWER]}]
    squad = {"data": [{"title": "t", "paragraphs": [{"context": "Ada did.", "qas": qas}]}]}
    assert _guess(tmp_path, "q.json", json.dumps(squad)).kind == "question_answering"
    tagged = {"tokens": ["Ada", "did"], "tags": ["B-PER", "O"]}
    assert _guess(tmp_path, "t.jsonl", lines(tagged)).kind == "tagging"
    conll = "Ada\tB-PER\ndid\tO\n\nSo\tO\n"
    for name in ("t.conll", "t.txt", "t.tsv"):
        assert _guess(tmp_path, name, conll).kind == "tagging"


@pytest.mark.parametrize("splits", [["train", "validation"], ["train", "test"]])
def test_a_saved_data_set_is_read_by_its_splits(tmp_path, splits):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    part = datasets.Dataset.from_dict(
        {"sentence": BODIES, "label": [0, 1, 0, 1, 1, 0]}, features=features
    )
    folder = tmp_path / "saved"
    datasets.DatasetDict(dict.fromkeys(splits, part)).save_to_disk(str(folder))
    guess = guess_task(str(folder), {})
    dev = {"dev": str(folder), "dev_split": "validation"} if "validation" in splits else {}
    columns = {"kind": "classification", "text": "sentence", "label": "label"}
    assert guess.settings == {"train_split": "train", **columns, **dev}
    settings = {"train": str(folder), **({} if dev else {"dev_share": 0.5}), **guess.settings}
    section = _Holder(task=settings).task
    data = read_task(section, TASKS[section.kind].read)
    assert data.label_names == data.dev.label_names == ("no", "yes")


def test_objects_that_lack_a_key_keep_its_column(tmp_path):
    rows = [
        {"text": text, "source": f"web{len(text) % 2}", "label": label}
        for text, label in zip(BODIES, FOLDERS, strict=True)
    ]
    del rows[3]["label"]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(ValueError, match="a key 'label'; got other in 1 of 6 lines"):
        _guess(tmp_path, "a.jsonl", content)
    for row in rows[1:5]:
        row.pop("label", None)
    content = "".join(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(ValueError, match="a key 'label'; got other in 4 of 6 lines"):
        _guess(tmp_path, "a.jsonl", content, text="text", label="label")
    with pytest.raises(ValueError, match="expected SQuAD's form in a .json file"):
        _guess(tmp_path, "a.json", content)


@pytest.mark.parametrize(
    ("content", "given", "words"),
    [
        (
            _csv("a,b,folder,topic", BODIES, range(6), FOLDERS, FOLDERS),
            {},
            ("one column that can be the label", "it may be 'folder', 'topic'", "--label COLUMN"),
        ),
        (
            _csv("a,b,folder", BODIES, BODIES[::-1], FOLDERS),
            {},
            ("one column that can be the text", "columns 'a', 'b', 'folder'", "--text COLUMN"),
        ),
        (
            _csv("body,folder", BODIES, FOLDERS),
            {"label": "foldr"},
            ("a column 'foldr'; got columns 'body', 'folder'", "did you mean 'folder'"),
        ),
        (
            _csv("body|folder", BODIES),
            {},
            ("a column of text and one of labels", "separated by '|'"),
        ),
        (
            _csv("body;score", [f"{text};{n},5" for n, text in enumerate(BODIES)]),
            {},
            ("numbers with a point in column 'score'", "3.5 for 3,5", "--task multi_label"),
        ),
        (
            _csv("body,folder", range(6), BODIES, FOLDERS),
            {},
            ("2 columns, as in the first line", "line 2: 3", "name every column"),
        ),
        ("\n" + _csv("body,folder", BODIES, FOLDERS), {}, ("remove the blank first line",)),
        ("body,folder\ra,b\r", {"format": "tsv"}, ("no rows, only a header", "LF, not with CR")),
    ],
)
def test_where_a_person_has_to_choose_the_columns_are_listed(tmp_path, content, given, words):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        guess_task(str(path), given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("latin-1", ("line 2: 0xe9 at byte ", "iconv -f LATIN1 -t UTF-8 ")),
        ("cp1252", ("line 2: 0x92 at byte ", "iconv -f WINDOWS-1252 -t UTF-8 ")),
        ("utf-16", ("got UTF-16 (its first two bytes say so)", "iconv -f UTF-16 -t UTF-8 ")),
        ("utf-16-le", ("got UTF-16 (every other byte is 0)", "iconv -f UTF-16LE ")),
        ("utf-16-be", ("got UTF-16 (every other byte is 0)", "iconv -f UTF-16BE ")),
    ],
)
def test_another_encoding_is_told_with_the_command_that_mends_it(tmp_path, encoding, words):
    bodies = ["A café"] + BODIES[1:]
    bodies[0] += "\u2019s card" if encoding == "cp1252" else ""
    bodies[0] = bodies[0].replace("é", "e") if encoding == "cp1252" else bodies[0]
    path = tmp_path / "my mail.csv"
    path.write_bytes(_csv("body,folder", bodies, FOLDERS).encode(encoding))
    with pytest.raises(ValueError) as caught:
        guess_task(str(path), {})
    for word in ("expected UTF-8; got ", *words, f"'{path}' > '{tmp_path}/my mail-utf8.csv'"):
        assert word in str(caught.value)
