"""`tinybert completion`: bash completes commands, options and choices from the script."""

import subprocess
import sys

import pytest

from tinybert_jax import cli


def _complete(script, words):
    """What bash offers for the last of the words."""
    lines = f"""
        {script}
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
        COMP_CWORD={len(words) - 1}
        COMPREPLY=()
        _shtab_tinybert
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_options_and_choices(capsys):
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert {"report", "run"} <= set(_complete(script, ["tinybert", "r"]))
    assert _complete(script, ["tinybert", "run", "--dry"]) == ["--dry-run"]
    assert _complete(script, ["tinybert", "schema", "pre"]) == ["prepare"]
    assert _complete(script, ["tinybert", "ckpt", "pr"]) == ["prune"]


def test_without_the_package_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "tinybert-jax[completion]" in capsys.readouterr().err
