"""Runs `tinybert` commands in forks of one process that has imported everything: seconds less each.

    python forked.py < cases.json

A case is a JSON object: `words` of the command, and what happens to it. With `place`, such as
`tinybert_jax.runs.head_init:fit_head`, the process sends `signals` (names without SIG) to itself at
call number `call` of that function, and then waits `seconds` in it, as if its work took so long.
`environment` is set before the command starts. The answers go to standard output as JSON:
`status` (negative: ended by that signal), `output`, `error`, and `seconds`, counted from the signal
if there is one.

A case with `num_processes` starts that many processes that train together; `place` is then one of
process number `process`, or of "all", and the answer has a list `processes` of such answers.
"""

import functools
import importlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

LONGEST_SECONDS = 900.0  # of a case on a busy machine; its processes are then killed


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


def _answers(case: dict[str, Any]) -> dict[str, Any]:
    """The answer of a case, whose processes run at the same time."""
    count = case.pop("num_processes", 0)
    if not count:
        return _answer_all([case])[0]
    fault = {n: case.pop(n) for n in ("place", "call", "seconds", "signals") if n in case}
    hurt, words = case.pop("process", 0), case["words"]
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)]
        answers = _answer_all(
            [
                {**case, **(fault if hurt in (number, "all") else {})}
                | {"words": [*words, *where, "--process-id", str(number)]}
                for number in range(count)
            ]
        )
        if not any("address already in use" in answer["error"].lower() for answer in answers):
            break
    return {"processes": answers}


def _answer_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        files = [
            {name: Path(scratch) / f"{name}-{number}" for name in ("output", "error", "begin")}
            for number in range(len(cases))
        ]
        start, begun = time.monotonic(), {}
        for number, (case, own) in enumerate(zip(cases, files, strict=True)):
            with own["output"].open("wb") as output, own["error"].open("wb") as error:
                case = case | {"begin": str(own["begin"])}
                begun[fork(case, output.fileno(), error.fileno())] = number
        ended: dict[int, tuple[int, float]] = {}
        while begun:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                ended[begun.pop(pid)] = os.waitstatus_to_exitcode(status), time.monotonic()
            elif time.monotonic() - start > LONGEST_SECONDS:
                for pid in begun:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        begins = [float(own["begin"].read_text()) for own in files if own["begin"].exists()]
        return [
            {
                "status": ended[number][0],
                "output": own["output"].read_text(),
                "error": own["error"].read_text(),
                "seconds": ended[number][1] - (begins[0] if begins else start),
            }
            for number, own in enumerate(files)
        ]


if __name__ == "__main__":
    import_all()
    print(json.dumps([_answers(case) for case in json.load(sys.stdin)]))
