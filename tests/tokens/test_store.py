"""store: rows are gathered as written, across shards; damage and incomplete chunks are found."""

import json

import numpy as np
import pytest

from tinybert_jax.tokens.store import (
    INDEX,
    Rows,
    StoreWriter,
    open_store,
    partial_of,
    row_dtype,
    shard_names,
)


def _rows(rng, num, width, dtype):
    """Random rows, and the segment ids and token types that a plain loop computes."""
    rows = Rows(np.zeros((num, width), dtype), np.zeros(num, row_dtype(width)))
    segments, types = np.zeros((num, width), np.int32), np.zeros((num, width), np.int32)
    for row in range(num):
        length = int(rng.integers(1, width + 1))
        second = int(rng.integers(1, length + 1))
        starts = np.unique([0, *rng.integers(0, length, 5)])
        rows.ids[row, :length] = rng.integers(1, 2 ** (8 * dtype.itemsize - 1), length)
        bits = np.zeros(-(-width // 8) * 8, bool)
        bits[starts] = True
        rows.meta[row] = (length, second, rng.integers(-1, 2), np.packbits(bits))
        types[row, second:length] = 1
        for position in range(length):
            segments[row, position] = np.sum(starts <= position)
    return rows, segments, types


def _entry(rows):
    return {"rows": len(rows.ids), "note": "é"}


@pytest.fixture
def written(tmp_path):
    """(folder, all rows, segments, types): three chunks in shards of 10 rows."""

    def written(width=20, dtype="<u2"):
        rng = np.random.default_rng(0)
        partial = tmp_path / "new"
        partial.mkdir()
        writer = StoreWriter(partial, width, np.dtype(dtype), 10)
        chunks = [_rows(rng, num, width, np.dtype(dtype)) for num in (7, 24, 4)]
        for rows, _, _ in chunks:
            writer.append(rows, _entry(rows))
        facts = {
            "width": width,
            "ids_dtype": dtype,
            "shard_rows": 10,
            "num_rows": 35,
            "num_tokens": 1,
        }
        writer.finish(tmp_path / "store", facts, {"notes.txt": "é\n"})
        rows = Rows(*(np.concatenate([c[0][f] for c in chunks]) for f in (0, 1)))
        return tmp_path / "store", rows, *(np.concatenate([c[i] for c in chunks]) for i in (1, 2))

    return written


@pytest.mark.parametrize(("width", "dtype"), [(20, "<u2"), (128, "<u2"), (9, "<u4")])
def test_gather_equals_a_loop_over_the_rows(written, width, dtype):
    folder, rows, segments, types = written(width, dtype)
    store = open_store(folder, verify=True)
    wanted = np.array([34, 0, 9, 10, 0, 19, 31, 30, 6, 7] * 40)  # more than a block of rows
    got = store.gather(wanted)
    assert all(field.dtype == np.int32 for field in got)
    np.testing.assert_array_equal(got.ids, rows.ids[wanted])
    np.testing.assert_array_equal(got.segment_ids, segments[wanted])
    np.testing.assert_array_equal(got.token_type_ids, types[wanted])
    np.testing.assert_array_equal(got.labels, rows.meta["label"][wanted])
    np.testing.assert_array_equal(store.lengths(wanted), rows.meta["length"][wanted])


def test_row_numbers_out_of_range_are_refused(written):
    store = open_store(written()[0])
    assert store.gather(np.zeros(0, np.int64)).ids.shape == (0, 20)
    for wrong in (-1, 35):
        with pytest.raises(ValueError, match="expected row numbers from 0 and below 35"):
            store.gather(np.array([0, wrong]))


def test_a_damaged_or_missing_file_is_named(written):
    folder = written()[0]
    for name in (*shard_names(3), INDEX, "notes.txt"):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        open_store(folder)  # the size is right
        with pytest.raises(ValueError, match=f"{name}: expected the SHA-256 in the manifest"):
            open_store(folder, verify=True)
        path.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=f"{name}: expected {len(content)} bytes"):
            open_store(folder)
        path.unlink()
        with pytest.raises(ValueError, match=f"{name}: expected a file of the store"):
            open_store(folder)
        path.write_bytes(content)


def test_missing_and_unfinished_stores_are_refused_with_a_fix(tmp_path):
    with pytest.raises(ValueError, match="manifest.json; got none; fix: check the name"):
        open_store(tmp_path / "books")
    partial_of(tmp_path / "books").mkdir()
    with pytest.raises(ValueError, match="unfinished; fix: run `tinybert data prepare` again"):
        open_store(tmp_path / "books")


def test_an_incomplete_chunk_is_removed(tmp_path):
    """A resumed writer removes all data after the last complete line of the index."""
    rng = np.random.default_rng(1)
    first, second = (_rows(rng, num, 16, np.dtype("<u2"))[0] for num in (7, 9))
    for folder in ("straight", "cut"):
        (tmp_path / folder).mkdir()
        writer = StoreWriter(tmp_path / folder, 16, np.dtype("<u2"), 10)
        writer.append(first, _entry(first))
        if folder == "cut":
            for name in (*shard_names(0), *shard_names(1)):
                with (tmp_path / folder / name).open("ab") as file:
                    file.write(b"half")
            with (tmp_path / folder / INDEX).open("a") as file:
                file.write(json.dumps(_entry(second))[:9])
            writer = StoreWriter(tmp_path / folder, 16, np.dtype("<u2"), 10)
            assert writer.num_rows == 7
        writer.append(second, _entry(second))
    for path in (tmp_path / "straight").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name


def test_a_shard_with_fewer_rows_than_the_index_lists_is_named(tmp_path):
    writer = StoreWriter(tmp_path, 16, np.dtype("<u2"), 10)
    rows = _rows(np.random.default_rng(0), 12, 16, np.dtype("<u2"))[0]
    writer.append(rows, _entry(rows))
    path = tmp_path / shard_names(0)[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="shard-00000.ids: expected 320 bytes; got 319"):
        StoreWriter(tmp_path, 16, np.dtype("<u2"), 10)
    path.unlink()
    with pytest.raises(ValueError, match="shard-00000.ids: expected a file; got none"):
        StoreWriter(tmp_path, 16, np.dtype("<u2"), 10)


DEEP, DIGITS = "[" * 100_000, "9" * 5000


@pytest.mark.parametrize(
    "change, naming",
    [
        ("", "manifest.json: expected JSON; got Expecting value"),
        (DEEP, "manifest.json: expected JSON; got nested too deeply"),
        (DIGITS, "manifest.json: expected JSON; got a number with too many digits"),
        ("[1]", "manifest.json: expected a JSON object; got [1]"),
        ({"format": ["x"]}, "expected format 'tinybert token store 1'; got ['x']"),
        ({"width": "20"}, "manifest.json: width: expected a whole number from 1 on; got '20'"),
        ({"width": 21}, "manifest.json: files: shard-00000.ids: expected 420 bytes; got 400"),
        ({"num_rows": 10**30}, "num_rows: expected a whole number from 1 on; got 1000"),
        ({"num_rows": 10**15}, "num_rows: expected rows of 4 shards; got 1000000000000000"),
        ({"shard_rows": 0}, "shard_rows: expected a whole number from 1 on; got 0"),
        ({"ids_dtype": "|O"}, "ids_dtype: expected <u2 or <u4; got '|O'"),
        ({"files": []}, "files: expected an object; got []"),
        ({"files": {"../../x": {"num_bytes": 1, "sha256": ""}}}, "expected names without folders"),
        ({"files": {"x": 1}}, "files: 'x': expected num_bytes and sha256; got 1"),
        ({"num_tokens": None}, "num_tokens: expected a whole number from 1 on; got None"),
    ],
)
def test_a_manifest_that_is_torn_or_does_not_fit_is_refused(written, change, naming):
    folder, *_ = written()
    path = folder / "manifest.json"
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(change)
    with pytest.raises(ValueError) as caught:
        open_store(folder)
    assert naming in str(caught.value) and "; fix: " in str(caught.value)


@pytest.mark.parametrize("line", ["{", DEEP, "[]", "{}", '{"rows": "7"}', "\x00\x00"])
def test_a_garbled_line_of_the_index_is_named(tmp_path, line):
    writer = StoreWriter(tmp_path, 16, np.dtype("<u2"), 10)
    rows = _rows(np.random.default_rng(0), 12, 16, np.dtype("<u2"))[0]
    writer.append(rows, _entry(rows))
    before = (tmp_path / INDEX).read_text()
    (tmp_path / INDEX).write_text(before + line + "\n")
    with pytest.raises(ValueError, match="index.jsonl, line 2: expected the entry of a chunk; got"):
        StoreWriter(tmp_path, 16, np.dtype("<u2"), 10)
    (tmp_path / INDEX).write_text(before + line)  # cut off: the last line is left out
    assert StoreWriter(tmp_path, 16, np.dtype("<u2"), 10).num_rows == 12
