"""The settings, packages and machines in which runs differ, as tables.

Takes parsed config.yaml and env.json of each run and returns escaped HTML. Reads no file.
"""

import html
import json
from collections.abc import Iterator, Sequence
from typing import Any

from tinybert_jax.report.tables import MISSING

_PLACES = frozenset({"name", "run_dir", "run_store"})  # settings that say where a run is
_TIMES = frozenset({"started", "earlier"})  # of env.json
_ABSENT = object()


def settings_table(names: Sequence[str], configs: Sequence[Any]) -> str:
    """A row for each setting that is not the same in all runs; empty where all are."""
    return _table("Setting", names, differences(configs, _PLACES))


def environment_table(names: Sequence[str], environments: Sequence[dict[str, Any]]) -> str:
    """A row for each package or part of the machine that is not the same in all runs."""
    return _table("Packages and machine", names, differences(environments, _TIMES))


def differences(
    trees: Sequence[Any], left_out: frozenset[str] = frozenset(), path: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """(dotted path, the value in each tree as text) wherever the trees differ.

    A section that one tree lacks is one row. `left_out`: keys of the top level.
    """
    if all(isinstance(tree, dict) for tree in trees):
        keys = dict.fromkeys(key for tree in trees for key in tree if key not in left_out)
        parts = [(str(key), [tree.get(key, _ABSENT) for tree in trees]) for key in keys]
    elif _have_equal_parts(trees):
        parts = [(str(number), list(own)) for number, own in enumerate(zip(*trees, strict=True))]
    else:
        shown = [_shown(tree) for tree in trees]
        if len(set(shown)) > 1:
            yield path, shown
        return
    for key, values in parts:
        yield from differences(values, path=f"{path}.{key}" if path else key)


def _have_equal_parts(trees: Sequence[Any]) -> bool:
    """Whether all are lists of sections, of one length, as the terms of a stage."""
    if not all(isinstance(tree, list) for tree in trees):
        return False
    is_sections = all(isinstance(part, dict) for tree in trees for part in tree)
    return is_sections and len({len(tree) for tree in trees}) == 1


def _shown(value: Any) -> str:
    if value is _ABSENT or value is None:
        return MISSING
    if isinstance(value, dict):
        return "given"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _table(title: str, names: Sequence[str], rows: Iterator[tuple[str, list[str]]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{html.escape(path)}</th>'
        + "".join(f"<td>{html.escape(value)}</td>" for value in values)
        + "</tr>"
        for path, values in rows
    )
    if not body:
        return ""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in (title, *names))
    return (
        f'<div class="scroll"><table class="pairs"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
