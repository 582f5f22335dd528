"""`tinybert launch`: what it renders is right; what cannot run is refused and never written."""

import importlib.util
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from launch_files import FOLDER, MANIFESTS, ROOT, SCRIPTS, Recorder, command, container, origin
from launch_files import program as tool
from packaging.specifiers import SpecifierSet
from tiny_inputs import STAGE, TEACHER, write_config, write_inputs

from tinybert_jax import cli
from tinybert_jax.config import load as config_files
from tinybert_jax.launch import job as jobs
from tinybert_jax.performance import accelerators

FILES = [*SCRIPTS, *MANIFESTS]
JOBSETS = [path for path in MANIFESTS if "kind: JobSet" in path.read_text()]


def _name(path: Path) -> str:
    return path.name


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("TEACHER", "TINYBERT_DATA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recorder(tmp_path, monkeypatch) -> Recorder:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return Recorder(folder)


# The files in launch/


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_launch_holds_what_the_command_renders(path, capsys):
    assert cli.main(origin(path)) == 0
    assert capsys.readouterr().out == path.read_text()


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_rendered_commands_are_understood(path, monkeypatch):
    """The command that the machines start is one of ours, for the config of the job."""
    words = command(path)
    assert words[0] == "tinybert"
    arguments, given = cli._parse(words[1:]), cli._parse(origin(path))
    assert (arguments.command, arguments.config) == (given.command_name, given.config)
    for pair in given.env:
        monkeypatch.setenv(*pair.split("=", 1))
    settings = config_files.load(arguments.config, arguments.overrides)
    assert settings == config_files.load(given.config, given.overrides)


def test_commands_of_the_manual_render(monkeypatch, capsys):
    monkeypatch.setenv("TEACHER", "/data/bert")
    lines = (ROOT / "docs/guides/clusters.md").read_text().replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("tinybert launch ")]
    assert [words[2] for words in commands] == ["slurm", "jobset", "gcluster", "tpu-vm", "sky"]
    for words in commands:
        assert cli.main(words[1:]) == 0
        assert "configs/pretrain/english-gpu.yaml" in capsys.readouterr().out


def test_every_launcher_is_there():
    assert {origin(path)[1] for path in FILES} == {"slurm", "jobset", "gcluster", "tpu-vm", "sky"}


# Other people's checkers


def _embedded(text: str) -> list[str]:
    """The scripts in a script: what machines run at their start, or in their containers."""
    if "<<'STARTUP'\n" in text:
        return [text.partition("<<'STARTUP'\n")[2].partition("\nSTARTUP\n")[0] + "\n"]
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    return [
        f"#!/bin/bash\n{word.removeprefix('--command=')}\n"
        for word in words
        if word.startswith("--command=")
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=_name)
def test_shellcheck(path):
    for text in (path.read_text(), *_embedded(path.read_text())):
        subprocess.run([tool("shellcheck"), "--shell=bash", "-"], input=text, text=True, check=True)


def test_hadolint():
    subprocess.run([tool("hadolint"), str(FOLDER / "Dockerfile")], check=True)


@pytest.mark.parametrize("path", JOBSETS, ids=_name)
def test_jobsets_keep_every_key_in_the_models_of_the_api(path):
    """The models ignore keys that they do not know, so that the dump has to equal the input."""
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="kubeflow-trainer-api is in the extra `test`"
    )
    jobset = list(yaml.safe_load_all(path.read_text()))[-1]
    assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset
    jobset["spec"]["failurePolicy"]["maxRestart"] = 3
    assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() != jobset


@pytest.mark.parametrize("path", JOBSETS, ids=_name)
def test_core_kinds_follow_their_schemas(path):
    validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is in the extra `test`"
    )
    *others, jobset = yaml.safe_load_all(path.read_text())
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}}
        others.append({**job, "spec": replicated["template"]["spec"]})
    for document in others:
        validate.validate(document, "1.31", strict=True)
    others[-1]["spec"]["backofLimit"] = 0
    with pytest.raises(validate.ValidationError):
        validate.validate(others[-1], "1.31", strict=True)


