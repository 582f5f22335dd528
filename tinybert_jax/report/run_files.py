"""Reads the files of a run folder for its report."""

import json
from pathlib import Path
from typing import Any


def read_results(run_dir: Path) -> dict[str, Any]:
    """results.json; raises ValueError where it is missing or unreadable."""
    path = run_dir / "results.json"
    if not path.is_file():
        raise ValueError(
            f"{run_dir}: expected a run folder with results.json, found no such file; "
            "give the folder of a finished run"
        )
    results = _read_json(path)
    if not isinstance(results, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got something else; run the command again"
        )
    return results


def read_rows(path: Path) -> tuple[list[dict], int]:
    """The JSON objects of a JSONL file, and the number of other lines (left by a killed run)."""
    rows, num_unreadable = [], 0
    for line in (read_text(path) or "").splitlines():
        row = _parse(line) if line.strip() else {}
        if isinstance(row, dict):
            rows.append(row)
        else:
            num_unreadable += 1
    return rows, num_unreadable


def read_environment(run_dir: Path) -> dict[str, Any]:
    """env.json; empty where it is missing or unreadable."""
    environment = _read_json(run_dir / "env.json")
    return environment if isinstance(environment, dict) else {}


def _read_json(path: Path) -> Any:
    return _parse(read_text(path) or "")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def read_text(path: Path) -> str | None:
    """The text of a file; None without the file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
