"""A run whose machine is taken away goes on from its store to the bits of a run that is not."""

import json
import signal

import forked
import pytest
import tiny_inputs

STAGES = ("finetune", "prediction")
# Of each machine: what ends it, in which call of which function.
ENDS = [
    {
        "place": "fsspec.implementations.local:LocalFileOpener.write",
        "call": 40,
        "signals": ["KILL"],
    },
    {
        "place": "tinybert_jax.training.generations:Generations.commit",
        "call": 4,
        "signals": ["KILL"],
    },
    {"place": "tinybert_jax.training.throughput:Meter.record", "call": 2, "signals": ["TERM"]},
    {},
    {},  # has nothing to do
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
        folder = f"run_dir={world / f'machine-{number}'}"
        words = ["run", "run.yaml", folder, f"run_store={world / 'store'}"]
        cases.append({"words": words, "seconds": 0, **end})
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(world / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return forked.run_all(cases, world, **cache)


def _metrics(run):
    """Everything but clocks."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = {"time", "seconds", "seconds_left", "tokens_per_second", "mfu"}
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


def test_every_machine_goes_on_where_the_store_is(answers):
    golden, killed, in_commit, stopped, last, none = answers
    assert golden["status"] == 0 and "run_store" not in golden["output"], golden["error"]
    assert (killed["status"], in_commit["status"]) == (-signal.SIGKILL, -signal.SIGKILL)
    assert stopped["status"] == 75 and " after step " in stopped["error"]
    assert last["status"] == 0, last["error"]
    for answer in (in_commit, stopped, last, none):
        assert answer["output"].startswith("run_store: fetched generation "), answer["output"]
    place = stopped["error"].split(" after ")[1].split(";")[0]  # step 4 of 7 of finetune
    _, step, _, steps, _, stage = place.split()
    assert f"{stage}: resumes at step {step} of {steps}" in last["output"]
    assert none["status"] == 0 and "prediction: done before, kept" in none["output"]


@pytest.mark.parametrize("number", [len(ENDS) - 2, len(ENDS) - 1])
def test_the_bits_are_those_of_a_run_on_one_machine(world, answers, number):
    assert answers[1 + number]["status"] == 0, answers[1 + number]["error"]
    run = world / f"machine-{number}"
    assert _metrics(run) == _metrics(world / "golden")
    for stage in STAGES:
        for name in ("models", "stages"):
            for golden in (world / "golden" / name).rglob(f"{stage}*/*.safetensors"):
                found = run / golden.relative_to(world / "golden")
                assert found.read_bytes() == golden.read_bytes(), found
    same = (run / "inputs.json").read_bytes(), (world / "golden" / "inputs.json").read_bytes()
    assert same[0] == same[1]
