"""Model folders of people who mean harm: refused by every loader, with one message; nothing runs.

`hostile.CASES` says how each folder is spoiled. Four CVEs and their relatives are among them.
"""

import builtins
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bad_world import STAGE, STUDENT, TEXTS, World
from hostile import CANARY, CASES, CONFIG, TOKENIZER, Case, both, content, pickled, settings

from tinybert_jax import cli
from tinybert_jax.config import load as config_files
from tinybert_jax.config.stages import INTERMEDIATE, PREDICTION
from tinybert_jax.huggingface import rewrite
from tinybert_jax.huggingface.folder import read_model
from tinybert_jax.huggingface.hub import find_folder, load_tokenizer
from tinybert_jax.inference import predict
from tinybert_jax.inference.pretrained import TinyBertForSequenceClassification
from tinybert_jax.runs import preflight


@pytest.fixture(scope="module")
def place(tmp_path_factory, models):
    """(a good folder, rows, config of a distillation): what all cases begin with."""
    folder = tmp_path_factory.mktemp("hostile")
    world = World(folder, models, None)
    config = world.distil(student=dict(STUDENT), intermediate=dict(STAGE))
    return models / "classifier", world.dev, config_files.load(config, [])


@pytest.fixture
def no_question(monkeypatch):
    """A question on the terminal would be answered by "y" and then fail the test."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *words: asked.append(words) or "y")
    yield
    assert not asked


def loaders(folder: Path, rows: str, config):
    """Name of a command -> what it calls to load the model; `distill` as `--dry-run` does."""

    def distill():
        teacher = config.teacher.model_copy(update={"path": str(folder)})
        preflight.read_run(
            config.model_copy(update={"teacher": teacher}), (INTERMEDIATE, PREDICTION)
        )

    return {
        "convert": lambda: rewrite.convert(folder, folder.parent / "target"),
        "predict": lambda: predict.predict(str(folder), TEXTS[:1]),
        "evaluate": lambda: predict.evaluate_file(str(folder), rows),
        "distill": distill,
        "from_pretrained": lambda: TinyBertForSequenceClassification.from_pretrained(folder),
    }


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_hostile_folder_is_refused(case: Case, place, tmp_path, no_question):
    good, rows, config = place
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    case.spoil(folder)
    before = files(tmp_path)
    for name, load in loaders(folder, rows, config).items():
        if case.is_harmless and name != "convert":
            continue
        with pytest.raises(ValueError) as caught:
            load()
        message = str(caught.value)
        assert all(word in message for word in case.naming), f"{name}: {message}"
        assert "expected" in message and len(message) < 2000, f"{name}: {message}"
        assert "\x1b" not in message
    if case.is_harmless:
        read_model(folder), load_tokenizer(folder)
    assert not (tmp_path / CANARY).exists()
    assert files(tmp_path) == before  # nothing was written


def files(folder: Path) -> dict[Path, bytes | int]:
    """Every file with its bytes, or its size where it is large or no plain file."""
    found = {}
    for path in folder.rglob("*"):
        size = path.lstat().st_size
        found[path] = path.read_bytes() if path.is_file() and size < 1 << 24 else size
    return found


def test_there_are_enough_cases():
    assert len(CASES) >= 120 and len({case.name for case in CASES}) == len(CASES)


def test_each_payload_would_leave_its_canary(tmp_path):
    """Otherwise a missing canary would show nothing."""
    pickle.loads(pickled(tmp_path / "model")).close()
    assert (tmp_path / CANARY).exists()


def test_keys_are_read_before_the_weights(models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models / "classifier", folder)
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_bytes(b"")
    named("tokenizer auto_map").spoil(folder)
    with pytest.raises(ValueError, match="auto_map"):
        read_model(folder)


# The commands as a whole


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("name", ["tokenizer auto_map", "header: F4", "weights: NaN"])
def test_the_commands_say_one_sentence(name, world):
    case, folder = named(name), world.model("classifier")
    case.spoil(folder)
    for command in (
        ["convert", str(folder), str(world.folder / "target")],
        ["predict", str(folder), "-t", "a film"],
        ["evaluate", str(folder), world.dev],
        ["distill", world.distil(teacher={"path": str(folder)})],
        ["data", "extend", str(folder), world.train, "-o", str(world.folder / "target")],
    ):
        assert world.fails(*command, naming=case.naming).count("\n") == 1


def test_the_answer_yes_is_never_asked_for(tmp_path, models):
    folder = tmp_path / "model"
    shutil.copytree(models / "classifier", folder)
    named("tokenizer auto_map").spoil(folder)
    done = subprocess.run(
        [sys.executable, "-m", "tinybert_jax", "predict", str(folder), "-t", "a film"],
        input="y\n" * 9,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("tinybert: ") and "auto_map" in done.stderr
    assert "[y/N]" not in done.stderr and not (tmp_path / CANARY).exists()


def test_a_name_cannot_command_the_terminal(capfd):
    assert cli.main(["predict", "a/b/\x1b]0;evil\x07", "-t", "a film"]) == 2
    assert "a/b/\\x1b]0;evil\\x07: expected" in capfd.readouterr().err


def test_files_that_are_never_opened_do_no_harm(world):
    folder = world.model("classifier")
    for case in CASES:
        if case.is_harmless:
            case.spoil(folder)
    assert cli.main(["predict", str(folder), "-t", "a film"]) == 0
    assert not (world.folder / CANARY).exists()


def test_nothing_that_could_run_is_copied(world):
    """Keys that no tokenizer depends on are neither followed nor written."""
    folder, target = world.model("classifier"), world.folder / "target"
    template = "{{ ''.__class__.__mro__ }}"
    evil = {"chat_template": template, "init_inputs": ["/etc/passwd"], "evil": "evil"}
    both(
        settings(TOKENIZER, **evil),
        settings(CONFIG, evil="evil", custom_pipelines={}, trust_remote_code=False),
        settings("special_tokens_map.json", vocab="/etc/passwd", **evil),
        content("chat_template.jinja", template),
        content("chat_templates/evil.jinja", template),
    )(folder)
    assert cli.main(["convert", str(folder), str(target)]) == 0
    assert sorted(p.name for p in target.iterdir()) == sorted(
        p.name for p in (world.models / "classifier").iterdir()
    )
    for file in target.glob("*.json"):
        text = file.read_text()
        assert not any(word in text for word in ("evil", "__class__", "passwd", "remote", "pipe"))
    assert load_tokenizer(target).get_vocab() == load_tokenizer(folder).get_vocab()


def test_the_cache_of_the_hub_may_use_links(tmp_path, models):
    cache = tmp_path / "models--owner--name"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in (models / "classifier").iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert read_model(snapshot).config == read_model(models / "classifier").config
    assert len(load_tokenizer(snapshot)) == len(load_tokenizer(models / "classifier"))
    rewrite.convert(snapshot, tmp_path / "target")
    (snapshot / "decoder_tokenizer").mkdir()
    for file in (models / "classifier").glob("token*"):
        link = snapshot / "decoder_tokenizer" / file.name
        link.symlink_to(Path("../../../blobs") / file.name)
    assert len(load_tokenizer(snapshot / "decoder_tokenizer")) == len(load_tokenizer(snapshot))
    (snapshot / "vocab.txt").symlink_to("../../../vocab.txt")
    (tmp_path / "vocab.txt").write_text("[PAD]")
    with pytest.raises(ValueError, match="vocab.txt.*outside of the folder"):
        read_model(snapshot)


@pytest.mark.parametrize(
    "path",
    [
        "models/gone",
        "gone.safetensors",
        "a/../b",
        "./gone",
        "-gone",
        "a b",
        "owner/name@main",
        "a/b/c",
        "~/gone",
    ],
)
def test_a_local_path_is_never_asked_of_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match="found none; check the path"):
        find_folder(path)
    for name in ("owner/name", "mail-model"):
        told = f"there is no folder '{name}' here, and the hub huggingface.co cannot be reached"
        with pytest.raises(ValueError, match=told):
            find_folder(name)
