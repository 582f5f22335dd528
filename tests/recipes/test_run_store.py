"""A run whose machine is taken away goes on from its store to the bits of a run that is not."""

import json
import os
import signal

import forked
import pytest
import tiny_inputs

# Of each machine: the signal that ends it, in which call of which function.
ENDS = [
    ("fsspec.implementations.local:LocalFileOpener.write", 40, "KILL"),  # amid a copy
    ("tinybert_jax.training.throughput:Meter.record", 2, "TERM"),
    None,
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machines")
    tiny_inputs.write_inputs(folder, **tiny_inputs.TEACHER)
    stage = {**tiny_inputs.STAGE, "num_steps": 7, "log_every": 2, "save_every": 3, "eval_every": 4}
    tiny_inputs.write_config(
        folder / "run.yaml",
        folder,
        folder / "golden",
        student=tiny_inputs.STUDENT,
        distillation={"keep_logits": True, "teacher_margin": -1},
        finetune=stage,
        prediction=stage,
    )
    return folder


@pytest.fixture(scope="module")
def answers(world):
    """Of the golden run, and of every machine, each with a folder of its own."""
    cases: list[dict] = [{"words": ["run", "run.yaml"]}]
    for number, end in enumerate(ENDS):
        words = [f"run_dir={world / f'machine-{number}'}", f"run_store={world / 'store'}"]
        case = {"words": ["run", "run.yaml", *words]}
        if end is not None:
            place, call, name = end
            case |= {"place": place, "call": call, "signals": [name], "seconds": 0}
        cases.append(case)
    return forked.run_all(
        cases,
        world,
        XLA_FLAGS=os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
        JAX_COMPILATION_CACHE_DIR=str(world / "cache"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )


def _metrics(run):
    """Everything but clocks."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = {"time", "seconds", "seconds_left", "tokens_per_second", "mfu"}
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


def test_every_machine_goes_on_where_the_store_is(answers):
    golden, killed, stopped, last = answers
    assert golden["status"] == 0 and "run_store" not in golden["output"], golden["error"]
    assert killed["status"] == -signal.SIGKILL and stopped["status"] == 75, stopped["error"]
    for answer in (stopped, last):
        assert answer["output"].startswith("run_store: fetched generation "), answer["output"]
    _, step, _, steps, _, stage = stopped["error"].split("SIGTERM ")[1].split(";")[0].split()[-6:]
    assert f"{stage}: resumes at step {step} of {steps}" in last["output"]


def test_the_bits_are_those_of_a_run_on_one_machine(world, answers):
    assert answers[-1]["status"] == 0, answers[-1]["error"]
    golden, run = world / "golden", world / f"machine-{len(ENDS) - 1}"
    assert _metrics(run) == _metrics(golden)
    files = [*golden.rglob("models/*/*.safetensors"), *golden.rglob("stages/*.json")]
    assert len(files) == 4
    for file in files:
        assert (run / file.relative_to(golden)).read_bytes() == file.read_bytes(), file
