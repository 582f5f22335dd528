"""Runs of several real processes: they train as one does, stop together, and tell who is lost."""

import ctypes
import json
import os
import random
import re
import socket
import subprocess
import sys

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_inputs
from safetensors.numpy import load_file

from tinybert_jax.config.compute import MeshSection
from tinybert_jax.parallel import processes, replicas, sharding
from tinybert_jax.parallel.group import LostProcessError
from tinybert_jax.parallel.mesh import make_mesh
from tinybert_jax.runs import shared_folder

STAGES = ("pretrain", "finetune", "general", "intermediate", "prediction")
TRAINED = ("loss", "grad_norm")


def _write(folder, num_steps, stages=STAGES):
    tiny_inputs.write_inputs(folder, **tiny_inputs.TEACHER)
    stage = {**tiny_inputs.STAGE, "num_steps": num_steps, "log_every": 1, "save_every": 3}
    stage["learning_rate"] = 2e-3  # with a larger one, rounding grows from step to step
    judged = {**stage, "eval_every": 4, "average_decay": 0.9}
    sections = {name: judged if name in ("finetune", "prediction") else stage for name in stages}
    tiny_inputs.write_config(
        folder / "run.yaml",
        folder,
        folder / "run",
        student=tiny_inputs.STUDENT,
        keep_checkpoints=True,
        distillation={"keep_logits": True, "teacher_margin": -1},
        **sections,
    )


def _run_all(folder, *cases):
    return forked.run_all(
        list(cases),
        folder,
        XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_use_fusion_emitters=false",
        JAX_COMPILATION_CACHE_DIR=str(folder / "cache"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )


def _case(name, num_processes=0, *settings, **fault):
    words = ["run", "run.yaml", f"run_dir={name}", *settings]
    count = {"num_processes": num_processes} if num_processes else {}
    return {"words": words, **count, **fault}


def _fault(place, call, signals, process=1):
    place = f"tinybert_jax.{place}"
    return {"place": place, "call": call, "seconds": 0, "signals": signals, "process": process}


def _statuses(answer):
    return [own["status"] for own in answer.get("processes", [answer])]


def _told(answer):
    return "\n".join(own["output"] + own["error"] for own in answer.get("processes", [answer]))


def _said(text):
    """The lines but for those of the library of collectives, and of waiting on a busy machine."""
    lines = [line for line in text.splitlines() if line and "[Gloo]" not in line]
    return [line for line in lines if not line.startswith("waits for ")]


def _rows(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] != "stage"]


