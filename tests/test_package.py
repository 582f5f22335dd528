"""The files that describe the package agree on its version, licence and author."""

import re
import tomllib
from pathlib import Path

import yaml

import tinybert_jax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## \[(\d[^]]*)\]", changelog, re.MULTILINE)[0]
    assert tinybert_jax.__version__ == PROJECT["version"] == citation["version"] == newest


def test_one_licence_and_one_author():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (author,) = PROJECT["authors"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == [author]
    for name in PROJECT["license-files"]:
        assert f"Copyright 2026 {author['name']}" in (ROOT / name).read_text(encoding="utf-8")
