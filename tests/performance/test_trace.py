"""Operations read from programs and traces, the tables made of them, and a profiled run."""

import contextlib
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_inputs import write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.performance import trace
from tinybert_jax.performance.trace import Event, Operation

SIZES = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16}


def _operations(function, *arguments):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return trace.read_program(text), text


def _loss(w, x):
    def layer(h, w):
        with jax.named_scope("~attention"):
            return jnp.tanh(h @ w), None

    h, _ = jax.lax.scan(layer, x, w)
    with jax.named_scope("~loss hidden"):
        return (h**2).sum()


def test_operations_of_a_program_have_the_scope_and_pass_as_part():
    operations, text = _operations(
        jax.value_and_grad(_loss), jnp.ones((3, 64, 64)), jnp.ones((64, 64))
    )
    parts = {operation.part for operation in operations.values()}
    assert {"attention", "attention, backward", "loss hidden"} <= parts
    products = {operation.part for operation in operations.values() if operation.is_product}
    assert products == {"attention", "attention, backward"}
    loops = {line.split(" = ")[0].strip(" %") for line in text.splitlines() if " while(" in line}
    assert loops and not operations.keys() & loops


def test_a_collective_is_not_a_matrix_product():
    mesh = Mesh(np.asarray(jax.devices()), "x")
    rows = NamedSharding(mesh, PartitionSpec("x"))
    x = jax.device_put(jnp.ones((64, 64)), rows)
    operations, _ = _operations(jax.grad(_loss), jnp.ones((3, 64, 64)), x)
    collectives = [o for o in operations.values() if o.part == "communication between devices"]
    assert collectives and not any(operation.is_product for operation in collectives)


def test_the_table_adds_up_the_time_of_parts_and_operations():
    product = Operation("teacher: attention", "dot_general", is_product=True)
    other = Operation("teacher: attention", "tanh")
    update = Operation("optimizer", "add")
    events = [
        Event(operation, name, device, seconds)
        for device in (0, 1)
        for operation, name, seconds in (
            (product, "dot.1", 0.006),
            (other, "fusion.2", 0.002),
            (update, "fusion.3", 0.004),
        )
    ]
    table = trace.tabulate(events, num_steps=2, seconds=0.02)
    assert "| teacher: attention | 4.00 | 40.0% | 75% |" in table
    assert "| optimizer | 2.00 | 20.0% | 0% |" in table
    assert "| no operation running | 4.00 | 40.0% |  |" in table
    assert "| dot.1 | 3.00 | 30.0% | dot_general | teacher: attention |" in table


def test_overlapping_operations_share_the_time_evenly():
    """The lengths add up to 6, the length of the union."""
    lengths = trace.share_overlaps([(0.0, 4.0), (1.0, 3.0), (2.0, 3.0), (6.0, 8.0), (9.0, 9.0)])
    np.testing.assert_allclose(lengths, [1 + 1 / 2 + 1 / 3 + 1, 1 / 2 + 1 / 3, 1 / 3, 2, 0])
    assert sum(lengths) == pytest.approx(6)


class _Batch:
    def __init__(self, width):
        self.shape = (16, width)
        self.input_ids = jnp.ones(self.shape)


def _profiled(tmp_path, widths, between=lambda: None):
    """The messages of a profiled run over batches of these widths, and the states of the run."""

    @jax.jit
    def jitted(state, x):
        with jax.named_scope("~attention"):
            return jnp.tanh(state + (x @ x.T).sum())

    def step(state, batch):
        return jitted(state, batch.input_ids), {}

    messages, states = [], [jnp.zeros(())]
    with trace.traced_step(
        step,
        lambda state, batch: jitted.lower(state, batch.input_ids).compile().as_text(),
        tmp_path / "profile",
        messages.append,
        lambda state: contextlib.nullcontext(),
    ) as traced:
        for width in widths:
            states.append(traced(states[-1], _Batch(width))[0])
            between()
    return messages, states


