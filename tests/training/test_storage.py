"""Saves are tried again, told in a line, and safe, on a storage that really refuses or forgets."""

import os
import subprocess
import sys
from pathlib import Path

import faulty
import pytest


@pytest.mark.slow
def test_saves_on_a_storage_that_fails(tmp_path):
    """The cases in a process whose calls of the C library fail as the cases ask for."""
    library = faulty.build(tmp_path)
    if library is None:
        pytest.skip("needs a C compiler")
    cases = Path(__file__).with_name("storage_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", cases],
        env={**os.environ, "LD_PRELOAD": library, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
