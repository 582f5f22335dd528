"""sources: every format gives the same rows; every mistake is one error that can be acted on."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tinybert_jax.data.corpus import read_corpus
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.tables import read_labelled

DATA = os.environ.get("TINYBERT_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="TINYBERT_DATA is unset")

TEXTS = ["a fine film", 'he said "no', "tea, toast\u2028and\x85jam"]
LABELS = ["pos", "neg", "pos"]


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def _tsv(texts=TEXTS, labels=LABELS, header="text\tlabel\n"):
    return header + "".join(f"{t}\t{y}\n" for t, y in zip(texts, labels, strict=True))


def _fails(*parts: str, **kwargs):
    """Reads and checks that the one error holds all parts and the three words of every error."""
    arguments = {"text": "text", "label": "label"} | kwargs
    with pytest.raises(ValueError) as caught:
        read_labelled(arguments.pop("path"), **arguments)
    for part in (": expected ", "; got ", "; fix: ", *parts):
        assert part in str(caught.value)


def _same(got: Examples):
    assert got.text == TEXTS
    assert got.text_pair is None
    assert got.labels is not None and got.labels.dtype == np.int32
    assert got.labels.tolist() == [1, 0, 1]
    assert got.label_names == ("neg", "pos")


# Formats


def test_tsv_csv_jsonl_and_datasets_give_the_same_rows(write, tmp_path):
    _same(read_labelled(write("a.tsv", _tsv()), text="text", label="label"))
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("label", "text"), *zip(LABELS, TEXTS, strict=True)])
    _same(read_labelled(tmp_path / "a.csv", text="text", label="label"))
    rows = [{"text": t, "label": y} for t, y in zip(TEXTS, LABELS, strict=True)]
    jsonl = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _same(read_labelled(write("a.jsonl", jsonl), text="text", label="label"))
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    _same(read_labelled(tmp_path / "saved", text="text", label="label"))


def test_datasets_dict_wants_a_split_and_brings_its_class_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1]}, features=features)
    path = str(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "dev": data.select([1])}).save_to_disk(path)
    _same(read_labelled(path, text="text", label="label", split="train"))
    dev = read_labelled(path, text="text", label="label", split="dev")
    assert (dev.labels.tolist(), dev.label_names) == ([0], ("neg", "pos"))
    named = read_labelled(
        path, text="text", label="label", split="dev", labels={"0": "no", "1": "yes"}
    )
    assert named.label_names == ("no", "yes")
    known = read_labelled(path, text="text", label="label", split="train", labels=("pos", "neg"))
    assert (known.labels.tolist(), known.label_names) == ([0, 1, 0], ("pos", "neg"))
    stars = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(3)})
    stars["label"].names = ["1", "2", "3"]
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": [1, 2, 1]}, features=stars)
    data.save_to_disk(tmp_path / "stars")
    read = read_labelled(tmp_path / "stars", text="text", label="label", labels=("1", "2", "3"))
    assert read.labels.tolist() == [1, 2, 1]
    _fails("splits train, dev", "None", path=path)
    _fails("splits train, dev", "'test'", path=path, split="test")
    _fails(
        "'texts'", "'text', 'label'", "did you mean 'text'", path=path, split="dev", text="texts"
    )


def test_hub_id_goes_to_load_dataset(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if args[0] == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub")
        return datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    _same(read_labelled("hub:nyu-mll/glue:sst2", text="text", label="label", split="train"))
    _same(read_labelled("hub:me/mine", text="text", label="label"))
    assert calls == [
        (("nyu-mll/glue", "sst2"), {"split": "train"}),
        (("me/mine", None), {"split": None}),
    ]
    _fails("hub:no/such", "FileNotFoundError", "doesn't exist", "check name", path="hub:no/such")
    _fails("hub:owner/name", "hub:nyu-mll/glue:sst2", path="hub:glue")
    _fails("'tsv'", path="hub:me/mine", format="tsv")


def test_without_header_columns_are_positions_and_extra_columns_are_allowed(write):
    path = write("a.tsv", "x\t1.5\tA dog.\tThe dog.\ny\t0\tA cat.\tNo cat.\tsource\turl\n")
    got = read_labelled(path, text="2", text_pair="3", label="1", numbers=True)
    assert got.text == ["A dog.", "A cat."] and got.text_pair == ["The dog.", "No cat."]
    assert got.labels.dtype == np.float32 and got.labels.tolist() == [1.5, 0.0]
    assert got.label_names is None
    _fails("all named or all positions", "text, 1", path=path, label="1")
    _fails("at least 6 columns", "1 of 2 lines (line 1: 4)", path=path, text="5", label="0")


def test_byte_order_marks_and_carriage_returns_are_tolerated(write):
    damaged = "\ufeff".encode().decode("latin-1")  # as in line 1 of MRPC
    for mark in ("\ufeff", damaged):
        _same(read_labelled(write("a.tsv", mark + _tsv()), text="text", label="label"))
    _same(read_labelled(write("b.tsv", _tsv().replace("\n", "\r\n")), text="text", label="label"))
    _same(read_labelled(write("c.txt", _tsv()), text="text", label="label", format="tsv"))


def test_csv_keeps_line_breaks_and_texts_over_128_kib(write):
    csv.field_size_limit(131_072)
    path = write("a.csv", 'text,label\n"one\ntwo",0\n"' + "long " * 30_000 + '",1\n')
    got = read_labelled(path, text="text", label="label")
    assert got.text[0] == "one\ntwo" and len(got.text[1]) == 150_000
    assert csv.field_size_limit() == 131_072


# Labels


def test_class_ids_follow_the_labels_given(write):
    path = write("a.tsv", _tsv(labels=["10", "9", "-1"]))

    def read(**kwargs):
        got = read_labelled(path, text="text", label="label", **kwargs)
        return got.labels.tolist(), got.label_names

    assert read() == ([2, 1, 0], ("-1", "9", "10"))  # integers by number, not as text
    assert read(labels=["9", "10", "-1"]) == ([1, 0, 2], ("9", "10", "-1"))
    assert read(labels={"-1": "low", "9": "mid", "10": "high"}) == (
        [2, 1, 0],
        ("low", "mid", "high"),
    )
    assert read(labels={"-1": "low", "9": "high", "10": "high"}) == ([1, 1, 0], ("low", "high"))


def test_json_labels_compare_as_text(write):
    path = write("a.jsonl", '{"text": "a b", "label": 1}\n{"text": "c d", "label": true}\n')
    got = read_labelled(path, text="text", label="label", labels=["1", "True"])
    assert got.labels.tolist() == [0, 1]


def test_max_rows_cuts_rows_but_not_classes(write):
    got = read_labelled(write("a.tsv", _tsv()), text="text", label="label", max_rows=1)
    assert (got.text, got.labels.tolist(), got.label_names) == (TEXTS[:1], [1], ("neg", "pos"))


def test_no_label_column_reads_unlabelled_text(write):
    path = write("a.tsv", "text\nhello there\n")
    assert read_labelled(path, text="text", label=None) == Examples(
        ["hello there"], None, None, None
    )
    named = read_labelled(path, text="text", label=None, labels=["neg", "pos"])
    assert (named.labels, named.label_names) == (None, ("neg", "pos"))


# Mistakes


def test_a_path_that_is_not_there_or_not_readable(write, tmp_path):
    path = write("train.tsv", _tsv())
    _fails("trian.tsv", "did you mean 'train.tsv'?", path=tmp_path / "trian.tsv")
    _fails("nothing", "check the name", path=tmp_path / "no" / "where.tsv")
    _fails(".tsv, .csv or .jsonl", "'.dat'", "task.format", path=write("a.dat", "x"))
    _fails("'.parquet'", "to_json(PATH, orient='records'", path=write("a.parquet", "x"))
    _fails("no suffix", path=write("a", "x"))
    _fails("'json'", "did you mean 'jsonl'?", path=path, format="json")
    _fails("a folder", "a file", path=path, format="datasets")
    _fails("a tsv file", "a folder", path=tmp_path, format="tsv")
    _fails("no split", "'dev'", "leave split out", path=path, split="dev")


def test_a_folder_that_datasets_did_not_write(tmp_path):
    pytest.importorskip("datasets")
    _fails(str(tmp_path), "save_to_disk", path=tmp_path)


def test_empty_files_and_headers_alone(write):
    _fails("an empty file", path=write("a.tsv", ""))
    _fails("nothing but white space", path=write("b.jsonl", "\ufeff\n\n"))
    for name, content in (("c.tsv", "text\tlabel\n"), ("c.csv", "text,label\r\n")):
        _fails(name, "no rows, only a header", path=write(name, content))


def test_a_column_that_is_not_there(write):
    for name, content in (
        ("a.tsv", _tsv()),
        ("a.csv", "text,label\nx,y\n"),
        ("a.jsonl", '{"text": "x", "label": "y"}\n'),
    ):
        _fails(
            name,
            "'txet'",
            "'text', 'label'",
            "did you mean 'text'?",
            path=write(name, content),
            text="txet",
        )
    _fails("one column 'text'", "got 2", path=write("b.tsv", "text\ttext\tlabel\na\tb\tc\n"))


def test_rows_of_another_width_name_the_first_five_and_all(write):
    path = write("a.tsv", _tsv() + "".join(["stray\ttab\tpos\n", "short\n"] * 4))
    _fails(
        "a.tsv: expected 2 columns in every row",
        "8 of 11 lines (line 5: 3, line 6: 1, line 7: 3, line 8: 1, line 9: 3, …)",
        path=path,
    )
    _fails(
        "1 of 4 lines (line 4: 3)", path=write("a.csv", 'text,label\n"a\nb",0\nx,y,z\nu,v\nw,x\n')
    )


def test_broken_quotes_of_a_csv(write):
    path = write("a.csv", 'text,label\n"fine",0\n"never closed,1\nmore,0\n')
    _fails("a.csv, line 3", "CSV row", 'format="tsv"', path=path)


def test_bad_json_lines(write):
    good = '{"text": "a b", "label": "0"}\n'
    path = write("a.jsonl", good + '{"text": \n' + good + "[1, 2]\n\n" + good)
    _fails(
        "3 of 6 lines", "line 2: Expecting value at column", "line 4: [1, 2]", "line 5:", path=path
    )
    path = write("b.jsonl", good + '{"text": "a b"}\n{"text": null, "label": "0"}\n')
    _fails("a key 'label'", "1 of 3 lines (line 2: ['text'])", path=path)
    _fails("text in column 'text'", "1 of 3 lines (line 3: None)", path=path, label=None)


def test_bytes_that_are_not_utf8(write):
    path = write(
        "a.tsv", _tsv().encode() + "caf\u00e9\tpos\nok\tneg\nna\u00efve\tpos\n".encode("latin-1")
    )
    offset = len(_tsv().encode()) + 3
    _fails(
        "UTF-8", f"2 of 7 lines (line 5: 0xe9 at byte {offset}, line 7: 0xef", "iconv", path=path
    )
    _fails("iconv -f UTF-16", path=write("b.tsv", _tsv().encode("utf-16")))


def test_empty_texts_and_pairs(write):
    path = write("a.tsv", "text\tother\tlabel\na b\t \t0\n\tc d\t1\n")
    _fails("text in column 'text'", "1 of 2 lines (line 3: '')", path=path)
    path = write("b.tsv", "text\tother\tlabel\na b\t \t0\nc\tc d\t1\n")
    _fails("text in column 'other'", "1 of 2 lines (line 2: ' ')", path=path, text_pair="other")


def test_labels_missing_or_unknown(write):
    path = write("a.tsv", _tsv(labels=["pos", "", "neg"]))
    _fails("a label in column 'label'", "1 of 3 lines (line 3: none)", path=path)
    path = write("b.tsv", _tsv())
    _fails(
        "'neg', 'nop'",
        "2 of 3 lines (line 2: 'pos', line 4: 'pos')",
        path=path,
        labels=["neg", "nop"],
    )
    _fails("every raw value once", path=path, labels=["neg", "neg"])
    _fails("a list or a mapping", "'neg'", path=path, labels="neg")
    _fails("1 or more", path=path, max_rows=0)


def test_labels_of_a_regression(write):
    path = write("a.tsv", _tsv(TEXTS * 2, ["1", "nan", "inf", "high", "1e39", "-2.5"]))
    _fails(
        "a finite number in label column 'label'",
        "4 of 6 lines (line 3: 'nan', line 4: 'inf', line 5: 'high', line 6: '1e39')",
        path=path,
        numbers=True,
    )
    _fails("none for labels that are numbers", path=path, numbers=True, labels=["1"])
    path = write("a.jsonl", '{"text": "a", "label": true}\n{"text": "b", "label": null}\n')
    _fails("2 of 2 lines (line 1: True, line 2: None)", path=path, numbers=True)


# Corpora


def test_corpus_of_files_folders_and_globs(write, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    one = write("a.txt", "\ufeffOne line.\r\n  And another.\r\n \r\n\r\nSecond document.\n")
    write("b/c.jsonl", '{"text": "Third\\n\\ndocument.", "id": 3}\n')
    write("b/d.txt", "Fourth.\x85Still.\n")
    write("b/readme.md", "passed over")
    write(".cache/e.txt", "passed over")
    a = ["One line.\nAnd another.", "Second document."]
    b = ["Third\ndocument.", "Fourth.\x85Still."]
    assert read_corpus([one]) == a
    assert read_corpus([str(tmp_path)]) == a + b
    assert read_corpus([f"{tmp_path}/b/*.txt", one]) == b[1:] + a
    assert read_corpus([f"{tmp_path}/*/c*", one]) == b[:1] + a


def test_corpus_mistakes(write, tmp_path):
    one = write("one.txt", "Text.\n")
    (tmp_path / "none").mkdir()
    empty = write("empty.txt", " \n")
    other = write("a.md", "Text.\n")
    rows = write("a.jsonl", '{"text": "a"}\n{"text": ""}\n{"text": 3}\n')
    keys = write("b.jsonl", '{"txt": "a"}\n')
    (tmp_path / "packed").mkdir()
    write("packed/a.txt", "Text.\n")
    write("packed/b.jsonl.gz", "")
    for paths, parts in (
        ([f"{tmp_path}/packed"], ["not compressed", "b.jsonl.gz", "tinybert data prepare"]),
        (one, ["a list of files"]),
        ([], ["a list of files"]),
        ([one, f"{tmp_path}/o*.txt"], ["every file once", "one.txt"]),
        ([f"{tmp_path}/on.txt"], ["did you mean 'one.txt'?"]),
        ([f"{tmp_path}/none"], ["a folder with .txt or .jsonl"]),
        ([f"{tmp_path}/x*"], ["a glob that matches"]),
        ([other], ["a .txt or .jsonl file", "'.md'"]),
        ([one, empty], ["empty.txt", "nothing but white space"]),
        ([rows], ["2 of 3 lines (line 2: '', line 3: 3)"]),
        ([keys], ["a column 'text'", "'txt'", "did you mean 'txt'?"]),
    ):
        with pytest.raises(ValueError) as caught:
            read_corpus(paths)
        for part in (": expected ", "; got ", "; fix: ", *parts):
            assert part in str(caught.value)


# Real data


@needs_data
@pytest.mark.parametrize(
    ("path", "arguments", "num_rows", "counts"),
    [
        ("cls/sst2/train.tsv", {"text": "sentence", "label": "label"}, 67_349, [29_780, 37_569]),
        ("cls/sst2/dev.tsv", {"text": "sentence", "label": "label"}, 872, [428, 444]),
        (
            "glue/MRPC/msr_paraphrase_train.txt",
            {"text": "#1 String", "text_pair": "#2 String", "label": "Quality", "format": "tsv"},
            4_076,
            [1_323, 2_753],
        ),
        (
            "glue/RTE/val.tsv",
            {"text": "1", "text_pair": "2", "label": "3"},
            363,
            None,
        ),
        ("cls/agnews/train.jsonl", {"text": "text", "label": "label"}, 29_129, None),
        ("cls/banking77/train.csv", {"text": "text", "label": "category"}, 10_003, None),
    ],
)
def test_real_tables(path, arguments, num_rows, counts):
    got = read_labelled(Path(DATA, path), **arguments)
    assert len(got.text) == len(got.labels) == num_rows
    found = np.bincount(got.labels).tolist()
    assert len(found) == len(got.label_names) and min(found) > 0
    assert counts is None or found == counts


@needs_data
def test_real_regression_without_header():
    path = Path(DATA, "glue/STS-B/sts-train.tsv")
    got = read_labelled(path, text="5", text_pair="6", label="4", numbers=True)
    assert len(got.text) == len(got.text_pair) == len(got.labels) == 5_749
    assert (got.labels.min(), got.labels.max()) == (0.0, 5.0)
    assert got.label_names is None


@needs_data
def test_real_corpus():
    wiki = read_corpus([f"{DATA}/mlm/wikitext2_valid.txt"])
    assert len(wiki) > 10 and all(document.strip() and "\n\n" not in document for document in wiki)


def test_quoted_columns_with_another_separator_are_recognised(tmp_path):
    file = tmp_path / "rows.csv"
    for sep, fix in (("|", "separate them by commas or tabs"), ("\t", "set task.format=tsv")):
        file.write_text(f'"text"{sep}"label"\n"a, b"{sep}"x"\n')
        with pytest.raises(ValueError, match="columns seem to be separated by") as error:
            read_labelled(file, text="text", label="label")
        assert fix in str(error.value)
