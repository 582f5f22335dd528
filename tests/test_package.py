"""The files that describe the package agree on its version, licence and author."""

import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import tinybert_jax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## \[(\d[^]]*)\]", changelog, re.MULTILINE)[0]
    assert tinybert_jax.__version__ == PROJECT["version"] == citation["version"] == newest


def test_public_names_are_listed_before_they_are_imported():
    program = "import sys, tinybert_jax as tj; "
    program += "print({*tj.__all__} <= {*dir(tj)}, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"]


def test_one_licence_and_one_author():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (author,) = PROJECT["authors"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == [author]
    for name in PROJECT["license-files"]:
        assert f"Copyright 2026 {author['name']}" in (ROOT / name).read_text(encoding="utf-8")


# Sends Ctrl-C to the process when it imports the command line, and when it ends.
_INTERRUPTED = """
import atexit, os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "tinybert_jax.cli":
            os.kill(os.getpid(), signal.SIGINT)

# As at the start of a command in the foreground; what starts the tests may ignore it.
signal.signal(signal.SIGINT, signal.SIG_IGN if {is_ignored} else signal.default_int_handler)
if {is_early}:
    sys.meta_path.insert(0, Interrupt())
else:
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv = ["tinybert", "launch", "slurm"]
from tinybert_jax.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("is_early", [True, False])
@pytest.mark.parametrize("is_ignored", [True, False])
def test_ctrl_c_while_it_starts_or_ends_prints_no_traceback(is_early, is_ignored):
    program = _INTERRUPTED.format(is_early=is_early, is_ignored=is_ignored)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "KeyboardInterrupt" not in done.stderr
    # The usage of a command without its config; a job in the background ignores Ctrl-C.
    assert done.returncode == (2 if is_ignored else -signal.SIGINT)
