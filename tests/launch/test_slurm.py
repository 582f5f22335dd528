"""Batch scripts: the signal reaches the run, a stopped run is requeued, SLURM accepts the lines."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_inputs
from launch_files import FOLDER, Recorder

from tinybert_jax import cli

SCRIPTS = sorted(FOLDER.glob("*.sbatch"))


def _wait_for(is_there, what: str) -> None:
    for _ in range(600):
        if is_there():
            return
        time.sleep(0.1)
    pytest.fail(f"{what} within a minute")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(body): a rendered script whose srun starts a `tinybert` with this body."""
    folder = tmp_path / "bin"
    folder.mkdir()
    recorder = Recorder(folder)
    recorder.add("scontrol")
    # As srun does: starts the command after its options, and takes its status.
    recorder.add("srun", 'while [[ $1 == --* ]]; do shift; done\nexec "$@"')
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def begin(body: str) -> subprocess.Popen:
        recorder.add("tinybert", body)
        return subprocess.Popen(["bash", str(FOLDER / "english-gpu.sbatch")], cwd=tmp_path)

    yield begin, recorder


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_run_and_the_job_is_requeued(start, tmp_path, number):
    begin, recorder = start
    caught = f"trap 'sleep 0.3; exit 75' {number.name.removeprefix('SIG')}"
    script = begin(f'{caught}\ntouch "{tmp_path}/ready"\nwhile :; do sleep 0.1; done')
    try:
        _wait_for((tmp_path / "ready").exists, "the run starts")
        script.send_signal(number)
        assert script.wait(timeout=60) == 75
    finally:
        script.kill()
    assert recorder.calls[-1] == "scontrol requeue 7"


@pytest.mark.parametrize("status", [0, 1, 2, 3, 5])
def test_other_ends_are_not_requeued(start, status):
    begin, recorder = start
    assert begin(f"exit {status}").wait(timeout=60) == status
    assert not any(call.startswith("scontrol") for call in recorder.calls)


@pytest.mark.parametrize("status", [4, 137])
def test_a_job_that_lost_a_process_is_requeued_three_times(start, status):
    """Stops between its losses do not count."""
    begin, recorder = start
    ends = [(status, True), (75, True), (status, True), (75, True), (status, True), (status, False)]
    for end, is_requeued in ends:
        before = len(recorder.calls)
        assert begin(f"exit {end}").wait(timeout=60) == end
        assert ("scontrol requeue 7" in recorder.calls[before:]) == is_requeued


def test_one_task_a_node_sees_all_gpus_of_the_node():
    """With tasks on every GPU, JAX takes the GPU of the task's own number."""
    whole = (FOLDER / "english-gpu.sbatch").read_text()
    assert "--ntasks-per-node=1\n" in whole
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n" in whole
    single = (FOLDER / "english-gpu.pyxis.sbatch").read_text()
    assert "--ntasks-per-node=8\n" in single and "JAX_LOCAL_DEVICE_IDS" not in single


_SRUN = """\
while [[ $1 == --* ]]; do shift; done
export JAX_PLATFORMS=cpu SLURM_NTASKS=4 SLURM_STEP_NODELIST=localhost
for number in 0 1 2 3; do
  SLURM_PROCID=$number SLURM_LOCALID=$number "$@" &
done
status=0
for number in 1 2 3 4; do wait -n || status=$?; done
exit $status
"""


@pytest.mark.slow
def test_a_rendered_script_starts_four_processes_that_train_as_one(tmp_path, monkeypatch):
    """With the variables that SLURM sets for each task; only the devices are those of a CPU."""
    tiny_inputs.write_inputs(tmp_path, **tiny_inputs.TEACHER)
    stage = {**tiny_inputs.STAGE, "num_steps": 4, "eval_every": 4}
    config = tiny_inputs.write_config(
        tmp_path / "run.yaml",
        tmp_path,
        Path("run"),  # in the shared folder that the job starts in
        student=tiny_inputs.STUDENT,
        distillation={"teacher_margin": -1},
        finetune=stage,
        prediction=stage,
    )
    script = tmp_path / "job.sbatch"
    words = ["launch", "slurm", config, "--accelerator", "h100:4", "--gpus-per-host", "4"]
    assert cli.main([*words, "--tasks-per", "gpu", "--no-compile", "-o", str(script)]) == 0
    folder = tmp_path / "bin"
    folder.mkdir()
    recorder = Recorder(folder)
    recorder.add("srun", _SRUN)
    own = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{folder}:{own}:/usr/bin:/bin")
    # JAX takes a port by it.
    monkeypatch.setenv("SLURM_JOB_ID", str(time.time_ns() % 10**6))
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "env.json").read_text())["num_processes"] == 4
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "hf" / "config.json").is_file()


# SLURM's own parser

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={port}
SlurmdPort={slurmd_port}
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=64
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=64
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a cluster with two nodes, which say that they have 64 cores each."""
    programs = [
        shutil.which(f"{name}-wlm") or shutil.which(name) for name in ("slurmctld", "slurmd")
    ]
    if not all(programs) or not shutil.which("sbatch"):
        pytest.skip("slurmctld, slurmd and sbatch are not installed (Debian: slurm-wlm)")
    if os.geteuid() != 0:
        pytest.skip("SLURM's programs have to be started by root")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    conf = folder / "slurm.conf"
    ports = dict(zip(("port", "slurmd_port", "first", "second"), _free_ports(4), strict=True))
    conf.write_text(_CONF.format(host=socket.gethostname().split(".")[0], folder=folder, **ports))
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    controller, node = programs
    started = [subprocess.Popen([controller, "-D", "-f", str(conf)], **quiet)]
    count = ["sinfo", "--noheader", "--states=idle", "--Node"]

    def num_idle() -> int:
        told = subprocess.run(count, env=environment, capture_output=True, text=True)
        return len(told.stdout.splitlines()) if told.returncode == 0 else 0

    try:
        for name in ("node1", "node2"):
            words = [node, "-D", "-N", name, "-f", str(conf)]
            started.append(subprocess.Popen(words, **quiet))
        _wait_for(lambda: num_idle() == 2, "both nodes are idle")
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=60)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_sbatch_accepts_the_script(slurm, path, tmp_path):
    """As it is, sbatch finds no node with GPUs; without that line it would schedule the job."""
    given = _ask(slurm, path)
    assert "Requested node configuration is not available" in given or "to start at" in given
    lines = path.read_text().splitlines(keepends=True)
    bare = tmp_path / "job.sbatch"
    bare.write_text("".join(line for line in lines if "--gpus-per-node" not in line))
    assert "to start at" in _ask(slurm, bare)
    bare.write_text(path.read_text().replace("--signal=B:USR1@120", "--signal=B:USR9@120"))
    assert "to start at" not in _ask(slurm, bare)


def _ask(environment: dict[str, str], path) -> str:
    words = ["sbatch", "--test-only", str(path)]
    return subprocess.run(words, env=environment, capture_output=True, text=True).stderr
