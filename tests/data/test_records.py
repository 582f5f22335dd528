"""records: every format, compressed or not, gives the same texts; bad records are reported."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from tinybert_jax.data import records
from tinybert_jax.data.records import Options, find_sources, group_sources, read_chunks

TEXTS = ["a fine film", 'he said "no"', "tea, toast\u2028and\x85jam", "中文。", "x" * 300]
OPTIONS = Options(text="text", split=None, document_end="blank_line", chunk_bytes=256)


def _read(paths, **options):
    """The records of every chunk."""
    options = OPTIONS._replace(**options)
    sources = find_sources([str(path) for path in paths])
    groups = enumerate(group_sources(sources, options.chunk_bytes))
    chunks = [chunk for group in groups for chunk in read_chunks(*group, options)]
    return [list(records.read_records(chunk, options)) for chunk in chunks]


def _flat(chunks):
    return [record for chunk in chunks for record in chunk]


def _csv(texts):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("n", "text"), *enumerate(texts)])
    return file.getvalue()


def _parquet(texts):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink, row_group_size=2)
    return sink.getvalue()


FORMATS = {
    "txt": lambda texts: "\n \n".join(texts) + "\n",
    "jsonl": lambda texts: "".join(json.dumps({"text": t}) + "\n" for t in texts),
    "tsv": lambda texts: "text\tn\n" + "".join(f"{t}\t1\n" for t in texts),
    "csv": _csv,
    "parquet": _parquet,
}
COMPRESSORS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_and_chunk_size_gives_the_same_texts(tmp_path, format, suffix):
    content = FORMATS[format](TEXTS * 20)
    path = tmp_path / f"a.{format}{suffix}"
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(COMPRESSORS[suffix](content))
    numbers = set()
    for chunk_bytes in (256, 1000, 10**6):
        chunks = _read([path], chunk_bytes=chunk_bytes)
        assert [record.text for record in _flat(chunks)] == TEXTS * 20
        assert len(chunks) > 1 or chunk_bytes == 10**6
        numbers.add(tuple(record.place for record in _flat(chunks)))
    assert len(numbers) == 1


def test_a_compressed_file_gives_the_chunks_of_the_plain_file(tmp_path):
    content = FORMATS["txt"](TEXTS * 50).encode()
    (tmp_path / "a.txt").write_bytes(content)
    plain = _read([tmp_path / "a.txt"])
    for suffix, compress in COMPRESSORS.items():
        path = tmp_path / f"b.txt{suffix}"
        path.write_bytes(compress(content))
        cuts = [[(r.place, r.text) for r in chunk] for chunk in _read([path])]
        assert cuts == [[(r.place, r.text) for r in chunk] for chunk in plain]


def test_a_datasets_folder_gives_its_column_and_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"n": range(5), "body": TEXTS})
    data.save_to_disk(str(tmp_path / "saved"))
    assert [r.text for r in _flat(_read([tmp_path / "saved"], text="body"))] == TEXTS
    with pytest.raises(ValueError, match="saved: expected a column 'bdoy'.*did you mean 'body'"):
        _read([tmp_path / "saved"], text="bdoy")
    datasets.DatasetDict({"dev": data}).save_to_disk(str(tmp_path / "splits"))
    found = _flat(_read([tmp_path / "splits"], text="body", split="dev"))
    assert (found[4].text, found[4].place) == (TEXTS[4], "row 5")


def test_small_files_of_a_folder_share_a_chunk(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"document {number}\n\nsecond\n")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    (chunk,) = _read([tmp_path])
    assert [r.text for r in chunk[::2]] == [f"document {n}" for n in range(6)]
    assert (chunk[3].path, chunk[3].place) == (str(tmp_path / "1.txt"), "line 3")
    lines = _flat(_read([tmp_path], document_end="line"))
    assert len(lines) == 12


def test_a_document_longer_than_many_chunks_is_cut_at_a_line_break(tmp_path):
    (tmp_path / "a.txt").write_text("word word\n" * 2000)
    assert len(_flat(_read([tmp_path / "a.txt"]))) > 1
    (tmp_path / "b.jsonl").write_text("x" * 10000)
    with pytest.raises(ValueError, match="b.jsonl: expected line breaks; got none in"):
        _read([tmp_path / "b.jsonl"])


BAD = {
    "txt": (b"good\n\nb\xffd\n\ngood\n", "line 3", "not UTF-8"),
    "jsonl": (b'{"text": "good"}\n{"text": "b\xffd"}\n', "line 2", "not UTF-8"),
    "broken.jsonl": (b'{"text": "good"}\n\n{"text": \n', "line 3", "not JSON"),
    "deep.jsonl": (b'{"text": "good"}\n' + b"[" * 100_000 + b"\n", "line 2", "nested"),
    "list.jsonl": (b'{"text": "good"}\n[1]\n', "line 2", "expected an object, got [1]"),
    "key.jsonl": (b'{"text": "good"}\n{"txt": ""}\n', "line 2", "no key 'text': ['txt']"),
    "null.jsonl": (b'{"text": null}\n{"text": "good"}\n', "line 1", "expected text, got None"),
    "empty.jsonl": (b'{"text": " "}\n{"text": "good"}\n', "line 1", "no text"),
    "lone.jsonl": (b'{"text": "\\ud800"}\n{"text": "good"}\n', "line 1", "surrogate"),
    "tsv": (b"n\ttext\n1\tgood\n2\n", "line 3", "1 columns, expected 2"),
    "csv": (b'n,text\n1,good\n2,b\xffd\n3,"good"\n', "line 3", "surrogate"),
    "digits.jsonl": (b'{"text": "good"}\n{"text": %s}\n' % (b"9" * 5000), "line 2", "digits"),
    "nul.jsonl": (b'{"text": "good"}\n\x00\x00\x00\n', "line 2", "not JSON"),
    "quote.csv": (b'n,text\n1,good\n2,"bad"ly\n3,"good"\n', "line 3", "a broken CSV row"),
    "ragged.csv": (b"n,text\n1,good\n2\n\n3,good\n", "line 3", "1 columns, expected 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_reported_and_the_others_are_read(tmp_path, name):
    content, place, reason = BAD[name]
    path = tmp_path / f"a.{name}"
    path.write_bytes(content)
    found = _flat(_read([path], chunk_bytes=10**6))
    (bad,) = (record for record in found if record.text is None)
    assert (bad.path, bad.place) == (str(path), place)
    assert reason in bad.reason
    assert {record.text for record in found if record is not bad} == {"good"}


def test_every_line_that_a_stray_quote_takes_with_it_counts(tmp_path):
    lines = [f"{n},good" for n in range(2, 12)]
    lines[3] = '5,"bad'
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["n,text", *lines]) + "\n")
    found = _flat(_read([path], chunk_bytes=10**6))
    assert [record.text for record in found] == ["good"] * 3 + [None] * 7
    assert [record.place for record in found[3:]] == [f"line {n}" for n in range(5, 12)]
    lines[6] = '8,"bad"'  # its quote closes the field that line 5 opens
    path.write_text("\n".join(["n,text", *lines]) + "\n")
    found = _flat(_read([path], chunk_bytes=10**6))
    assert [record.place for record in found if record.text is None] == [
        f"line {n}" for n in range(5, 9)
    ]
    assert sum(record.text == "good" for record in found) == 6


def test_null_and_number_in_parquet_are_reported(tmp_path):
    table = pyarrow.table({"text": pyarrow.array(["good", None, "good"])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = _flat(_read([tmp_path / "a.parquet"]))
    assert [(r.text, r.place) for r in found if r.text is None] == [(None, "row 2")]
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b.parquet: expected text in column 'text'; got int64"):
        _read([tmp_path / "b.parquet"])


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    content = COMPRESSORS[suffix](" ".join(map(str, range(50_000))).encode())
    for broken in (content[: len(content) // 2], b"no" + content):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"a.txt{suffix}: expected a file that can be read"):
            _read([path], chunk_bytes=10**6)
    path = tmp_path / "a.parquet"
    path.write_bytes(_parquet(TEXTS)[:-9])
    with pytest.raises(ValueError, match="a.parquet: expected a Parquet file"):
        _read([path])


def test_paths_that_are_no_source_are_refused(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.tsv").write_text("body\tn\nx\t1\n")
    for paths, expected in (
        (["a.docx"], r"a.docx: expected a .txt, .jsonl, .tsv, .csv, .parquet .* file"),
        (["b.txt"], r"b.txt: expected a file or folder; got nothing; fix: did you mean 'a.txt'"),
        (["a.txt", "*.txt"], "expected every file once; got .*a.txt twice"),
        (["a.tsv"], "a.tsv: expected a column 'text'; got columns 'body', 'n'"),
    ):
        with pytest.raises(ValueError, match=expected):
            _read([tmp_path / path for path in paths])
    with pytest.raises(ValueError, match="expected hub:owner/name"):
        _read(["hub:nothing"])
