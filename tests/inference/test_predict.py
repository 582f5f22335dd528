"""`tinybert predict` on a table: the columns that it reads, keeps and writes."""

import datetime
import json

import datasets
import jax
import pytest
from tiny_inputs import TEACHER, TEXTS, write_inputs

from tinybert_jax import cli
from tinybert_jax.huggingface.folder import read_model, save_model
from tinybert_jax.huggingface.head import Head
from tinybert_jax.models.heads import make_classifier

KIND = ("SequenceClassification", "single_label_classification", ("neg", "pos"))
BODY = {"text": "body"}
PAIR = {"text": "one", "text_pair": "two"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models that were trained on unnamed columns, on `body`, and on the pair `one`, `two`."""
    folder = tmp_path_factory.mktemp("models")
    _, config, tokenizer = write_inputs(folder, **TEACHER)
    params = make_classifier(config, 2)[1](jax.random.key(0))
    for name, columns in (("plain", {}), ("body", BODY), ("pair", PAIR)):
        head = Head(*KIND, reads_pairs=name == "pair", columns=columns)
        save_model(folder / name, params, config, tokenizer, head=head)
        assert read_model(folder / name).head == head
    return folder


@pytest.fixture
def predict(models, tmp_path, capsys):
    """(status, rows, standard error) of the command on a file with this content."""

    def run(model, content, *words, name="new.csv"):
        (tmp_path / name).write_text(content)
        status = cli.main(["predict", str(models / model), str(tmp_path / name), *words])
        out, err = capsys.readouterr()
        return status, [json.loads(line) for line in out.splitlines()], err

    return run


@pytest.mark.parametrize(
    ("model", "content", "told"),
    [
        ("body", "text,body\n{1},{0}\n", "text in column 'body', as the model was trained on"),
        ("plain", "id;question\n1;{0}\n", "text in column 'question'"),
        ("plain", "Review\n{0}\n", "text in column 'Review'"),
        ("body", "text,n\n{0},1\n", "text in column 'text'"),
        ("plain", "text,other\n{0},{1}\n", ""),
    ],
)
def test_the_column_of_the_text_is_found_and_told(predict, model, content, told):
    status, rows, err = predict(model, content.format(*TEXTS))
    assert status == 0 and [row["text"] for row in rows] == [TEXTS[0]]
    assert f"new.csv: {told}; if not: --text" in err if told else "column" not in err


def test_a_pair_is_found_by_the_names_of_the_training_file(predict):
    content = f"two,one,n\n{TEXTS[1]},{TEXTS[0]},1\n"
    status, rows, err = predict("pair", content)
    assert status == 0 and "text in columns 'one' and 'two', as the model" in err
    assert rows == predict("plain", content, "--text", "one", "--text-pair", "two")[1]


def test_errors_name_the_options_of_the_command(predict):
    for words in (["--text", "bdy"], ["--text-pair", "bdy"]):
        status, rows, err = predict("plain", f"text,body\n{TEXTS[0]},{TEXTS[1]}\n", *words)
        assert status == 2 and rows == []
        assert "did you mean 'body'? (--text or --text-pair)" in err
    for content in (
        f"question,review\n{TEXTS[0]},{TEXTS[1]}\n",  # two that may be it
        f"{TEXTS[0]}\n{TEXTS[1]}\n",  # none: it has no line of names
    ):
        status, _, err = predict("plain", content)
        assert status == 2 and "one column that can be the text" in err
        assert "--text COLUMN" in err and "0, 1 … in a file without a line of names" in err
    rows = '{"body": "a"}\n{"title": "b"}\n'
    status, _, err = predict("body", rows, name="a.jsonl")
    assert status == 2 and "'body'" in err and "line 2" in err


def test_columns_that_are_no_names_are_refused(models):
    file = models / "body" / "config.json"
    before = file.read_text()
    for wrong in (["body"], {"text": 1}, {"label": "x"}, {"text": "\x1b"}):
        file.write_text(json.dumps(json.loads(before) | {"tinybert_columns": wrong}))
        with pytest.raises(ValueError, match="expected names of columns for text and text_pair"):
            read_model(models / "body")
    file.write_text(before)


def test_columns_are_copied_and_logits_come_when_asked_for(predict, tmp_path):
    content = f"id;text;team\n7;{TEXTS[0]};a\n8; ;b\n9;{TEXTS[1]};\n"
    status, rows, _ = predict("plain", content, "--keep", "id", "--keep", "team")
    assert status == 0 and [(row["id"], row["team"]) for row in rows] == [
        ("7", "a"),
        ("8", "b"),
        ("9", ""),
    ]
    assert list(rows[0]) == ["row", "text", "id", "team", "label", "probability"]
    _, again, _ = predict("plain", content, "--logits")
    assert list(again[0]["logits"]) == ["neg", "pos"]
    assert again[0]["label"] == max(again[0]["logits"], key=again[0]["logits"].get)
    lines = "".join(json.dumps({"text": text, "n": [1]}) + "\n" for text in TEXTS[:2])
    assert predict("plain", lines, "--keep", "n", name="a.jsonl")[1][1]["n"] == [1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--keep", "teams"), "did you mean 'team'? (--keep)"),
        (("--keep", "label"), "--keep: expected other columns than those of the output"),
        (("--keep", "text"), "got ['text']; rename them in the file"),
        (("--keep", "logits", "--logits"), "got ['logits']; rename them in the file"),
    ],
)
def test_columns_that_cannot_be_copied_are_refused_before_a_byte_is_written(
    predict, tmp_path, words, told
):
    output = tmp_path / "out.jsonl"
    content = f"text,label,team,logits\n{TEXTS[0]},a,b,c\n"
    status, rows, err = predict("plain", content, *words, "-o", str(output))
    assert (status, rows, output.exists()) == (2, [], False) and told in err


def test_rows_that_are_written_and_texts_that_are_cut_are_counted(
    models, predict, tmp_path, capsys
):
    output = tmp_path / "out.jsonl"
    content = f"text\n{TEXTS[0]}\n{'tea ' * 600}\nsea\n \n"
    status, _, err = predict("plain", content, "-o", str(output))
    limit = read_model(models / "plain").config.max_position_embeddings
    assert status == 0 and f"{output}: 4 rows\n" in err
    assert f"1 of 3 texts has more than {limit} tokens: the rest is not read\n" in err
    words = [
        "predict",
        str(models / "plain"),
        "--max-length",
        "4",
        "-t",
        "tea tea tea",
        "-t",
        "tea",
    ]
    assert cli.main([*words, "-t", "tea tea tea tea"]) == 0
    assert "2 of 3 texts have more than 4 tokens" in capsys.readouterr().err
    assert cli.main(["predict", str(models / "plain"), "-t", "tea", "--keep", "id"]) == 2
    assert "--keep: expected a data file, got texts" in capsys.readouterr().err


def test_kept_values_that_json_has_not_are_refused(predict):
    rows = [{"text": TEXTS[0], "n": 1.0}, {"text": TEXTS[1], "n": float("nan")}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    status, _, err = predict("plain", lines, "--keep", "n", name="a.jsonl")
    assert status == 2 and "row 2, column 'n': --keep: expected a value that JSON has" in err


def test_a_data_set_is_read_by_the_trained_column_and_its_dates_are_kept(models, tmp_path, capsys):
    row = {"text": TEXTS[1], "body": TEXTS[0], "day": datetime.date(2026, 1, 2)}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "set")
    command = ["predict", str(models / "body"), str(tmp_path / "set"), "--keep", "day"]
    assert cli.main(command) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (row["text"], row["day"]) == (TEXTS[0], "2026-01-02")
