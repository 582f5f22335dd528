"""Loads a config from a YAML file and `key.path=value` overrides; reports all errors together."""

import contextlib
import datetime
import difflib
import os
import re
import shlex
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.composer import ComposerError

from tinybert_jax.config import by_rows
from tinybert_jax.config.run import RunConfig

Root = TypeVar("Root", bound=BaseModel)
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_TABLES = (".csv", ".tsv", ".jsonl")
_BOOLEAN = "tag:yaml.org,2002:bool"


class ConfigError(ValueError):
    """All errors of a config, one per line, each with its dotted path."""


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    measure: Callable[[RunConfig], by_rows.Facts | None] = lambda draft: None,
    say: Callable[[str], None] = lambda line: None,
) -> RunConfig:
    """The config of a run; see `load_as`.

    A config with `recipe: by_rows` is filled in with settings for the facts that `measure` finds
    in the text and the teacher, and `say` is told a line for each choice. Without facts (None) they
    are those of a typical text, and `say` is told that alone.
    """
    return complete(_load_tree(Path(path), overrides), path, measure, say)


def complete(
    tree: dict[str, Any],
    origin: str | Path,
    measure: Callable[[RunConfig], by_rows.Facts | None],
    say: Callable[[str], None],
) -> RunConfig:
    """The config of a run from its tree; see `load`. Errors begin with `origin`."""
    recipe = tree.get("recipe")
    if recipe is None:
        tree.pop("recipe", None)
        return validate(RunConfig, tree, origin)
    if recipe != by_rows.NAME:
        raise ConfigError(f"{origin}: recipe: expected '{by_rows.NAME}' or none, got {recipe!r}")
    draft = validate(RunConfig, _filled(tree, by_rows.TYPICAL, origin)[0], origin)
    facts = measure(draft)
    filled, lines = _filled(tree, facts or by_rows.TYPICAL, origin)
    if facts is None:
        num_rows = by_rows.TYPICAL.num_labelled
        lines = [f"text or teacher not read: lengths and rates are those of {num_rows:,} rows"]
    for line in lines:
        say(f"recipe: {line}")
    return validate(RunConfig, filled, origin)


def _filled(
    tree: dict[str, Any], facts: by_rows.Facts, origin: str | Path
) -> tuple[dict[str, Any], list[str]]:
    try:
        return by_rows.fill(tree, facts)
    except ValueError as error:
        raise ConfigError(f"{origin}: 1 error\n  {error}") from None


def load_as(root: type[Root], path: str | Path, overrides: Sequence[str] = ()) -> Root:
    """Reads a YAML file, applies `key.path=value` overrides and validates the result as a `root`.

    Values of overrides are YAML (`seed=1`, `general=null`, `task.labels=[neg,pos]`). `${NAME}` in a
    string is replaced by the environment variable. Raises `ConfigError` with all errors.
    """
    return validate(root, _load_tree(Path(path), overrides), path)


