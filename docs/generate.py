"""Makes the pages of the reference from the config classes, the parser and the docstrings.

Sphinx needs them when it builds the manual, tests compare them with their sources. Each function
returns MyST Markdown. Imports no Sphinx.
"""

import argparse
import functools
import inspect
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

import tinybert_jax
from tinybert_jax import cli
from tinybert_jax.config.data import PrepareConfig
from tinybert_jax.config.run import RunConfig
from tinybert_jax.config.stages import STAGE_NAMES, Phase, StageSection
from tinybert_jax.config.task_kinds import AnyTask
from tinybert_jax.config.tasks import TaskSection, TextTask
from tinybert_jax.settings.sizes import PRESETS
from tinybert_jax.terms.table import AnyTerm
from tinybert_jax.terms.term import LayerTerm, Ramp, Term

Class = type[BaseModel]


# Settings


def settings() -> str:
    """Every setting of a run and of `tinybert data prepare`."""
    tasks, terms = members(AnyTask), members(AnyTerm)
    sections = {name: _sections(field)[0] for name, field in _fields(RunConfig) if _sections(field)}
    blocks = [_block("## The whole run", RunConfig, intro="The top level of the file.")]
    for name, section in sections.items():
        if name == "students":
            continue
        if name == "task":
            blocks.append(_block("## `task`", TaskSection))
            blocks.append(_block("### Columns of tables", TextTask, above=(TaskSection,)))
            for task in tasks:
                title = f"### `task.kind: {_tag(task, 'kind')}`"
                blocks.append(_block(title, task, above=(TextTask, TaskSection)))
        elif name in STAGE_NAMES:
            if name == STAGE_NAMES[0]:
                blocks.append(_block("## Every stage", StageSection, intro=_STAGES))
                blocks.append(_block("### Phases", Phase, intro=_PHASES))
            meaning = _sentence(RunConfig.model_fields[name].description or "")
            blocks.append(_block(f"## `{name}`", section, above=(StageSection,), intro=meaning))
        else:
            blocks.append(_block(f"## `{name}`", section))
        if name == "student":
            blocks.append("### Presets of sizes\n\n" + _presets())
        if name == "distillation":
            blocks.append(_block("### Every term", Term, intro=_TERMS))
            blocks.append(_block("### Terms of layers", LayerTerm, above=(Term,), intro=_LAYERS))
            for term in terms:
                title = f"### `{{term: {_tag(term, 'term')}}}`"
                blocks.append(_block(title, term, above=(LayerTerm, Term)))
            blocks.append(_block("### Numbers that change", Ramp, intro=_RAMPS))
            further = _sections(section.model_fields["further_teachers"])[0]
            blocks.append(_block("### `further_teachers`", further))
    prepare = f"## `tinybert data prepare`\n\n{_prose(PrepareConfig)}"
    blocks.append(_block(prepare, PrepareConfig, intro=""))
    return "\n\n".join(blocks) + "\n"


_STAGES = "The settings that all stages have."
_PHASES = "An entry of `phases`, of `pretrain` and `general`."
_TERMS = "An entry of the lists `general`, `intermediate` and `prediction`. All terms have:"
_LAYERS = "Terms that compare layers have in addition:"
_RAMPS = (
    "In place of a weight or a temperature: a number that goes in a straight line from the first "
    "step of the stage to the last."
)


def members(union: Any) -> list[Class]:
    """The classes of a tagged union of sections."""
    found = [part for part in _types(union) if issubclass(part, BaseModel)]
    return list(dict.fromkeys(found))


def _block(title: str, section: Class, *, above: Sequence[Class] = (), intro: str | None = None):
    """A heading, what the section is, and its settings but for those that are told `above`."""
    schema = section.model_json_schema()
    told: dict[str, Any] = {}
    for base in above:
        if issubclass(section, base):
            told = {**base.model_json_schema().get("properties", {}), **told}
    entries = [
        _entry(name, entry, name in schema.get("required", ()))
        for name, entry in schema.get("properties", {}).items()
        if "const" not in entry and entry.get("type") != "null" and told.get(name) != entry
    ]
    parts = [title, _prose(section) if intro is None else intro, *entries]
    return "\n\n".join(part for part in parts if part)


