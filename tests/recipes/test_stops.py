"""A run that a signal stops saves its work, says so in a line, and goes on to the same bits."""

import errno
import json
import os
import pty
import subprocess
import sys

import faulty
import forked
import pytest
import tiny_inputs

STAGES = ("finetune", "prediction")
SECONDS = 60  # that the work at a place takes, where the process has to end before
# (place, number of the call, seconds, signals, what the line says)
STOPS = [
    ("runs.head_init:fit_head", 1, SECONDS, ["TERM"], "at the start of finetune"),
    ("training.step:TrainStep.compile", 1, SECONDS, ["INT"], "at the start of finetune"),
    ("training.throughput:Meter.record", 1, 0, ["USR1"], "after step 2 of 7 of finetune"),
    (
        "runs.judges:TaskEvaluator.measure",
        1,
        SECONDS,
        ["TERM", "TERM"],
        "after step 4 of 7 of fine",
    ),
    # The run goes on with that evaluation.
    ("training.checkpoint:write", 1, 0, ["TERM"], "of 7 of finetune"),
    ("runs.teacher_logits:_save", 1, SECONDS, ["INT"], "at the start of prediction"),
    ("training.step:TrainStep.compile", 1, SECONDS, ["TERM"], "at the start of prediction"),
    ("training.checkpoint:write", 1, 0, ["USR1"], "of 7 of prediction"),
    ("recipes.pipeline:collect_results", 1, SECONDS, ["TERM"], "after its last stage"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stops")
    tiny_inputs.write_inputs(folder, **tiny_inputs.TEACHER)
    stage = {**tiny_inputs.STAGE, "num_steps": 7, "log_every": 2, "save_every": 3, "eval_every": 4}
    tiny_inputs.write_config(
        folder / "run.yaml",
        folder,
        folder / "run",
        student=tiny_inputs.STUDENT,
        distillation={"keep_logits": True, "teacher_margin": -1},
        finetune={**stage, "head_init": "linear_probe", "average_decay": 0.9},
        prediction=stage,
    )
    return folder


@pytest.fixture(scope="module")
def answers(world):
    """Of the golden run, of every stop of another run, of its end, of a run that is stopped twice,

    and of one whose checkpoints the storage refuses, with its end after that.
    """
    stopped = {"words": ["run", "run.yaml", "run_dir=stopped"]}
    names = ("place", "call", "seconds", "signals")
    stops = [dict(zip(names, stop, strict=False)) for stop in STOPS]
    twice = {"place": "training.saver:Saver.check", "call": 2, "seconds": SECONDS}
    twice |= {"signals": ["TERM", "INT"], "words": ["run", "run.yaml", "run_dir=twice"]}
    full = {"FAULTY_PATH": "/finetune/last/partial-4", "FAULTY_ERRNO": str(errno.ENOSPC)}
    refused = {"words": ["run", "run.yaml", "run_dir=refused"]}
    cases = [
        {"words": ["run", "run.yaml", "run_dir=golden"]},
        *(stop | stopped for stop in stops),
        stopped,
        twice,
        refused | {"environment": full},
        refused,
    ]
    for case in cases:
        if "place" in case:
            case["place"] = f"tinybert_jax.{case['place']}"
    return forked.run_all(cases, world, LD_PRELOAD=faulty.build(world) or "", **_cache(world))


def _cache(world):
    folder = str(world / "cache")
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def _metrics(run):
    """Everything but clocks, and the lines of whole stages, which another process may end."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = {"time", "seconds", "seconds_left", "tokens_per_second", "mfu"}
    return [{k: v for k, v in r.items() if k not in clocks} for r in rows if r["kind"] != "stage"]


def test_stopped_everywhere_it_ends_with_the_same_bits(world, answers):
    golden, last = answers[0], answers[1 + len(STOPS)]
    assert (golden["status"], last["status"]) == (0, 0), golden["error"] + last["error"]
    assert _metrics(world / "stopped") == _metrics(world / "golden")
    for stage in STAGES:
        stopped, golden = (
            (world / name / "models" / stage / "model.safetensors").read_bytes()
            for name in ("stopped", "golden")
        )
        assert stopped == golden, stage


@pytest.mark.parametrize("number", range(len(STOPS)), ids=[f"{s[0]} {s[3][0]}" for s in STOPS])
def test_a_stop_ends_the_run_soon_and_says_how_to_go_on(answers, number):
    answer, (_, _, seconds, signals, where) = answers[1 + number], STOPS[number]
    assert answer["status"] == 75, answer["error"]
    assert not seconds or answer["seconds"] < seconds
    (line,) = answer["error"].splitlines()
    assert line.startswith(f"tinybert: stopped by SIG{signals[0]} ") and where in line
    assert line.endswith("repeat the command: tinybert run run.yaml run_dir=stopped")


def test_a_second_signal_ends_the_run_at_once(world, answers):
    """While the first waits for a step that does not end."""
    answer = answers[-3]
    assert answer["status"] == 128 + 2 and answer["seconds"] < SECONDS
    assert "Traceback" not in answer["error"]


def test_a_storage_that_refuses_a_checkpoint_ends_the_run_with_one_line(world, answers):
    if not (world / "faulty_files.so").exists():
        pytest.skip("needs a C compiler")
    refused, last = answers[-2:]
    assert refused["status"] == 2 and last["status"] == 0, refused["error"] + last["error"]
    (line,) = refused["error"].splitlines()
    assert line.startswith("tinybert: finetune: saving step 4 was refused 4 times")
    assert os.strerror(errno.ENOSPC) in line and "repeat the command" in line
    assert "finetune: resumes at step 3 of 7" in last["output"]
    assert _metrics(world / "refused") == _metrics(world / "golden")


def test_a_corrupt_cache_of_programs_is_compiled_again(world, answers):
    assert answers[0]["status"] == 0
    programs = [path for path in (world / "cache").iterdir() if path.stat().st_size > 100]
    for path in programs:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert programs
    words = ["finetune", "run.yaml", "run_dir=recompiled"]
    (answer,) = forked.run_all([{"words": words}], world, **_cache(world))
    assert answer["status"] == 0, answer["error"]
    recompiled, golden = (
        (world / name / "models" / "finetune" / "model.safetensors").read_bytes()
        for name in ("recompiled", "golden")
    )
    assert recompiled == golden


def test_a_terminal_is_told_at_once_that_a_step_ends_first():
    program = """
import os, signal, sys
from tinybert_jax.training import preemption
with preemption.handled("tinybert run run.yaml", lambda error: 75) as stop:
    with stop.between_steps():
        os.kill(os.getpid(), signal.SIGINT)
        sys.stdin.readline()  # the step ends when the line was read
"""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=theirs) as child:
        os.close(theirs)
        told = os.read(ours, 1000)
        child.communicate(b"\n")
    os.close(ours)
    assert told.startswith(b"stops when the step is done and saved; Ctrl-C again stops at once")
    assert child.returncode == 1  # nothing has caught Stopped
