"""Times and rates in the log lines of a stage."""

import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.batches.batch import Batch
from tinybert_jax.models.inputs import Text
from tinybert_jax.training.metric_log import MetricLog, read_rows
from tinybert_jax.training.throughput import Meter

IDS = np.zeros((2, 8), np.int32)
BATCH = Batch(Text(IDS, IDS), IDS, targets={}, weights=None)


def _meter(path):
    return Meter(
        MetricLog(path), "finetune", lambda width: 1.0, 7, 0, [], log_every=3, peak_flops=1e9
    )


def _metrics(loss):
    metrics = {"loss": loss, "grad_norm": 1.0, "learning_rate": 0.1, "num_tokens": 10.0}
    return {name: jnp.asarray(value) for name, value in metrics.items()}


def test_the_first_step_which_compiles_is_not_timed(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = _meter(tmp_path / "metrics.jsonl")
    now[0] += 100.0  # a compilation
    for step in range(1, 8):
        meter.record(step, BATCH, _metrics(loss=1.0))
        now[0] += 2.0
    lines = read_rows(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line["seconds"] for line in lines] == [4, 6, 2]
    assert [line["tokens_per_second"] for line in lines] == pytest.approx([5, 5, 5])
    assert [line["seconds_left"] for line in lines] == pytest.approx([8, 2, 0])


@pytest.mark.parametrize(("seconds", "is_told"), [(25.0, True), (2.0, False)])
def test_a_long_stage_tells_its_time_before_the_first_line(
    tmp_path, monkeypatch, capsys, seconds, is_told
):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = _meter(tmp_path / "metrics.jsonl")
    for step in range(1, 5):
        meter.record(step, BATCH, _metrics(loss=1.0))
        now[0] += seconds
    told = capsys.readouterr().out.splitlines()
    line = "finetune: about 25.0 s a step, 2m05s left"
    assert (told[0] == line) == is_told and sum("a step" in own for own in told) == is_told
    assert read_rows(tmp_path / "metrics.jsonl")[0]["seconds"] == 2 * seconds


def test_finish_logs_the_steps_since_the_last_line(tmp_path):
    meter = _meter(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        meter.record(step, BATCH, _metrics(loss=float(step)))
    meter.finish(5)
    meter.finish(5)
    lines = read_rows(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(3, 2.0), (5, 4.5)]
    assert lines[0]["seconds_left"] > lines[1]["seconds_left"] == 0
    assert meter.snapshot() == []