def _load_tree(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    if path.suffix.lower() in _TABLES:
        fix = f"to train on it, tinybert run --data {shlex.quote(str(path))}"
        raise ConfigError(f"{path}: expected a YAML config file, got a table; {fix}")
    if not path.is_file():
        raise ConfigError(f"{path}: expected a YAML config file, found none{_nearest_file(path)}")
    return with_overrides(_read(path), overrides, path)


def variables(path: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """Names of the environment variables that a config file, with its overrides, refers to."""
    tree = _read(Path(path)) if Path(path).is_file() else {}
    for override in overrides:
        _apply_override(tree, override)
    found = [name for _, text in _texts(tree) for name in _VARIABLE.findall(text)]
    return list(dict.fromkeys(found))


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The tree of `key.path=value` settings alone; raises `ConfigError`."""
    return with_overrides({}, overrides, "command line")


def with_overrides(
    tree: dict[str, Any], overrides: Sequence[str], origin: str | Path
) -> dict[str, Any]:
    """The tree after the overrides, with the values of environment variables."""
    for override in overrides:
        _apply_override(tree, override)
    unset = list(_unset_variables(tree))
    if unset:
        raise ConfigError("\n".join([_error_count(origin, unset), *unset]))
    return _expand_variables(tree)


def validate(root: type[Root], tree: dict[str, Any], origin: str | Path) -> Root:
    """`tree` as a `root`; raises `ConfigError` with all errors, which begins with `origin`."""
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        errors: dict[str, list[str]] = {}  # by place; a union has an error per member
        for item in error.errors():
            place, text = _explain(item, root)
            errors.setdefault(place and f"{place}: ", []).append(text)
        # A validator may report several errors, one per line.
        joined = {place: " or ".join(dict.fromkeys(texts)) for place, texts in errors.items()}
        lines = [f"  {place}{line}" for place, text in joined.items() for line in text.splitlines()]
        raise ConfigError("\n".join([_error_count(origin, lines), *lines])) from None


def dump(config: BaseModel) -> str:
    """The config as YAML with all defaults; loading it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_setting(path: Path, dotted: str) -> Any:
    """The setting with this dotted path in a file that `dump` wrote; None where it has none."""
    return dict(_leaves(_read(path))).get(dotted)


def differences(path: Path, config: BaseModel, ignored: Sequence[str] = ()) -> list[str]:
    """The settings that differ between a file that `dump` wrote and `config`, as lines of text.

    `ignored`: dotted paths that may differ. A setting that did not exist when the file was written
    counts as its default there.
    """
    tree = _read(path)
    with contextlib.suppress(ValidationError):  # an invalid file is compared as it is
        tree = type(config).model_validate(tree).model_dump(mode="json")
    before, now = dict(_leaves(tree)), dict(_leaves(config.model_dump(mode="json")))
    changes = [
        f"{dotted}: {before.get(dotted)!r} there, {now.get(dotted)!r} here"
        for dotted in dict.fromkeys([*now, *before])
        if before.get(dotted) != now.get(dotted) and dotted not in ignored
    ]
    first, second = ([name for name in leaves if "labels." in name] for leaves in (before, now))
    if first != second and not changes:  # the order of labels decides their ids
        changes = [f"task.labels: in the order {first} there, {second} here"]
    return changes


class _Loader(yaml.SafeLoader):
    """A YAML loader that raises for a repeated key; PyYAML would silently keep the last value.

    Booleans are only true and false, as in YAML 1.2, because yes, no, on and off can be labels.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"found the key '{key.value}' twice in one section"
                raise ComposerError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return node


_Loader.add_implicit_resolver(
    _BOOLEAN, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, a 13th month
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected a mapping of sections at the top level, got {type(tree).__name__}; "
            "see configs/own-text.yaml"
        )
    return tree


def _leaves(node: Any, dotted: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict):
        yield dotted, node
        return
    for key, child in node.items():
        yield from _leaves(child, f"{dotted}.{key}".lstrip("."))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override '{override}': expected key.path=value, as in task.text=body")
    try:
        value = _value(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override '{override}': value is not valid YAML: {error}; text goes in quotes, as in "
            f"{in_quotes(dotted, text)}"
        ) from error
    node = tree
    for key in keys[:-1]:
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise ConfigError(
                f"override '{override}': expected a section at '{key}', got the value {child!r}; "
                "override the whole section, as in student='{{preset: bert-tiny}}'"
            )
        node = child
    node[keys[-1]] = value


def _value(text: str) -> Any:
    """The value of an override. A `#` begins no comment there: such text is taken as it is."""
    if _COMMENT.search(text) and not text.lstrip().startswith(('"', "'", "[", "{")):
        return text.strip()
    return yaml.load(text, _Loader) if text else None


_COMMENT = re.compile(r"(?:^|\s)#")


def in_quotes(dotted: str, text: Any) -> str:
    """What to type so that YAML reads the value of an override as text."""
    doubled = str(text).replace("'", "''")  # a quote inside quotes, in YAML
    setting = f"{dotted}='{doubled}'"
    return shlex.quote(setting) if re.search(r'["$`\\!]', setting) else f'"{setting}"'


def _unset_variables(tree: dict[str, Any]) -> Iterator[str]:
    for dotted, text in _texts(tree):
        for name in _VARIABLE.findall(text):
            if name not in os.environ:
                yield (
                    f"  {dotted}: '{text}' names the environment variable {name}, which is "
                    f"not set; set it (export {name}=…) or override the value ({dotted}=…)"
                )


def _texts(node: Any, dotted: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, string) of every string; a string in a list has the path of the list."""
    for place, leaf in _leaves(node, dotted):
        if isinstance(leaf, list):
            for child in leaf:
                yield from _texts(child, place)
        elif isinstance(leaf, str):
            yield place, leaf


def _expand_variables(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _expand_variables(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_expand_variables(value) for value in node]
    if not isinstance(node, str):
        return node
    return _VARIABLE.sub(lambda match: os.environ[match[1]], node)


def _error_count(origin: str | Path, lines: Sequence[str]) -> str:
    return f"{origin}: {len(lines)} {'error' if len(lines) == 1 else 'errors'}"


def _explain(item: Any, root: type[BaseModel]) -> tuple[str, str]:
    """(dotted path, message) of one pydantic error, with the nearest valid name."""
    location, sections = _config_location(root, item["loc"], item["type"] == "extra_forbidden")
    dotted = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        known = list(sections[0].model_fields) if sections else []
        return dotted, f"unknown key{_nearest(str(location[-1]), known)}"
    if item["type"] == "union_tag_invalid":
        tag, name = item["ctx"]["tag"], item["ctx"]["discriminator"].strip("'")
        known = re.findall(r"'([^']+)'", item["ctx"]["expected_tags"])
        return f"{dotted}.{name}", f"unknown {name} '{tag}'{_nearest(tag, known)}"
    if item["type"] == "union_tag_not_found":
        name = item["ctx"]["discriminator"].strip("'")
        return dotted, f"expected the key '{name}', got {item['input']!r}"
    if item["type"] == "missing":
        return dotted, "expected a value, got none"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return dotted, message
    got = item.get("input")
    if item["type"] == "string_type":
        is_whole = isinstance(got, int | float | datetime.date)
        setting = in_quotes(dotted, got if is_whole else "…")
        return dotted, f"expected text, got {got!r}; text goes in quotes, as in {setting}"
    if item["type"] in ("tuple_type", "list_type"):
        return dotted, f"expected a list, got {got!r}; write it as [{got}]"
    if item["type"] == "dict_type":
        return dotted, f"expected a mapping, got {got!r}; write it as {{name: value}}"
    nearest = ""
    if item["type"] == "literal_error":
        nearest = _nearest(str(got), re.findall(r"'([^']+)'", message), list_all=False)
    return dotted, f"{message}, got {got!r}{nearest}"


def _config_location(
    root: type[BaseModel], location: Sequence[Any], ends_in_unknown: bool
) -> tuple[list[Any], list[type[BaseModel]]]:
    """(keys of the config in a pydantic location, the section types that may be at its end).

    A pydantic location also names members of unions, which are no keys of the config.
    """
    sections, keys, is_free = [root], [], False
    for place, part in enumerate(location):
        fields = [
            section.model_fields[part] for section in sections if part in section.model_fields
        ]
        tagged = [section for section in sections if part in _tags(section)]
        is_unknown = ends_in_unknown and place == len(location) - 1
        if fields:
            keys.append(part)
            sections = list(_section_types(fields[0].annotation))
            is_free = "dict" in str(fields[0].annotation)
        elif tagged and not is_unknown:
            sections = tagged
        elif isinstance(part, int) or is_free or is_unknown:
            keys.append(part)
    return keys, sections


def _tags(section: type[BaseModel]) -> Iterator[str]:
    """The values that a tagged union may use to name this section."""
    for field in section.model_fields.values():
        if typing.get_origin(field.annotation) is typing.Literal:
            yield from typing.get_args(field.annotation)[:1]


_NESTING = (typing.Union, types.UnionType, tuple, dict, typing.Annotated)


def _section_types(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in _NESTING:
        for argument in typing.get_args(annotation):
            yield from _section_types(argument)


def _nearest(name: str, known: Sequence[str], list_all: bool = True) -> str:
    longer = [key for key in known if _has_words(key, name)]  # as num_hidden_layers of num_layers
    match = difflib.get_close_matches(name, longer or known, n=1, cutoff=0.0 if longer else 0.5)
    if match:
        return f"; did you mean '{match[0]}'?"
    return f"; known here: {', '.join(known)}" if list_all else ""


def _has_words(key: str, name: str) -> bool:
    """Whether all words of a name of several are in the key, in their order."""
    words, rest = name.split("_"), iter(key.split("_"))
    return len(words) > 1 and all(word in rest for word in words)


def _nearest_file(path: Path) -> str:
    siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    match = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    return f"; did you mean '{path.parent / match[0]}'?" if match else ""
