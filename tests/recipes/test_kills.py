"""Kills, flipped bits and losses of power leave a run's bits as they are; see tests/kills.py."""

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(["--kills", "5", "--flips", "0", "--power", "0"], id="kills"),
        pytest.param(
            ["--kills", "5", "--flips", "3", "--power", "1"], id="all", marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_that_is_killed_spoilt_and_cut_off_ends_with_the_same_bits(faults, tmp_path):
    script = Path(forked.__file__).with_name("kills.py")
    words = [*faults, "--seed", "5", "--keep", str(tmp_path)]
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # one device
    done = subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the golden run's weights and metrics, bit for bit" in done.stdout
