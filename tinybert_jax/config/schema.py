"""The JSON schema of a config file, made from the config classes."""

from typing import Any

from pydantic import BaseModel

from tinybert_jax.config import by_rows
from tinybert_jax.config.data import PrepareConfig
from tinybert_jax.config.run import RunConfig

_ROOTS: dict[str, type[BaseModel]] = {"run": RunConfig, "prepare": PrepareConfig}
_REGRESSION = {"type": "boolean", "description": "true: an older name of kind: regression"}
_VARIABLE = {"type": "string", "pattern": r"\$\{\w+\}", "description": "an environment variable"}


def json_schema(root: str = "run") -> dict[str, Any]:
    """The schema of the file of a run, or of `data prepare`, as JSON Schema 2020-12.

    It knows every key, type, choice and range. What settings need of each other it does not know:
    a setting that a recipe may fill in is not required.
    """
    schema = _ROOTS[root].model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"Config of tinybert {'run' if root == 'run' else 'data prepare'}"
    if root == "run":
        schema["properties"]["recipe"] = {
            "enum": [by_rows.NAME, None],
            "default": None,
            "description": "by_rows: what is left out follows from the rows and the teacher",
        }
    sections = schema.get("$defs", {})
    for section in [schema, *sections.values()]:
        tags = [name for name, own in section.get("properties", {}).items() if "const" in own]
        required = [name for name in section.pop("required", ()) if name in tags]
        section |= {"required": required} if required else {}
        for name, own in section.get("properties", {}).items():
            section["properties"][name] = _with_variable(own)
    for name in _tagged(schema):
        sections[name]["required"] = [*sections[name].get("required", ()), "kind"]
    if "ClassificationTask" in sections:
        sections["ClassificationTask"]["properties"].update(regression=_REGRESSION)
    return schema


def _tagged(schema: dict[str, Any]) -> list[str]:
    """The sections of tasks that have to name their kind: all but the first."""
    found = schema["properties"].get("task", {}).get("anyOf", ())
    members = [part["$ref"] for own in found for part in own.get("oneOf", ())]
    return [reference.rsplit("/", 1)[1] for reference in members[1:]]


def _with_variable(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry of a number or of a choice, which may also be `${NAME}`."""
    if entry.get("type") not in ("integer", "number", "boolean") and "enum" not in entry:
        return entry
    told = {name: entry[name] for name in ("title", "description", "default") if name in entry}
    plain = {name: value for name, value in entry.items() if name not in told}
    return {**told, "anyOf": [plain, _VARIABLE]}
