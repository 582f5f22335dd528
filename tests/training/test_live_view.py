"""The live view: below the lines of a run, gone at its end, and nothing of the run knows it."""

import json
import types

import pytest
from terminal import Terminal

from tinybert_jax.data.errors import GateError
from tinybert_jax.report import console
from tinybert_jax.training import live_view, preemption
from tinybert_jax.training.live_view import LiveView, curve
from tinybert_jax.training.metric_log import MetricLog

VALUES = {
    "loss": 0.5,
    "loss/hidden": 0.3,
    "loss/logits": 0.2,
    "learning_rate": 1e-3,
    "grad_norm": 1.0,
    "tokens_per_second": 12_345.0,
    "padding_share": 0.125,
    "mfu": 0.3,
    "seconds_left": 90.0,
}


@pytest.fixture
def terminal(monkeypatch):
    terminal = Terminal()
    # pytest puts a stream of its own in place of `sys.stdout` before each test.
    monkeypatch.setattr(live_view, "sys", types.SimpleNamespace(stdout=terminal, stderr=terminal))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    monkeypatch.setattr(live_view, "_SECONDS", 3600.0)  # it draws when it is told, alone
    return terminal


@pytest.fixture
def log(terminal, tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.view = LiveView(["finetune", "prediction"], {"finetune": 1.0, "prediction": 2.0})
    yield log
    log.view.close()


def test_the_view_stands_below_the_lines(terminal, log):
    log.enter("finetune")
    log.say("first")
    log.progress("finetune", 100, 200, VALUES)
    log.evaluated("finetune", 90, 200, "dev: accuracy 0.9000")
    log.tell_best("finetune: best accuracy 0.9000 by step 90")
    with log.doing("compiles the step for 8 rows of 16 tokens"):
        log.say("second")
        lines = terminal.shown
    assert lines[:2] == ["first", "second"]
    assert lines[2].split()[:6] == ["finetune", "stage", "1", "of", "2", "100/200"]
    assert "12.3k tokens/s  padding 12%" in lines[3] or "padding 13%" in lines[3]
    # 0.9 s a step: 90 s of this stage, and twice its work at the same rate.
    assert lines[3].endswith("1m30s left of the stage  about 7m30s of the run")
    assert lines[4].startswith("loss 0.5 ▁  hidden 0.3 ▁  logits 0.2 ▁")
    assert lines[5:7] == ["dev: accuracy 0.9000 at step 90", "best accuracy 0.9000 by step 90"]
    assert lines[7].startswith("compiles the step for 8 rows of 16 tokens: 0m0")
    log.say("third")
    assert terminal.shown[2] == "third" and len(terminal.shown) == 8
    log.view.close()
    assert terminal.shown == ["first", "second", "third"]
    log.view.close()
    log.say("fourth")
    assert terminal.shown[-1] == "fourth"


def test_other_output_is_not_lost(terminal, log):
    log.enter("finetune")
    log.progress("finetune", 1, 200, VALUES)
    print("a warning", file=live_view.sys.stderr)
    log.progress("finetune", 2, 200, VALUES)
    print("x" * 130, file=live_view.sys.stdout)  # longer than a line
    assert terminal.shown == ["a warning", "x" * 130]
    log.progress("finetune", 3, 200, VALUES)
    assert terminal.shown[:2] == ["a warning", "x" * 130]
    assert sum("stage 1 of 2" in row for row in terminal.shown) == 1


def test_a_message_takes_the_place_of_the_view(terminal, log, monkeypatch):
    log.enter("finetune")
    monkeypatch.setattr(preemption.sys, "stderr", terminal)
    preemption.say(GateError("refused"))
    assert terminal.shown == ["tinybert: refused"]
    assert console.close_view is console.nothing


def test_a_low_terminal_shows_the_first_lines(terminal, monkeypatch):
    monkeypatch.setenv("LINES", "4")
    view = LiveView(["prediction"], {})
    view.enter("prediction")
    view.progress(1, 200, VALUES)
    assert len(terminal.shown) == 2
    view.close()


def test_the_file_has_the_same_rows(terminal, log, tmp_path, monkeypatch):
    plain = MetricLog(tmp_path / "plain.jsonl")
    monkeypatch.setattr("time.time", lambda: 5.0)
    for own in (log, plain):
        own.enter("finetune")
        own.write("train", "finetune", 2, {**VALUES, "loss": float("nan")})
        own.progress("finetune", 2, 4, {**VALUES, "loss": float("nan"), "skipped": 1})
        own.write("eval", "finetune", 2, {"accuracy": 0.5})
    assert log.path.read_bytes() == plain.path.read_bytes()
    assert json.loads(log.path.read_text().splitlines()[0])["loss"] == "nan"
    assert any("1 steps were skipped before step 2" in row for row in terminal.shown)


@pytest.mark.parametrize(
    "name, value", [("isatty", lambda: False), ("encoding", "latin-1"), ("TERM", "dumb")]
)
def test_what_cannot_show_the_view_gets_lines(terminal, monkeypatch, name, value):
    assert live_view.is_possible()
    if name == "TERM":
        monkeypatch.setenv(name, value)
    else:
        monkeypatch.setattr(terminal, name, value)
    assert not live_view.is_possible()


def test_a_curve_goes_from_low_to_high():
    assert curve([float(i) for i in range(8)]) == "▁▂▃▄▅▆▇█"
    assert curve([float(i // 100) for i in range(800)], 8) == "▁▂▃▄▅▆▇█"
    assert curve([1.0]) == "▁" and curve([float("nan")]) == "" and curve([]) == ""