def _check_same(run, golden):
    """Losses, gradients, scores and weights of two runs."""
    rows, expected = _rows(run), _rows(golden)
    places = [[(row["kind"], row["stage"], row["step"]) for row in own] for own in (rows, expected)]
    assert places[0] == places[1]
    for row, other in zip(rows, expected, strict=True):
        for name in (*TRAINED, "accuracy") if row["kind"] == "train" else ("accuracy",):
            if name in other:
                where = f"{name} of step {row['step']} of {row['stage']}"
                # Rounding of the sums over tokens, where all gradients are next to nothing.
                least = 1e-7 if name == "grad_norm" else 0
                np.testing.assert_allclose(
                    row[name], other[name], rtol=1e-5, atol=least, err_msg=where
                )
    for stage in (folder.name for folder in (golden / "models").iterdir()):
        ours, theirs = (
            load_file(own / "models" / stage / "model.safetensors") for own in (run, golden)
        )
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_allclose(array, theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    _write(folder, num_steps=5, stages=("finetune", "general", "prediction"))
    return folder


@pytest.fixture(scope="module")
def answers(world):
    """Of one process alone, of two that are stopped in the second stage, of their end, and of two

    with a wrong input.
    """
    stop = _fault("training.saver:Saver.check", 12, ["TERM"])  # called in each step and save
    cases = [
        _case("golden"),
        _case("two", 2, **stop),
        _case("two", 2),
        _case("broken", 2, "task.dev=nowhere.tsv"),
    ]
    return _run_all(world, *cases)


def test_two_processes_that_stop_and_go_on_train_as_one(world, answers):
    golden, stopped, ended, _ = answers
    assert _statuses(golden) == [0], _told(golden)
    assert _statuses(stopped) == [75, 75], _told(stopped)
    assert _statuses(ended) == [0, 0], _told(ended)
    _check_same(world / "two", world / "golden")
    assert (world / "two" / "hf" / "config.json").is_file()
    assert (world / "two" / "report.html").is_file()
    assert json.loads((world / "two" / "env.json").read_text())["num_processes"] == 2


def test_one_process_alone_speaks(answers):
    _, stopped, ended, _ = answers
    (line,) = _said(stopped["processes"][0]["error"])
    # The second, where the stage has ended before the processes agreed.
    place = r"(after step \d of 5 of \w+|at the start of \w+); everything until then is saved"
    assert re.search(f"stopped by SIGTERM {place}", line)
    assert "in all processes, each with its own --process-id: " in line
    for answer in (stopped, ended):
        other = answer["processes"][1]
        assert _said(other["output"] + other["error"]) == []


def test_a_wrong_input_is_told_by_all(answers):
    broken = answers[-1]
    assert _statuses(broken) == [2, 2], _told(broken)
    for own in broken["processes"]:
        assert "nowhere.tsv" in own["error"]
        assert "Traceback" not in own["error"]


# Four processes, other meshes, and losses of processes


@pytest.fixture(scope="module")
def long_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    _write(folder, num_steps=50)
    return folder


@pytest.fixture(scope="module")
def long_answers(long_world):
    """By name: of one process, of other meshes, and of runs whose processes are killed."""
    check = "training.saver:Saver.check"
    cases = {
        "golden": _case("golden"),
        "fsdp": _case("fsdp", 2, "mesh.fsdp=2"),
        "tensor": _case("tensor", 2, "mesh.tensor=2"),
        "both": _case("both", 4, "mesh.fsdp=2", "mesh.tensor=2"),
        "first killed": _case("killed", 2, **_fault(check, 60, ["KILL"], 0)),
        "second killed": _case("killed", 2, **_fault(check, 90, ["KILL"], 1)),
        "third of four killed": _case("killed", 4, **_fault(check, 90, ["KILL"], 2)),
        "four": _case("killed", 4, **_fault(check, 30, ["USR1"], 3)),
        "two": _case("killed", 2, "mesh.tensor=2", **_fault(check, 30, ["TERM"], 1)),
        "one": _case("killed"),
    }
    draw = random.Random(0)
    for number in range(10):
        hurt = draw.choice([0, 1, 2, 3, "all", "all"])
        fault = _fault(check, draw.randint(8, 30), ["KILL"], hurt)
        cases[f"random {number}"] = _case("random", 4, **fault)
    cases["random"] = _case("random", 4)
    return dict(zip(cases, _run_all(long_world, *cases.values()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "tensor", "both"])
def test_a_mesh_over_processes_trains_as_one_device(long_world, long_answers, name):
    count = 4 if name == "both" else 2
    assert _statuses(long_answers[name]) == [0] * count, _told(long_answers[name])
    _check_same(long_world / name, long_world / "golden")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "tensor", "both"])
def test_each_process_saves_its_part_of_weights_and_moments_alike(long_world, long_answers, name):
    states = long_world / name / "checkpoints" / "pretrain" / "last" / "50" / "shards"
    for file in sorted(states.iterdir()):
        arrays = load_file(file)
        begins = {key: own.shape for key, own in arrays.items() if key.startswith("params.")}
        assert begins
        for key, shape in begins.items():
            moment = re.compile(r"opt_state\..*\.[mn]u" + re.escape(key.removeprefix("params")))
            moments = [own.shape for name, own in arrays.items() if moment.fullmatch(name)]
            assert moments == [shape] * 2, key
    assert len(list(states.iterdir())) == (4 if name == "both" else 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, lost", [("first killed", 0), ("second killed", 1), ("third of four killed", 2)]
)
def test_the_others_end_soon_and_name_the_process_that_is_lost(long_answers, name, lost):
    for number, own in enumerate(long_answers[name]["processes"]):
        if number == lost:
            assert own["status"] == -9, own["error"]
            continue
        assert own["status"] == 4, own["error"]
        assert own["seconds"] < 90
        assert f"tinybert: lost process {lost} (" in own["error"]
        assert "Traceback" not in own["error"]


@pytest.mark.slow
def test_killed_and_stopped_it_goes_on_with_fewer_processes(long_world, long_answers):
    for name, status in {"four": [75] * 4, "two": [75] * 2, "one": [0]}.items():
        assert _statuses(long_answers[name]) == status, _told(long_answers[name])
    for own in long_answers["four"]["processes"]:
        assert own["seconds"] < 20
    _check_same(long_world / "killed", long_world / "golden")


