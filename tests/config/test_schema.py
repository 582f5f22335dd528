"""`tinybert schema`: the configs that we ship fit it, and mistakes do not."""

import json
from pathlib import Path

import pytest
import yaml

from tinybert_jax import cli
from tinybert_jax.config.schema import json_schema

jsonschema = pytest.importorskip("jsonschema")

CONFIGS = Path(__file__).parents[2] / "configs"


def _errors(tree, root="run"):
    schema = json_schema(root)
    jsonschema.Draft202012Validator.check_schema(schema)
    tree = json.loads(json.dumps(tree))  # keys of mappings are text, as for an editor
    return list(jsonschema.Draft202012Validator(schema).iter_errors(tree))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_our_configs_are_valid(path):
    root = "prepare" if path.parent.name == "data" else "run"
    assert _errors(yaml.safe_load(path.read_text()), root) == []


@pytest.mark.parametrize(
    "section, values, place",
    [
        ("finetune", {"learning_rat": 1e-3}, ["finetune"]),
        ("finetune", {"schedule": "lineer"}, ["finetune"]),
        ("finetune", {"warmup": 1.5}, ["finetune"]),
        ("task", {"kind": "tagging", "scheme": "iob3"}, ["task"]),
        ("task", {"text": 5}, ["task"]),
        ("tusk", {}, []),
    ],
)
def test_mistakes_are_found(section, values, place):
    tree = yaml.safe_load((CONFIGS / "own-text.yaml").read_text())
    assert _errors(tree) == []
    tree[section] = {**tree.get(section, {}), **values}
    assert [list(error.path)[:1] for error in _errors(tree)] == [place]


def test_variables_stand_for_numbers_too():
    tree = yaml.safe_load((CONFIGS / "own-text.yaml").read_text())
    assert _errors({**tree, "seed": "${SEED}"}) == [] and _errors({**tree, "seed": "many"})


def test_the_command_prints_it(capsys):
    for words, root in ((["schema"], "run"), (["schema", "prepare"], "prepare")):
        assert cli.main(words) == 0
        assert json.loads(capsys.readouterr().out) == json_schema(root)
