"""Where a step goes: what is read of programs and traces, and a profiled run."""

import re

import jax
import jax.numpy as jnp
import pytest
from tiny_inputs import write_config, write_inputs

from tinybert_jax import cli, profile
from tinybert_jax.profile import Event, Operation

SIZES = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16}


def test_a_program_is_read_by_scope_and_pass():
    def loss(w, x):
        with jax.named_scope("~student"):

            def layer(h, w):
                with jax.named_scope("~attention"):
                    return jnp.tanh(h @ w), None

            h, _ = jax.lax.scan(layer, x, w)
        with jax.named_scope("~loss hidden"):
            return (h**2).sum()

    step = jax.jit(jax.value_and_grad(loss))
    text = step.lower(jnp.ones((3, 64, 64)), jnp.ones((64, 64))).compile().as_text()
    operations = profile.read_program(text)
    parts = {own.part.removeprefix("student: ") for own in operations.values()}
    assert {"attention", "attention, backward", "loss hidden"} <= parts
    products = {own.part for own in operations.values() if own.is_product}
    in_products = {part.removeprefix("student: ") for part in products}
    assert in_products == {"attention", "attention, backward"}
    loops = re.findall(r"%?([\w.\-]+) = .* while\(", text)
    assert loops and not operations.keys() & set(loops)


def test_a_table_adds_up():
    operations = {
        "dot.1": Operation("teacher: attention", "dot_general"),
        "fusion.2": Operation("teacher: attention", "tanh"),
        "fusion.3": Operation("optimizer", "add"),
    }
    events = [
        Event(name, device, seconds)
        for device in (0, 1)
        for name, seconds in (("dot.1", 0.006), ("fusion.2", 0.002), ("fusion.3", 0.004))
    ] + [Event("of another program", 0, 1.0)]
    table = profile.tabulate(operations, events, num_steps=2, seconds_a_step=0.01)
    assert "| teacher: attention | 4.00 | 40.0% | 75% |" in table
    assert "| optimizer | 2.00 | 20.0% | 0% |" in table
    assert "| between operations | 4.00 | 40.0% |  |" in table
    assert "| dot.1 | 3.00 | 30.0% | dot_general | teacher: attention |" in table


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, **SIZES)
    return folder


def _run(tmp_path, inputs, name, *flags, num_steps=8):
    sections = {
        "student": {**SIZES, "num_hidden_layers": 1, "num_attention_heads": 2},
        "general": {
            "num_steps": num_steps,
            "learning_rate": 1e-3,
            "max_length": 16,
            "global_batch_size": 8,
            "batching": "pad",
        },
    }
    file = write_config(tmp_path / f"{name}.yaml", inputs, tmp_path / name, **sections)
    assert cli.main(["distill", file, *flags]) == 0
    return tmp_path / name


def test_a_profiled_run_tells_where_a_step_goes_and_learns_the_same(inputs, tmp_path, capsys):
    plain = _run(tmp_path, inputs, "plain")
    assert not (plain / "profile").exists()
    run = _run(tmp_path, inputs, "profiled", "--profile")
    folder = run / "profile" / "general"
    table = (folder / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.startswith("5 steps of 8 rows × 16 tokens")
    for part in ("teacher: attention", "attention, backward", "loss hidden", "optimizer"):
        assert f"\n| {part} |" in table
    assert "teacher: attention, backward" not in table
    parts = table.split("\n\n")[1]
    shares = [float(share) for share in re.findall(r"([\d.]+)%", re.sub(r"\d+% \|\n", "\n", parts))]
    assert sum(shares) == pytest.approx(100, abs=2)
    assert list(folder.rglob("*.xplane.pb")) and list(folder.rglob("perfetto_trace.json.gz"))
    weights = "models/general/model.safetensors"
    assert (run / weights).read_bytes() == (plain / weights).read_bytes()


def test_a_stage_too_short_to_profile_says_so(inputs, tmp_path, capsys):
    run = _run(tmp_path, inputs, "short", "--profile", num_steps=2)
    assert not (run / "profile" / "general").exists()
    assert "no profile; expected more than 2 steps of one width" in capsys.readouterr().out