@pytest.mark.slow
def test_killed_ten_times_at_random_it_ends_as_one_process_does(long_world, long_answers):
    for number in range(10):
        assert set(_statuses(long_answers[f"random {number}"])) <= {-9, 4}
    assert _statuses(long_answers["random"]) == [0] * 4, _told(long_answers["random"])
    _check_same(long_world / "random", long_world / "golden")


# Functions of `parallel`, in two processes with two devices each


_START = """
import sys
import traceback
from pathlib import Path
from tests.parallel import test_processes
from tinybert_jax.parallel import processes
processes.start(None, None, None)  # as srun would have started them
try:
    test_processes.check_functions(Path(sys.argv[1]))
except BaseException as error:
    traceback.print_exc()
    processes.leave(1, str(error))
processes.leave(0)
"""


def check_functions(folder):
    """Called in both processes."""
    number = processes.index()
    assert processes.count() == 2 and processes.is_main() == (number == 0)
    assert processes.from_main("number", lambda: number) == 0
    assert processes.on_main("number", lambda: 7) == (None if number else 7)
    with pytest.raises(OSError, match="the disk is full"):
        processes.together("write", lambda: _refuse(number == 1))
    processes.check_same("rows", "abc")
    with pytest.raises(ValueError, match=r"the same rows .* process 1 \("):
        processes.check_same("rows", f"abc{number}")

    shared_folder.check(folder / "new" / "run")
    assert not (folder / "new").exists()
    shared_folder._SECONDS = 1.0
    with pytest.raises(ValueError, match=r"run_dir: .* all processes share.* process 1 \("):
        shared_folder.check(folder / f"{number}")

    parts = {(): (number, 2), ("fsdp", 2): (number, 2), ("tensor", 2): (number, 2)}
    for axis, part in {**parts, ("tensor", 4): (0, 1)}.items():
        mesh = make_mesh(MeshSection(**dict([axis] if axis else [])))
        assert sharding.batch_part(mesh) == part
        rows = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
        placed = sharding.place({"rows": rows}, sharding.batch_sharding(mesh))
        index, count = part
        own = np.split(rows, count)[index]
        read = jax.make_array_from_process_local_data(sharding.batch_sharding(mesh), own)
        for whole in (placed["rows"], read):
            np.testing.assert_array_equal(sharding.fetch(whole), rows)

    copies = sharding.place({"w": rows}, sharding.replicated_sharding(mesh))
    # Each device in memory of its own: on CPUs, arrays that were sent may share the host's.
    copies = jax.tree.map(jax.jit(jnp.copy), copies)
    replicas.check(copies.items(), "at step 3")
    if number == 1:
        _flip(copies["w"].addressable_shards[1].data)
    with pytest.raises(LostProcessError, match=r"^process 1 \(.* of w on all devices at step 3"):
        replicas.check(copies.items(), "at step 3")


def _refuse(is_full):
    if is_full:
        raise OSError("the disk is full")


def _flip(array):
    """Flips a bit in the memory of a device, which is that of the host here."""
    byte = ctypes.c_ubyte.from_address(array.unsafe_buffer_pointer() + 5)
    byte.value ^= 16


def test_functions_of_two_processes(tmp_path):
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {
            **os.environ,
            "JAX_COORDINATOR_PORT": port,
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "PYTHONPATH": os.pathsep.join([".", "tests", os.environ.get("PYTHONPATH", "")]),
        }
        started = [
            subprocess.Popen(
                [sys.executable, "-c", _START, str(tmp_path)],
                env={**environment, "SLURM_PROCID": number, "SLURM_LOCALID": number},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in ("0", "1")
        ]
        told = [process.communicate(timeout=600)[0] for process in started]
        if not any("already in use" in text for text in told):
            break
    assert [process.returncode for process in started] == [0, 0], "\n".join(told)


@pytest.mark.parametrize(
    "given, named",
    [
        (("host:1", None, None), "together"),
        (("host", 2, 0), "HOST:PORT"),
        (("host:1", 2, 2), "0 to --num-processes - 1 = 1, got 2"),
    ],
)
def test_arguments_that_do_not_fit(given, named):
    with pytest.raises(ValueError, match=named):
        processes.start(*given)
    assert processes.count() == 1
