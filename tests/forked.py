"""Runs `tinybert` commands in forks of one process that has imported everything: seconds less each.

    python forked.py < cases.json

A case is a JSON object: `words` of the command, and what happens to it. With `place`, such as
`tinybert_jax.runs.head_init:fit_head`, the process sends `signals` (names without SIG) to itself at
call number `call` of that function, and then waits `seconds` in it, as if its work took so long.
`environment` is set before the command starts. The answers go to standard output as JSON:
`status` (negative: ended by that signal), `output`, `error`, and `seconds`, counted from the signal
if there is one.
"""

import functools
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any


def run_all(cases: list[dict[str, Any]], folder: Path, **environment: str) -> list[dict[str, Any]]:
    """The answers to the cases, one after the other, in a process of their own."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(cases),
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def fork(case: dict[str, Any], output: int, error: int) -> int:
    """Starts a case in a fork and returns its process id; the files get what it prints."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(error, 2)
        os.environ.update(case.get("environment", {}))
        if "place" in case:
            _signal_at(**{n: case[n] for n in ("place", "call", "seconds", "signals", "begin")})
        from tinybert_jax import cli

        status = cli.main(case["words"])
        sys.stdout.flush()
    finally:
        sys.stderr.flush()
        os._exit(status)


def import_all() -> None:
    """Imports what a run imports; JAX starts no backend and no thread meanwhile."""
    warnings.filterwarnings("ignore", message=".*os.fork", category=RuntimeWarning)
    for name in ("datasets", "grain", "orbax.checkpoint", "transformers.models.bert"):
        importlib.import_module(name)
    importlib.import_module("tinybert_jax.recipes.pipeline")
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized()


def _signal_at(place: str, call: int, seconds: float, signals: list[str], begin: str) -> None:
    module, _, name = place.partition(":")
    *owners, name = name.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    function, counter = getattr(owner, name), itertools.count(1)

    @functools.wraps(function)
    def signalled(*arguments, **named):
        if next(counter) == call:
            Path(begin).write_text(str(time.monotonic()))
            for sent in signals:
                os.kill(os.getpid(), signal.Signals[f"SIG{sent}"])
                time.sleep(0.05)
            time.sleep(seconds)
        return function(*arguments, **named)

    setattr(owner, name, signalled)


def _answer(case: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / name for name in ("output", "error", "begin")]
        begin = time.monotonic()
        with files[0].open("wb") as output, files[1].open("wb") as error:
            pid = fork(case | {"begin": str(files[2])}, output.fileno(), error.fileno())
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if files[2].exists():
            begin = float(files[2].read_text())
        told = [path.read_text() for path in files[:2]]
        seconds = time.monotonic() - begin
    return {"status": status, "output": told[0], "error": told[1], "seconds": seconds}


if __name__ == "__main__":
    import_all()
    print(json.dumps([_answer(case) for case in json.load(sys.stdin)]))
