"""`tinybert push` against a stand-in of the hub on this machine, with the real client."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import jax
import pytest
from tiny_inputs import TEACHER, write_inputs

from tinybert_jax import cli
from tinybert_jax.huggingface.folder import save_model
from tinybert_jax.models.heads import make_encoder

OID = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/name"


class Hub(http.server.ThreadingHTTPServer):
    """One repository; `files`: None while there is none, else what the last commit left."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, bytes] | None = None
        self.is_private, self.token, self.objects = True, "hf_test", {}
        self.created: list[dict] = []
        self.commits: list[list[dict]] = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server
        assert self.path.split("?")[0] == f"/api/models/{NAME}"
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._json({"error": "Invalid username or password."}, 401)
        if hub.files is None:
            return self._json({"error": "Repository not found"}, 404, "RepoNotFound")
        siblings = [{"rfilename": path} for path in hub.files]
        self._json({"id": NAME, "private": hub.is_private, "sha": OID, "siblings": siblings})

    def do_PUT(self) -> None:
        self.server.objects[self.path.rsplit("/", 1)[1]] = self._body()
        self._json({})

    def do_POST(self) -> None:
        hub, body, path = self.server, self._body(), self.path.split("?")[0]
        if path == "/api/repos/create":
            hub.created.append(json.loads(body))
            hub.files = {".gitattributes": b""}
            self._json({"url": f"{hub.url}/{NAME}", "id": NAME})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == f"/api/models/{NAME}/preupload/main":
            files = json.loads(body)["files"]
            kinds = {f["path"]: "lfs" if "safetensors" in f["path"] else "regular" for f in files}
            told = [{"path": p, "uploadMode": k, "shouldIgnore": False} for p, k in kinds.items()]
            self._json({"files": told})
        elif path == f"/{NAME}.git/info/lfs/objects/batch":
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        else:
            assert path == f"/api/models/{NAME}/commit/main", path
            self._commit([json.loads(line) for line in body.splitlines()])

    def _commit(self, lines):
        hub = self.server
        hub.commits.append(lines)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del hub.files[value["path"]]
        self._json({"commitUrl": f"{hub.url}/{NAME}/commit/{OID}", "commitOid": OID})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, tree, status=200, code="") -> None:
        data = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    with contextlib.closing(server.socket):
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("push")
    _, config, tokenizer = write_inputs(root, **TEACHER)
    params = make_encoder(config)[1](jax.random.key(0))
    save_model(root / "hf", params, config, tokenizer)
    (root / "hf/README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (root / "hf/1_Pooling").mkdir()
    (root / "hf/1_Pooling/config.json").write_text("{}")
    (root / "hf/notes.log").write_text("not for others")
    return root / "hf"


def _push(hub, folder, *options, token="hf_test"):
    """The command in a process of its own, as the client reads its settings when imported."""
    given = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder.parent / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": token,
        "NO_PROXY": "*",
    }
    return subprocess.run(
        [sys.executable, "-m", "tinybert_jax", "push", str(folder), NAME, *options],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        timeout=120,
    )


def _sent(folder):
    files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
    return {path: file.read_bytes() for path, file in files.items() if path != "notes.log"}


def test_a_folder_becomes_one_commit_in_a_private_repository(hub, folder):
    done = _push(hub, folder, "-m", "First")
    assert done.returncode == 0, done.stderr
    assert f"/{NAME}/commit/{OID}" in done.stdout and "left out: notes.log" in done.stdout
    (made,) = hub.created
    assert made["name"] == "name"
    assert made.get("visibility") == "private" or made["private"]  # by version of the client
    (commit,) = hub.commits
    assert commit[0]["value"]["summary"] == "First"
    del hub.files[".gitattributes"]
    assert hub.files == _sent(folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert list(hub.objects) == [digest]


def test_a_later_commit_removes_weights_of_other_names(hub, folder):
    hub.files = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b""}
    hub.files["eval.txt"] = b"of the owner"
    done = _push(hub, folder)
    assert done.returncode == 0, done.stderr
    assert hub.created == [] and len(hub.commits) == 1
    assert hub.files == {**_sent(folder), "eval.txt": b"of the owner"}
    assert "model-00001-of-00002.safetensors, model.safetensors.index.json removed" in done.stdout


def test_a_public_repository_needs_the_option(hub, folder):
    hub.files, hub.is_private = {}, False
    done = _push(hub, folder)
    assert done.returncode == 2 and hub.commits == []
    assert "expected a private repository, got a public one" in done.stderr
    assert _push(hub, folder, "--public").returncode == 0 and len(hub.commits) == 1


def test_a_dry_run_asks_no_network(folder, capsys):
    assert cli.main(["push", str(folder), NAME, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "one commit to the private repository owner/name" in shown
    assert "model.safetensors" in shown and "left out: notes.log" in shown


def test_a_dry_run_shows_the_license(folder, capsys, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    for card, line in (
        ("---\nlicense: apache-2.0\n---\n", "license: apache-2.0, by README.md; check that it"),
        ("# A model", "license: none that README.md names"),
    ):
        (copy / "README.md").write_text(card)
        assert cli.main(["push", str(copy), NAME, "--dry-run"]) == 0
        assert line in capsys.readouterr().out


def test_what_the_hub_refuses_is_one_line(hub, folder):
    done = _push(hub, folder, token="hf_other")
    assert done.returncode == 2 and hub.created == hub.commits == []
    assert "hf auth login" in done.stderr and len(done.stderr.splitlines()) == 1
    hub.shutdown()
    hub.server_close()
    done = _push(hub, folder)
    assert done.returncode == 2 and "check the network" in done.stderr


@pytest.mark.parametrize("name", ["name", "a/b/c", "-a/b", "a/..", "own er/x"])
def test_a_wrong_name_is_refused(folder, name, capsys):
    assert cli.main(["push", str(folder), "--", name]) == 2
    assert "expected a repository as owner/name" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(folder, tmp_path, capsys):
    (tmp_path / "small").mkdir()
    (tmp_path / "small/config.json").write_text("{}")
    assert cli.main(["push", str(tmp_path), NAME]) == 2
    error = capsys.readouterr().err
    assert "expected a model folder" in error and "folders in it: small; push one" in error
    (tmp_path / "linked").symlink_to(folder.parent)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    assert cli.main(["push", str(tmp_path), NAME, "--dry-run"]) == 2
