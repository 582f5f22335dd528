"""The end of a report: the command, the machine and the packages, and the configuration of a run.

Takes the parsed files of the run folder and returns escaped HTML.
"""

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinybert_jax.report.figures import note
from tinybert_jax.report.run_files import read_text

_EARLIER = "earlier"  # of env.json: the environments of the processes before the last one
_NUM_EARLIER = 10  # of them are shown
_NOTHING = (None, "", "none", [], {})
_NAMES = {"num_devices": "devices", "num_processes": "processes"}


def provenance(run_dir: Path, results: dict[str, Any], environment: dict[str, Any]) -> str:
    """The section, with a note for each file that is missing."""
    commands = results.get("commands")
    lines = "\n".join(str(c) for c in commands) if isinstance(commands, list) else ""
    parts = [f"<pre>{html.escape(lines)}</pre>" if lines else note("No command was recorded.")]
    if environment:
        rows = "".join(
            f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(text)}</td></tr>'
            for name, text in _facts(environment)
        )
        parts.append(f'<table class="env"><tbody>{rows}</tbody></table>')
    else:
        parts.append(note("No environment: env.json is missing or unreadable."))
    config = read_text(run_dir / "config.yaml")
    if config:
        summary = "Resolved configuration (config.yaml)"
        parts.append(
            f"<details><summary>{summary}</summary><pre>{html.escape(config)}</pre></details>"
        )
    else:
        parts.append(note("No configuration: config.yaml is missing or unreadable."))
    return "".join(parts)


def _facts(environment: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of each entry that says something."""
    for key, value in environment.items():
        if key != _EARLIER and value not in _NOTHING:
            yield _name(key), _shown(value)
    earlier = environment.get(_EARLIER)
    starts = [own for own in earlier if isinstance(own, dict)] if isinstance(earlier, list) else []
    if starts:
        shown = [_start(own, environment) for own in starts[-_NUM_EARLIER:]]
        if len(starts) > len(shown):
            shown.insert(0, f"{len(starts) - len(shown):,} more")
        yield "started before", "; ".join(shown)


def _start(earlier: dict[str, Any], environment: dict[str, Any]) -> str:
    """When an earlier process of the run started, and in what it differed from the last one."""
    others = [
        f"{_name(key)} {_shown(value)}"
        for key, value in earlier.items()
        if key != "started" and value not in _NOTHING and value != environment.get(key)
    ]
    when = _shown(earlier.get("started", "at a time that is not known"))
    return f"{when} ({', '.join(others)})" if others else when


def _name(key: str) -> str:
    return _NAMES.get(key, key.replace("_", " "))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
