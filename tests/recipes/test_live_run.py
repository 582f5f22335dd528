"""A run with the live view ends with the files of a run with plain lines."""

import json
import types

import pytest
from terminal import Terminal
from tiny_inputs import STAGE, TEACHER, write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.training import live_view

pytestmark = pytest.mark.usefixtures("cheap_programs")
CLOCKS = {"time", "seconds", "seconds_left", "tokens_per_second", "mfu"}


def _rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def test_the_view_changes_nothing_in_the_run_folder(tmp_path, monkeypatch, capsys):
    write_inputs(tmp_path, **TEACHER)
    stage = {**STAGE, "num_steps": 6, "log_every": 2, "eval_every": 3}
    terminal = Terminal()
    monkeypatch.setattr(live_view, "sys", types.SimpleNamespace(stdout=terminal, stderr=terminal))
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("live", "plain"):
        config = write_config(tmp_path / f"{name}.yaml", tmp_path, tmp_path / name, finetune=stage)
        plain = ["--plain"] if name == "plain" else []
        assert cli.main(["run", config, *plain]) == 0
        said = capsys.readouterr().out
        assert ("finetune          6/6" in said) == (name == "plain")
    shown = " ".join(terminal.shown)
    assert "finetune: best accuracy" in shown and "stage 1 of 1" not in shown
    assert "compiles the step for 8 rows of 16 tokens" in terminal.written
    assert "dev: accuracy" in terminal.written and "6/6" in terminal.written
    live, plain = tmp_path / "live", tmp_path / "plain"
    assert _rows(live) == _rows(plain)
    weights = [(own / "hf" / "model.safetensors").read_bytes() for own in (live, plain)]
    assert weights[0] == weights[1]
    # Orbax gives files of checkpoints names that are drawn.
    names = [
        {str(f.relative_to(own)) for f in own.rglob("*") if "checkpoints" not in f.parts}
        for own in (live, plain)
    ]
    assert names[0] == names[1]
