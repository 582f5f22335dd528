"""The rendered files in launch/, the commands in them, and programs that record their calls."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "launch"
SCRIPTS = [*sorted(FOLDER.glob("*.sbatch")), *sorted(FOLDER.glob("*.sh"))]
MANIFESTS = sorted(FOLDER.glob("*.yaml"))


def origin(path: Path) -> list[str]:
    """The `tinybert launch` command that rendered a file, as the file says, without `tinybert`."""
    mark = "# Rendered by: tinybert "
    (line,) = [line for line in path.read_text().splitlines() if line.startswith(mark)]
    return shlex.split(line.removeprefix(mark))


def command(path: Path) -> list[str]:
    """The words of the `tinybert` command that a rendered file starts on the machines."""
    text = path.read_text()
    if path.suffix == ".yaml":
        documents = list(yaml.safe_load_all(text))
        if "run" in documents[-1]:
            return _from_tinybert(shlex.split(documents[-1]["run"]))
        return container(documents[-1])["command"]
    lines = text.replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if " tinybert " in line and not line.startswith("#")]
    words = shlex.split(line)
    if words[0] == "gcluster":
        (given,) = [word for word in words if word.startswith("--command=")]
        words = shlex.split(given.removeprefix("--command="))
    return _from_tinybert(words)


def container(jobset: dict) -> dict:
    (job,) = jobset["spec"]["replicatedJobs"]
    (found,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return found


def _from_tinybert(words: list[str]) -> list[str]:
    words = words[words.index("tinybert") :]
    return words[:-1] if words[-1] == "&" else words


def program(name: str) -> str:
    """The path of a program that a Python package brings; skips the test where it is absent."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed; it is in the extra `test`")
    return found


class Recorder(NamedTuple):
    """A folder of programs for PATH that do nothing but note each call of theirs."""

    folder: Path

    def add(self, name: str, body: str = "") -> None:
        path = self.folder / name
        note = f'printf "%s\\n" "{name} $*" >>"{self.folder}/calls"'
        path.write_text(f"#!/bin/bash\n{note}\n{body}\n")
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []
