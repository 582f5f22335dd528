"""Downloads from a hub that goes away: a real server on this machine, and the real client."""

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from tinybert_jax.config import load as config_files
from tinybert_jax.config.stages import FINETUNE
from tinybert_jax.runs import preflight

SHA = "0123456789abcdef0123456789abcdef01234567"
NEWER = SHA[::-1]
WEIGHTS = "model.safetensors"


class Hub(http.server.ThreadingHTTPServer):
    """Serves one repository; `cut`: the connection breaks in the middle of the weights."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder, self.sha, self.cut = folder, SHA, False
        self.asked: list[str] = []


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append(path)
        files = sorted(hub.folder.iterdir())
        if path == "/api/models/owner/name/revision/main":
            self._json({"id": "owner/name", "sha": hub.sha, "siblings": []})
        elif path.startswith("/api/models/owner/name/tree/"):
            self._json(
                [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)}
                    for f in files
                ]
            )
        elif path.startswith("/owner/name/resolve/"):
            self._file(hub.folder / path.rsplit("/", 1)[1], path.split("/")[4])
        else:
            self.send_error(404)

    def _json(self, tree) -> None:
        data = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, file: Path, sha: str) -> None:
        data, asked = file.read_bytes(), self.headers.get("Range")
        first = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{_etag(file)}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        if file.name == WEIGHTS and self.server.cut:
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data[first:])


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(folder: Path):
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


FIND = """
import sys
from tinybert_jax.huggingface.hub import find_folder
try:
    print(find_folder(sys.argv[1]))
except ValueError as error:
    sys.exit(f"ValueError: {error}")
"""


def find(home: Path, port: int, name: str = "owner/name", **more: str):
    """`find_folder` in a process of its own, as the client reads its settings when imported."""
    given = {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "*",
    }
    return subprocess.run(
        [sys.executable, "-c", FIND, name],
        env={**os.environ, **given, **more},
        capture_output=True,
        text=True,
        cwd=home,
    )


def said(done) -> str:
    """The message of a process that ended with a ValueError and without a traceback."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.split("ValueError: ")[1]


@pytest.mark.slow  # the client waits between its attempts
def test_a_hub_that_goes_away_leaves_no_half_model(models, tmp_path):
    good = models / "classifier"
    with serving(good) as hub:
        port = hub.server_port
        hub.cut = True
        message = said(find(tmp_path, port))
        assert "'owner/name'" in message and "could not be read" in message
        assert "run the command again" in message and message.count("\n") == 1
        snapshots = list(tmp_path.rglob(f"snapshots/*/{WEIGHTS}"))
        assert not snapshots, "a part of the weights has their name"
    # Offline, with a part of the repository: not taken for the whole.
    assert "IncompleteSnapshot" in said(find(tmp_path, port, HF_HUB_OFFLINE="1"))
    with serving(good) as hub:
        done = find(tmp_path, hub.server_port)
        assert done.returncode == 0, done.stderr
        folder = Path(done.stdout.strip())
        assert {f.name: f.read_bytes() for f in folder.iterdir()} == {
            f.name: f.read_bytes() for f in good.iterdir() if f.name != "README.md"
        }
        # What was complete is not asked for again.
        files = {path.rsplit("/", 1)[1] for path in hub.asked if "/resolve/" in path}
        assert files == {WEIGHTS}
    assert find(tmp_path, port, HF_HUB_OFFLINE="1").stdout == done.stdout  # whole: needs no network


def test_a_revision_is_taken_by_its_hash(models, tmp_path):
    with serving(models / "classifier") as hub:
        hub.sha = NEWER
        newest = find(tmp_path, hub.server_port)
        pinned = find(tmp_path, hub.server_port, f"owner/name@{SHA}")
    assert newest.stdout.strip().endswith(f"snapshots/{NEWER}"), newest.stderr
    assert pinned.stdout.strip().endswith(f"snapshots/{SHA}"), pinned.stderr


def test_a_run_keeps_to_the_revision_that_it_began_with(world, monkeypatch):
    """The hub moves on between two processes of a run; the run does not."""
    cache = world.folder / "cache" / "models--owner--name"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache.parent))
    for sha in (SHA, NEWER):
        shutil.copytree(world.models / "classifier", cache / "snapshots" / sha)
    (cache / "refs").mkdir()
    path = world.config("finetune", teacher={"path": "owner/name"})
    config = config_files.load(path, [])
    for newest in (SHA, NEWER):
        (cache / "refs" / "main").write_text(newest)
        with preflight.open_run(config, (FINETUNE,)) as run:
            assert run.teacher_section.path == f"owner/name@{SHA}"
        assert json.loads((world.run_dir / "hub.json").read_text()) == {"owner/name": SHA}
    assert "@" not in (world.run_dir / "config.yaml").read_text()
