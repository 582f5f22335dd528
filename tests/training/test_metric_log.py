"""metrics.jsonl: a row per report, read and appended to after a kill in the middle of a line."""

import json

import pytest

from tinybert_jax.training.metric_log import MetricLog, read_rows

ROWS = [
    {"kind": "train", "stage": "pretrain", "step": 4, "loss": 0.5},
    {"kind": "eval", "stage": "pretrain", "step": 4, "perplexity": 9.0},
    {"kind": "train", "stage": "finetune", "step": 8, "loss": "nan"},
]
LINES = [json.dumps(row) + "\n" for row in ROWS]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.mark.parametrize("cut", ["", "{", LINES[0][:20], LINES[0][:-2]])
def test_a_last_line_cut_short_is_left_out(path, cut):
    path.write_text("".join(LINES) + cut)
    assert read_rows(path) == ROWS


def test_a_last_line_that_lacks_only_the_line_break_is_read(path):
    path.write_text("".join(LINES)[:-1])
    assert read_rows(path) == ROWS


@pytest.mark.parametrize(
    ("line", "got"), [(LINES[0][:20], repr(LINES[0][:20])), ("", "''"), ("[1]", r"'\[1\]'")]
)
def test_a_broken_line_in_the_middle_is_refused(path, line, got):
    path.write_text(LINES[0] + line + "\n" + LINES[1])
    message = f"metrics.jsonl, line 2: expected a JSON object, got {got}; remove the line"
    for read in (read_rows, lambda path: MetricLog(path).rewind("pretrain", 0)):
        with pytest.raises(ValueError, match=message):
            read(path)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe{",
        b"\x00" * 4096,
        b"[" * 100_000,
        b"9" * 5000,
        b'{"kind": "train", "stage": "general"}',
        b'{"kind": "train", "step": 4}',
        b'{"kind": ["train"], "stage": "general", "step": 4}',
        b'{"kind": "train", "stage": "general", "step": "4"}',
        LINES[0][:20].encode() + LINES[1].strip().encode(),
    ],
)
def test_a_garbled_line_is_refused_in_the_middle_and_dropped_at_the_end(path, line):
    path.write_bytes(LINES[0].encode() + line + b"\n" + LINES[1].encode())
    for read in (read_rows, lambda path: MetricLog(path).rewind("pretrain", 0)):
        with pytest.raises(ValueError, match="metrics.jsonl, line 2: expected a JSON object, got "):
            read(path)
    path.write_bytes("".join(LINES).encode() + line)
    assert read_rows(path) == ROWS
    MetricLog(path).rewind("finetune", 4)
    assert read_rows(path) == ROWS[:2]


def test_names_reach_the_console_without_control_characters(path, capsys):
    MetricLog(path).say("\x1b[2Ja \x9b name\nline")
    assert capsys.readouterr().out == "\\x1b[2Ja \\x9b name\nline\n"


@pytest.mark.parametrize("end", ["", LINES[0][:20], LINES[2][:-1]])
def test_a_row_starts_on_a_new_line(path, end):
    path.write_text("".join(LINES[:2]) + end)
    before = read_rows(path)
    MetricLog(path).write("train", "finetune", 12, {"loss": 0.25})
    rows = read_rows(path)
    assert path.read_text().endswith("}\n")
    assert rows[:-1] == before
    assert (rows[-1]["step"], rows[-1]["loss"]) == (12, 0.25)


def test_rewind_drops_the_later_rows_of_the_stage_only(path):
    path.write_text("".join([LINES[0], LINES[2], LINES[0].replace("4", "5"), LINES[0][:20]]))
    MetricLog(path).rewind("pretrain", 4)
    assert path.read_text() == LINES[0] + LINES[2]
