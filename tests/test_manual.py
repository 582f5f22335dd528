"""README and manual agree with the code: settings, commands, examples, links and numbers.

Sphinx is not needed: `.ci/run` builds the manual.
"""

import functools
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from tinybert_jax import cli
from tinybert_jax.config import load as config_files
from tinybert_jax.config.data import PrepareConfig
from tinybert_jax.config.run import RunConfig

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "docs/results.md"
PAGES = [
    README,
    *sorted(set((ROOT / "docs").rglob("*.md")) - set((ROOT / "docs/_build").rglob("*"))),
]
_FENCE = re.compile(r"^```(\w*).*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The config that the YAML of a page is a part of.
_CONFIGS = {"pretraining.md": "configs/pretrain/english-gpu.yaml"}


def _load_generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _load_generator()


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def _read(path: Path) -> str:
    return generate.fill(path.read_text(encoding="utf-8"))


def _blocks(text: str) -> dict[str, str]:
    """The text under each heading, by the words of the heading."""
    parts = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _shown(path: Path, language: str) -> list[str]:
    return [body for kind, body in _FENCE.findall(path.read_text("utf-8")) if kind == language]


def _commands(path: Path) -> list[list[str]]:
    """The words of every `tinybert …` of the shell examples of a page."""
    lines = "\n".join(_shown(path, "bash")).replace("\\\n", " ").replace("&&", "\n").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if "tinybert " in line]
    starts = [next((i for i, w in enumerate(ws) if w.endswith("tinybert")), None) for ws in found]
    return [ws[i + 1 :] for ws, i in zip(found, starts, strict=True) if i is not None]


# Reference


def _schemas() -> dict[str, dict]:
    """The schema of every section by the name of its class, as pydantic makes it."""
    found = {}
    for root in (RunConfig, PrepareConfig):
        schema = root.model_json_schema()
        found |= {root.__name__: schema, **schema.get("$defs", {})}
    return found


def _headings() -> dict[str, str]:
    """The heading in the reference of every section, by the name of its class."""
    found = {
        "RunConfig": "The whole run",
        "PrepareConfig": "`tinybert data prepare`",
        "Phase": "Phases",
        "Ramp": "Numbers that change",
        "PositiveRamp": "Numbers that change",
        "FurtherTeacherSection": "`further_teachers`",
    }
    for name, field in RunConfig.model_fields.items():
        for section in re.findall(r"\w+Section", str(field.annotation)):
            found.setdefault(section, f"`{name}`")
    for name, schema in _schemas().items():
        for key, entry in schema["properties"].items():
            if "const" in entry:
                is_task, value = key == "kind", entry["const"]
                found[name] = f"`task.kind: {value}`" if is_task else f"`{{term: {value}}}`"
    return found


def test_every_setting_has_a_meaning_and_is_in_the_reference():
    blocks, headings = _blocks(generate.settings()), _headings()
    shared = ("Every stage", "Every term", "Terms of layers", "`task`", "Columns of tables")
    common = "".join(blocks[heading] for heading in shared)
    for name, schema in _schemas().items():
        for key, entry in schema["properties"].items():
            if "const" in entry or entry.get("type") == "null":  # nothing to choose
                continue
            assert f"`{key}`\n: " in blocks[headings[name]] + common, f"{name}.{key}"
            assert entry.get("description") or "$ref" in str(entry), f"{name}.{key}"


def test_every_command_is_in_the_reference():
    blocks = _blocks(generate.commands())
    for name, parser in generate.commands_of(cli._parser()):
        block = blocks[f"`tinybert {name}`"]
        for option in re.findall(r"(?<![\w-])--[\w-]+", parser.format_usage()):
            assert f"`{option}" in block, f"{name} {option}"
        assert all(action.help for action in generate.arguments_of(parser)), name
    assert "75" in blocks["Exit statuses"]


def test_every_public_name_is_in_the_reference():
    import tinybert_jax

    found = re.findall(r"^## `(\w+)`$", generate.python(), re.MULTILINE)
    assert set(tinybert_jax.__all__) <= set(found)


def test_every_extra_is_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = (ROOT / "docs/start/quickstart.md").read_text(encoding="utf-8")
    assert [name for name in project["optional-dependencies"] if f"`{name}`" not in table] == []


# Examples


@pytest.fixture
def variables(monkeypatch):
    for name in ("TEACHER", "TEXT", "TINYBERT_DATA", "TOKENIZER"):
        monkeypatch.setenv(name, f"/{name.lower()}")


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_commands_are_understood(path, variables, monkeypatch):
    """Every example parses, and the settings of a config that is ours are valid."""
    monkeypatch.chdir(ROOT)
    for words in _commands(path):
        arguments = cli._parse(words)
        config = getattr(arguments, "config", None)
        if arguments.command == "data" and config:
            config_files.load_as(PrepareConfig, config, arguments.overrides)
        elif config and config.startswith("configs/"):
            config_files.load(config, arguments.overrides)
        elif getattr(arguments, "data", None) is None:
            assert config is None, f"{words}: {config} is not in configs/"


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_yaml_is_valid(path, variables):
    config = yaml.safe_load(
        (ROOT / _CONFIGS.get(path.name, "configs/distill/sst2.yaml")).read_text()
    )
    for text in _shown(path, "yaml"):
        config_files.validate(RunConfig, {**config, **yaml.safe_load(text)}, _name(path))


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_commands_that_prose_names_exist(path):
    known = {name.split()[0] for name, _ in generate.commands_of(cli._parser())}
    named = set(re.findall(r"`tinybert ([a-z]+)", path.read_text(encoding="utf-8")))
    assert named <= known


# Links


def _slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_links_resolve(path):
    text = re.sub(_FENCE, "", _read(path))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^]]+\]:\s*(\S+)", text, re.M)
    for target in targets:
        if target.startswith("https://"):
            continue
        place, _, anchor = target.partition("#")
        linked = (path.parent / place).resolve() if place else path
        assert linked.exists(), target
        if anchor:
            assert anchor in {_slug(heading) for heading in _blocks(_read(linked))}, target


# README


def test_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 1100
    assert max(len(line) for line in text.splitlines()) <= 110


def test_numbers_of_the_readme_are_results():
    found = re.findall(r"\d\.\d{2,4}", README.read_text(encoding="utf-8"))
    numbers = [number for number in found if number not in ("3.11",)]
    results = RESULTS.read_text(encoding="utf-8")
    assert numbers
    assert [number for number in numbers if number not in results] == []
