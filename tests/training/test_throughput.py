"""Times and rates in the log lines of a stage."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.batches.batch import Batch
from tinybert_jax.models.inputs import Text
from tinybert_jax.training.metric_log import MetricLog
from tinybert_jax.training.throughput import Meter


def test_the_first_step_which_compiles_is_not_timed(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    log, ids = MetricLog(tmp_path / "metrics.jsonl"), np.zeros((2, 8), np.int32)
    meter = Meter(log, "finetune", lambda width: 1.0, 7, 0, [], log_every=3, peak_flops=1e9)
    batch = Batch(Text(ids, ids), ids, targets={}, weights=None)
    metrics = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "num_tokens": 10.0}
    metrics = {name: jnp.asarray(value) for name, value in metrics.items()}
    now[0] += 100.0  # a compilation
    for step in range(1, 8):
        meter.record(step, batch, metrics)
        now[0] += 2.0
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line["seconds"] for line in lines] == [4, 6, 2]
    assert [line["tokens_per_second"] for line in lines] == pytest.approx([5, 5, 5])
    assert [line["seconds_left"] for line in lines] == pytest.approx([8, 2, 0])