# JobSets


def test_a_pod_that_was_taken_away_or_saved_does_not_count_as_a_failure():
    jobset = yaml.safe_load((FOLDER / "sst2-english.tpu.yaml").read_text())
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    taken, saved = spec["podFailurePolicy"]["rules"]
    assert taken["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert saved["onExitCodes"]["values"] == [75]
    assert saved["onExitCodes"]["containerName"] == container(jobset)["name"]
    assert spec["backoffLimit"] == 0 and spec["parallelism"] == spec["completions"] == 4


def test_pods_of_gpus_may_ask_for_the_other_pods():
    """JAX finds them by the Kubernetes API; the account, its role and the pods have to agree."""
    account, role, binding, jobset = yaml.safe_load_all(
        (FOLDER / "english-gpu.gpus.yaml").read_text()
    )
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    name = account["metadata"]["name"]
    assert pod["serviceAccountName"] == name == binding["subjects"][0]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert {part for rule in role["rules"] for part in rule["resources"]} == {
        "pods",
        "services",
        "jobs",
    }
    assert "k8s" in (FOLDER / "Dockerfile").read_text()


# The environment


def test_variables_of_the_config_go_with_the_job(capsys, monkeypatch):
    monkeypatch.setenv("TEACHER", "/from/here")
    before = dict(os.environ)
    assert cli.main(_words("slurm", "--env", "TINYBERT_DATA=/given", "--env", "XLA_FLAGS=")) == 0
    text = capsys.readouterr().out
    assert "export TEACHER=/from/here\n" in text and "export TINYBERT_DATA=/given\n" in text
    assert "export XLA_FLAGS=''\n" in text  # a given value is the last word
    assert dict(os.environ) == before


def test_xla_accepts_the_flags():
    values = jobs.environment(accelerators.read("h100:16"), "cache", {})
    values = {**os.environ, **values, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""}
    assert values["XLA_FLAGS"]
    code = "import jax; jax.devices()"
    subprocess.run([sys.executable, "-c", code], env=values, check=True)


@pytest.mark.parametrize("launcher", ["slurm", "jobset", "gcluster", "tpu-vm", "sky"])
def test_values_keep_their_characters(launcher, recorder, tmp_path, capsys):
    """Quotes, dollars and line ends in a setting reach the program as they were given."""
    settings = ["name=\"it's $HOME;\n`date` 'x' \\\\\"", "student.init=random"]
    assert cli.main([*_words(launcher), *_ENV, *settings]) == 0
    text = capsys.readouterr().out
    if launcher in ("jobset", "sky"):
        document = list(yaml.safe_load_all(text))[-1]
        words = (
            shlex.split(document["run"]) if "run" in document else container(document)["command"]
        )
        got = words[words.index("tinybert") + 1 :]
    else:
        seen = tmp_path / "seen"
        recorder.add("tinybert", f'printf "%s\\0" "$@" >"{seen}"')
        recorder.add("srun", 'while [[ $1 == --* ]]; do shift; done\nexec "$@"')
        recorder.add("docker", 'while [[ $1 != tinybert ]]; do shift; done\nexec "$@"')
        recorder.add("gcluster", 'for w; do [[ $w != --command=* ]] || bash -c "${w#*=}"; done')
        if launcher == "tpu-vm":
            text = text[text.index("failures=0") : text.index("\nSTARTUP\n")]
        assert subprocess.run(["bash", "-c", text]).returncode == 0
        got = seen.read_text().split("\0")[:-1]
    assert got == ["run", _CONFIG, *settings]


# What is refused

_CONFIG = "configs/distill/sst2-english.yaml"
_ENV = ("--env", "TEACHER=/data/t", "--env", "TINYBERT_DATA=/data")
_IN_IMAGE = ("--image", "image", "--mount", "claim:/workspace/runs")
_OPTIONS = {
    "slurm": ("--accelerator", "h100:16"),
    "jobset": ("--accelerator", "v5e:4x4", *_IN_IMAGE),
    "gcluster": (
        *("--accelerator", "v5e:4x4", *_IN_IMAGE),
        *("--cluster", "c", "--location", "l", "--project", "p"),
    ),
    "tpu-vm": (
        *("--accelerator", "v6e:4x4", "--image", "image", "--mount", "nfs:/x:/workspace/runs"),
        *("--project", "p", "--zone", "us-east5-a"),
    ),
    "sky": ("--accelerator", "v6e:2x2", *_IN_IMAGE),
}


def _words(launcher: str, *more: str) -> list[str]:
    return ["launch", launcher, _CONFIG, *_OPTIONS[launcher], *more]


@pytest.mark.parametrize(
    "launcher, words, named",
    [
        ("slurm", ["--accelerator", "h900:8"], ("h100", "'h900:8'")),
        ("jobset", ["--accelerator", "v5e:4y4"], ("a product", "'4y4'")),
        ("slurm", ["--accelerator", "v5e:4x4"], ("GPUs", "v5e", "launch jobset")),
        ("tpu-vm", ["--accelerator", "h100:8"], ("TPUs", "h100", "launch sky")),
        ("slurm", ["run_dir=/tmp/x"], ("every node sees", "/tmp/x", "--run-dir")),
        ("slurm", ["--run-dir", "/dev/shm/x"], ("every node sees", "/dev/shm/x")),
        ("slurm", ["--form", "pyxis", "--image", "i"], ("in a --mount", "no --mount")),
        ("slurm", ["--form", "apptainer"], ("--image", "launch/Dockerfile")),
        ("slurm", ["--image", "i"], ("apptainer or pyxis", "bare with i", "--form")),
        ("slurm", ["--form", "apptainer", "--image", "i", "--venv", "v"], ("--venv", "remove")),
        ("slurm", ["--spot"], ("--spot", "--sbatch=--partition")),
        ("slurm", ["--time", "a day"], ("HH:MM:SS", "'a day'")),
        ("slurm", ["--sbatch=--x\nrm -rf x"], ("one option of sbatch", "rm -rf")),
        ("jobset", ["--run-dir", "/elsewhere/x"], ("/elsewhere/x", "/workspace/runs")),
        ("jobset", ["--run-dir", "runs/../x"], ("in a --mount", "runs/../x")),
        ("jobset", ["run_dir=~/x"], ("in a --mount", "~/x")),
        ("jobset", ["--mount", "claim"], ("SOURCE:/PATH", "'claim'")),
        ("jobset", ["--mount", "claim:/workspace"], ("hide /workspace", "/workspace/runs")),
        ("jobset", ["--mount", "claim:/"], ("hide /workspace",)),
        ("gcluster", ["--accelerator", "h100:16"], ("--service-account", "launch jobset")),
        ("jobset", ["run_store=gs://b/r", "--run-dir", "/x"], ("in a --mount",)),
        ("sky", ["--run-dir", "/x"], ("in a --mount", "with run_store=gs://BUCKET/RUN")),
        ("sky", ["--run-dir", "/x", "run_store=file:///tmp/store"], ("in a --mount",)),
        ("slurm", ["--compile"], ("--compile", "GPUs are compiled where a GPU is")),
        ("jobset", ["--image", ""], ("--image", "none", "launch/Dockerfile")),
        ("jobset", ["--name", "My job"], ("--name", "'My job'")),
        ("jobset", ["--name", "a" * 29], ("at most 28",)),
        ("jobset", ["--env", "TEACHER"], ("NAME=VALUE", "'TEACHER'")),
        ("jobset", ["--accelerator", "h200:4"], ("8 GPUs of h200", "4")),
        ("jobset", ["mesh.data=4"], ("= 16", "4 × 1 × 1", "mesh.data=-1")),
        ("jobset", ["mesh.tensor=3"], ("= 16", "-1 × 1 × 3")),
        ("jobset", ["--slices", "8"], ("multiple of 128", "general.global_batch_size=128")),
        ("jobset", ["genral=null"], ("genral", "did you mean 'general'")),
        ("tpu-vm", ["--slices", "2"], ("--slices", "launch jobset")),
        ("jobset", ["--mount", "gs://b:/d"], ("claim", "gs://b", "run_store=gs://BUCKET/RUN")),
        ("tpu-vm", ["--mount", "gs://b:/d"], ("NFS", "'gs://b'")),
        (
            "slurm",
            ["--form", "apptainer", "--image", "i", "--mount", "gs://b:/d"],
            ("a folder of the nodes", "gs://b"),
        ),
        ("tpu-vm", ["--mount", "claim:/data"], ("NFS", "'claim'", "SERVER:/EXPORT:/data")),
        ("sky", ["--accelerator", "h100:16"], ("one host of GPUs", "2 hosts", "launch slurm")),
        ("sky", ["--mount", "s3://x:/x"], ("gs://BUCKET", "'s3://x'")),
        ("sky", ["--accelerator", "v6e:4x4", "--mount", "gs://x:/x"], ("volume", "4 hosts")),
    ],
)
def test_what_cannot_run_is_refused(launcher, words, named, tmp_path, recorder, capsys):
    """One message with what was expected, what was given and the fix; nothing written or called."""
    for name in ("sbatch", "kubectl", "gcluster", "gcloud", "sky"):
        recorder.add(name)
    output = tmp_path / "job"
    assert cli.main([*_words(launcher, *_ENV, "--submit", "-o", str(output)), *words]) == 2
    told = capsys.readouterr().err
    for part in named:
        assert part in told
    assert "genral=null" in words or "expected" in told and "got" in told
    assert not output.exists() and not recorder.calls


def test_one_host_with_a_store_needs_no_shared_folder(capsys):
    words = ["launch", "jobset", _CONFIG, "--accelerator", "v6e:2x2", "--image", "i", *_ENV]
    assert cli.main([*words, "run_store=gs://bucket/run"]) == 0
    assert "run_store=gs://bucket/run" in capsys.readouterr().out


def test_a_step_that_does_not_fit_is_not_submitted(recorder, tmp_path, capfd):
    """A compiler of TPU programs that is not there is no reason to refuse a job."""
    recorder.add("kubectl")
    words = _words("jobset", *_ENV, "--submit")
    if not importlib.util.find_spec("libtpu"):
        assert cli.main(words) == 0
        assert "is not compiled before it is submitted: it needs" in capfd.readouterr().err
        assert cli.main([*words, "--no-compile"]) == 0
        assert "compiled" not in capfd.readouterr().err
        assert len(recorder.calls) == 2
        return
    folder = tmp_path / "inputs"
    folder.mkdir()
    write_inputs(folder, **TEACHER)
    large = {**STAGE, "num_steps": 1, "global_batch_size": 2**22}
    config = write_config(tmp_path / "large.yaml", folder, "/workspace/runs/x", pretrain=large)
    words = ["launch", "jobset", config, *_OPTIONS["jobset"], "--submit"]
    assert cli.main(words) == 3
    assert "lower global_batch_size" in capfd.readouterr().err
    assert not recorder.calls


def test_missing_variables_and_folders(tmp_path, capsys):
    assert cli.main(_words("slurm")) == 2
    assert "TEACHER, which is not set" in capsys.readouterr().err
    assert cli.main(_words("slurm", *_ENV, "-o", str(tmp_path / "none" / "job"))) == 2
    assert "in a folder that exists" in capsys.readouterr().err


# Submission


@pytest.mark.parametrize(
    "launcher, program, before",
    [
        ("slurm", "sbatch", "sbatch "),
        ("jobset", "kubectl", "kubectl create -f "),
        ("sky", "sky", "sky jobs launch --yes "),
    ],
)
def test_submission_hands_over_the_file(launcher, program, before, recorder, tmp_path, capsys):
    recorder.add(program, f'cp "${{!#}}" "{tmp_path}/seen"')
    assert cli.main(_words(launcher, *_ENV)) == 0
    text = capsys.readouterr().out
    assert not recorder.calls
    for output in ([], ["-o", str(tmp_path / "kept")]):
        assert cli.main(_words(launcher, *_ENV, "--submit", *output)) == 0
        assert recorder.calls[-1].startswith(before)
        assert capsys.readouterr().out == ""
        assert (tmp_path / "seen").read_text().splitlines()[3:] == text.splitlines()[3:]
    assert recorder.calls[-1] == before + str(tmp_path / "kept")
    recorder.add(program, "exit 3")
    assert cli.main(_words(launcher, *_ENV, "--submit")) == 3


def test_submission_of_machines(recorder, tmp_path):
    """The script runs its commands in order, with the start-up script in a file that exists."""
    body = f'for w; do case $w in *startup-script=*) cp "${{w##*=}}" "{tmp_path}/s" ;; esac; done'
    recorder.add("gcloud", body)
    assert cli.main(_words("tpu-vm", *_ENV, "--submit")) == 0
    started = [" ".join(call.split()[2:6]) for call in recorder.calls]
    assert started == [
        "resource-policies create workload-policy sst2-english",
        "instance-templates create sst2-english --machine-type=ct6e-standard-4t",
        "instance-groups managed create sst2-english",
    ]
    assert (tmp_path / "s").read_text().startswith("#!/bin/bash\n")
    recorder.add("gcluster")
    assert cli.main(_words("gcluster", *_ENV, "--submit")) == 0
    assert recorder.calls[-1].startswith("gcluster job submit --cluster=c")


def test_submission_needs_the_program(recorder, tmp_path, capsys):
    output = tmp_path / "job"
    assert cli.main(_words("gcluster", *_ENV, "--submit", "-o", str(output))) == 2
    assert "the program gcluster on PATH, got none" in capsys.readouterr().err
    assert not output.exists()


# Machines that start again


@pytest.mark.parametrize(
    "codes, num_starts, status",
    [
        ((0,), 1, 0),
        ((2,), 1, 2),
        ((75, 75, 0), 3, 0),
        ((1, 75, 1, 1, 0), 5, 0),
        ((1, 1, 1, 1, 0), 4, 1),
    ],
)
def test_a_machine_runs_the_job_again(codes, num_starts, status, recorder):
    """75 does not count; after three failures, or with wrong input, the machine stops trying."""
    (startup,) = _embedded((FOLDER / "english-gpu.v6e.sh").read_text())
    counter = f'n=$(grep -c ^docker "{recorder.folder}/calls")'
    recorder.add("docker", f"{counter}\ncodes=(0 {' '.join(map(str, codes))})\nexit ${{codes[n]}}")
    recorder.add("sleep")
    loop = "set -uo pipefail\n" + startup[startup.index("failures=0") :]
    assert subprocess.run(["bash", "-c", loop]).returncode == status
    assert sum(call.startswith("docker run") for call in recorder.calls) == num_starts


# Images


def test_the_dockerfile_fits_the_package():
    text = (FOLDER / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (version,) = [line.partition("=")[2] for line in text.splitlines() if "ARG JAX" in line]
    (wanted,) = [line for line in project["dependencies"] if line.startswith("jax>")]
    assert version in SpecifierSet(wanted.removeprefix("jax"))
    assert {line.split()[-1] for line in text.splitlines() if " AS " in line} == {
        *("base", "cpu", "cuda", "tpu"),
    }
    kept = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    for line in text.splitlines():
        for source in line.split()[1:-1] if line.startswith("COPY") else ():
            assert (ROOT / source).exists() and f"!{source}" in kept
    assert f"WORKDIR {jobs.IMAGE_FOLDER}\n" in text


def test_a_path_of_this_machine_that_no_mount_holds_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TEACHER", "/home/me/bert")
    monkeypatch.setenv("TINYBERT_DATA", "/data/text")
    assert cli.main(_words("jobset", "--mount", "data-claim:/data")) == 2
    told = capsys.readouterr().err
    assert "expected TEACHER as the container sees it, got /home/me/bert" in told
    assert "--env TEACHER=/DATA/" in told
    monkeypatch.setenv("TEACHER", "/data/bert")
    assert cli.main(_words("jobset", "--mount", "data-claim:/data")) == 0
    assert "/data/bert" in capsys.readouterr().out