def _entry(name: str, entry: dict[str, Any], is_required: bool) -> str:
    default = "required" if is_required else f"default: {_default(entry)}"
    values = _values(entry)
    if values == "a section":
        values = f"a [section](#{name})"
    meaning = _sentence(entry.get("description", ""))
    facts = "; ".join(part for part in (values, default) if part)
    return f"`{name}`\n: {meaning} *{facts[0].upper()}{facts[1:]}.*".replace(":  *", ": *")


def _default(entry: dict[str, Any]) -> str:
    value = entry.get("default")
    if "default" not in entry or value == {} and "$ref" in entry:
        return "its defaults"
    if value is None:
        return "none"
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    if isinstance(value, dict):
        return "its defaults" if value else "empty"
    if value == []:
        return "empty"
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{text}`"


def _values(entry: dict[str, Any]) -> str:
    """The values that a setting takes, in words."""
    kinds = [_kind(part) for part in entry.get("anyOf", entry.get("oneOf", [entry]))]
    kinds = list(dict.fromkeys(kind for kind in kinds if kind))
    return ", ".join(kinds[:-1]) + (" or " if len(kinds) > 1 else "") + kinds[-1] if kinds else ""


def _kind(entry: dict[str, Any]) -> str:
    kind = entry.get("type")
    if entry.get("$ref", "").endswith("Ramp"):
        return "[`{start: …, end: …}`](#numbers-that-change)"
    if "$ref" in entry:
        return "a section"
    if "anyOf" in entry or "oneOf" in entry:
        return _values(entry)
    if "enum" in entry:
        *first, last = [f"`{value}`" for value in entry["enum"]]
        return f"{', '.join(first)} or {last}" if first else last
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(entry)
    if kind == "array":
        if "prefixItems" in entry:
            return f"pairs of {_plural(_kind(entry['prefixItems'][0]))}"
        inner = _values(entry["items"])
        return inner if inner.startswith("pairs") else f"a list of {_plural(inner)}"
    if kind == "object":
        return f"a mapping of names to {_plural(_values(entry['additionalProperties']))}"
    return {"boolean": "`true` or `false`", "string": "text"}.get(kind or "", "")


def _plural(kind: str) -> str:
    """The plural of the words of `_kind`."""
    kind = re.sub(r"^a (whole )?number", r"\1numbers", kind)
    return re.sub(r"^a section", "sections", kind)


def _range(entry: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    given = [f"{sign} {entry[key]:,}" for key, sign in signs.items() if key in entry]
    return " " + " and ".join(given).replace(".0", "") if given else ""


def _presets() -> str:
    lines = ["| preset | layers | width | inner width | heads |", "|---|---|---|---|---|"]
    for name, sizes in PRESETS.items():
        layers, width, inner, heads = sizes.values()
        lines.append(f"| `{name}` | {layers} | {width} | {inner} | {heads} |")
    return "\n".join(lines)


def _fields(section: Class) -> Iterator[tuple[str, Any]]:
    yield from section.model_fields.items()


def _sections(field: Any) -> list[Class]:
    return [part for part in _types(field.annotation) if issubclass(part, BaseModel)]


def _types(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _types(argument)


def _tag(section: Class, name: str) -> str:
    return typing.get_args(section.model_fields[name].annotation)[0]


def _prose(thing: Any) -> str:
    """A docstring as Markdown."""
    return inspect.getdoc(thing) or ""


def _sentence(text: str) -> str:
    """A meaning or help text as a sentence of Markdown; names at its start stay as they are."""
    text = re.sub(r"([*<])", r"\\\1", text.strip())
    text = text[:1].upper() + text[1:] if re.match(r"[a-z]+(?![\w:./,-])", text) else text
    return text if not text or text.endswith((".", "…")) else f"{text}."


# Commands


def commands() -> str:
    """Every command with its options, as `--help` gives them."""
    parser = cli._parser()
    blocks = [_block_of_command(*found) for found in commands_of(parser)]
    status = f"## Exit statuses\n\n{_statuses(parser.epilog or '')}"
    return "\n\n".join([*blocks, status]) + "\n"


def commands_of(
    parser: argparse.ArgumentParser, name: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(the words after `tinybert`, the parser) of every command."""
    subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not subparsers:
        yield name, parser
    for action in subparsers:
        for word, child in action.choices.items():
            yield from commands_of(child, f"{name} {word}".strip())


def arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a command but for --help."""
    return [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]


def _block_of_command(name: str, parser: argparse.ArgumentParser) -> str:
    lines = [f"## `tinybert {name}`", _sentence(parser.description or "")]
    for group in parser._action_groups:
        entries = [
            _argument(action) for action in arguments_of(parser) if action in group._group_actions
        ]
        if entries and group.title not in ("positional arguments", "options"):
            lines.append(f"**{_sentence(group.title or '')}** {_sentence(group.description or '')}")
        lines += entries
    return "\n\n".join(lines)


def _argument(action: argparse.Action) -> str:
    names = action.option_strings or [str(action.metavar or action.dest)]
    value = ""
    if action.option_strings and action.nargs != 0:
        value = " " + str(action.metavar or action.dest.upper())
    text = (action.help or "") % {**vars(action), "prog": "tinybert"}
    if action.choices and not action.metavar:
        value = value and f" {action.dest.upper()}"
        text = f"{text + '; ' if text else ''}one of {', '.join(map(str, action.choices))}"
    facts = "".join(
        word
        for word, holds in (
            (" *Required.*", action.option_strings and action.required),
            (" *May be given several times.*", isinstance(action, argparse._AppendAction)),
        )
        if holds
    )
    shown = ", ".join(f"`{one}{value}`" for one in names)
    return f"{shown}\n: {_sentence(text) or 'No more to say.'}{facts}"


def _statuses(text: str) -> str:
    return "```text\n" + text.strip() + "\n```"


# Python

_WIDTH = 80  # of a line of code in a page


def python() -> str:
    """The public classes and functions of `tinybert_jax`, from their docstrings."""
    public = {name: getattr(tinybert_jax, name) for name in tinybert_jax.__all__}
    returned = {
        kind.__name__: kind
        for kind in (
            getattr(thing, "__annotations__", {}).get("return") for thing in public.values()
        )
        if inspect.isclass(kind)
    }
    return "\n\n".join(_object(*item) for item in {**public, **returned}.items()) + "\n"


def _object(name: str, thing: Any) -> str:
    if not inspect.isclass(thing):
        return f"## `{name}`\n\n{_call(name, thing)}\n\n{_prose(thing)}"
    bases = [base.__name__ for base in thing.__bases__ if base.__name__ in tinybert_jax.__all__]
    parent = f"A subclass of `{bases[0]}`, with the same methods." if bases else ""
    methods = []
    for member, value in vars(thing).items():
        if member.startswith("_"):
            continue
        if isinstance(value, property | functools.cached_property):
            methods.append(f"### `{name}.{member}`\n\n{_prose(value)}")
        elif callable(getattr(value, "__func__", value)):
            call = _call(f"{name}.{member}", getattr(thing, member))
            methods.append(f"### `{name}.{member}`\n\n{call}\n\n{_prose(value)}")
    call = vars(thing).get("__call__")
    if call is not None:
        methods.append(f"### Calling a `{name}`\n\n{_call('model', call)}\n\n{_prose(call)}")
    return "\n\n".join(part for part in (f"## `{name}`", _prose(thing), parent, *methods) if part)


def _call(name: str, thing: Any) -> str:
    """A call with its parameters, on several lines where it is long; classes without modules."""
    signature = inspect.signature(thing)
    shown = [p for p in signature.parameters.values() if p.name not in ("self", "unused")]
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", str(signature.replace(parameters=shown)))
    if len(name + text) > _WIDTH:
        lines = [re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", str(p)) for p in shown]
        kinds = [p.kind for p in shown]
        if inspect.Parameter.KEYWORD_ONLY in kinds:
            lines.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
        text = "(\n" + "".join(f"    {line},\n" for line in lines) + text[text.rindex(")") :]
    return f"```text\n{name}{text}\n```"


PAGES = {"settings": settings, "commands": commands, "python": python}


def fill(source: str) -> str:
    """A page with its generated part in place of the mark, and of the note before it."""
    return re.sub(
        r"(?:> .*\n)*\n?<!-- generated: (\w+) -->", lambda match: PAGES[match[1]](), source
    )