def test_steps_are_traced_once_the_batch_shape_is_compiled(tmp_path):
    (message,), _ = _profiled(tmp_path, [8, 16, 8, 24, 16, 8, 8, 16, 8])
    assert message.startswith("5 steps of 16 × 16, 16 × 8 (rows × tokens): ")
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        *(f"step-{number}" for number in (3, 5, 6, 7, 8)),
        "table.md",
    ]


def test_work_between_the_steps_is_not_counted(tmp_path, monkeypatch):
    clock = [0.0]

    def pass_seconds(seconds):
        clock[0] += seconds
        return clock[0]

    monkeypatch.setattr("time.perf_counter", lambda: pass_seconds(0.001))
    (message,), _ = _profiled(tmp_path, [8] * 8, lambda: pass_seconds(10.0))
    assert message.startswith("5 steps of 16 × 8 (rows × tokens): 1.0 ms per step")


def test_too_few_steps_for_a_table_are_reported(tmp_path):
    (message,), _ = _profiled(tmp_path, [8, 8, 8, 16])
    assert "no profile table; expected at least 7 steps" in message
    assert "got 4 steps and traced 1" in message
    assert not (tmp_path / "profile" / "table.md").exists()


def test_a_failing_step_stops_the_profiler(tmp_path):
    def step(state, batch):
        if state == 3:
            raise FloatingPointError
        return state + 1, {}

    def run():
        with trace.traced_step(
            step,
            lambda state, batch: "",
            tmp_path / "profile",
            print,
            lambda state: contextlib.nullcontext(),
        ) as traced:
            state = 0
            for _ in range(8):
                state, _ = traced(state, _Batch(8))

    for _ in range(2):  # a running profiler would refuse to start a second time
        with pytest.raises(FloatingPointError):
            run()


def _run(tmp_path, inputs, name, *flags):
    sections = {
        "student": {**SIZES, "num_hidden_layers": 1, "num_attention_heads": 2},
        "general": {
            "num_steps": 8,
            "learning_rate": 1e-3,
            "max_length": 16,
            "global_batch_size": 8,
            "batching": "pad",
        },
    }
    file = write_config(tmp_path / f"{name}.yaml", inputs, tmp_path / name, **sections)
    assert cli.main(["distill", file, *flags]) == 0
    return tmp_path / name


def test_a_profiled_run_writes_the_table_and_trains_to_the_same_weights(
    tmp_path, capsys, monkeypatch
):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    write_inputs(inputs, **SIZES)
    plain = _run(tmp_path, inputs, "plain")
    assert not (plain / "profile").exists()
    clock, start_trace, offset = time.perf_counter, jax.profiler.start_trace, [0.0]

    def start_trace_slowly(*args, **kwargs):
        offset[0] += 1e6
        start_trace(*args, **kwargs)

    monkeypatch.setattr("time.perf_counter", lambda: clock() + offset[0])
    monkeypatch.setattr("jax.profiler.start_trace", start_trace_slowly)
    run = _run(tmp_path, inputs, "profiled", "--profile")
    monkeypatch.undo()
    folder = run / "profile" / "general"
    table = (folder / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.startswith("5 steps of 8 × 16 (rows × tokens): ")
    for part in ("teacher: attention", "attention, backward", "loss hidden", "optimizer"):
        assert f"\n| {part} |" in table
    assert "teacher: attention, backward" not in table
    assert list(folder.rglob("*.xplane.pb")) and list(folder.rglob("perfetto_trace.json.gz"))
    weights = "models/general/model.safetensors"
    assert (run / weights).read_bytes() == (plain / weights).read_bytes()

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["kind"] == "train"]
    (stage,) = [line for line in lines if line["kind"] == "stage"]
    assert line["seconds"] < 1e6 < 5e6 < stage["seconds"]  # starting traces is not timed

    _run(tmp_path, inputs, "profiled", "--profile")
    assert "done before, kept; no profile of it" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["distill", "any.yaml", "--profile", "--dry-run"])
