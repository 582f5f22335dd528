"""Reads the files of a run folder for its report."""

import json
from pathlib import Path
from typing import Any

RESAMPLES = "resamples.json"  # the main metric of each model on resamples of the dev rows


def read_results(run_dir: Path) -> dict[str, Any]:
    """results.json; raises ValueError where it is missing or unreadable."""
    path = run_dir / "results.json"
    if not path.is_file():
        raise ValueError(
            f"{run_dir}: expected a run folder with results.json, found no such file; "
            "give the folder of a finished run"
        )
    try:
        results = json.loads(read_text(path) or "")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected a JSON object, got text that is not JSON ({error}); run the command "
            "again, which writes it anew"
        ) from None
    if not isinstance(results, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got {type(results).__name__}; run the command again, "
            "which writes it anew"
        )
    return _with_plain_names(results)


def _with_plain_names(results: dict[str, Any]) -> dict[str, Any]:
    """The results with text, or nothing, as the names of the metric, the models and their roles."""
    results = dict(results)
    if not isinstance(results.get("metric"), str):
        results.pop("metric", None)
    models = results.get("models")
    if isinstance(models, list):
        results["models"] = [
            {k: str(v) if k in ("name", "role") else v for k, v in model.items()}
            for model in models
            if isinstance(model, dict)
        ]
    return results


def read_rows(path: Path) -> tuple[list[dict], int]:
    """The JSON objects of a JSONL file, and the number of other lines (left by a killed run)."""
    rows, num_unreadable = [], 0
    for line in (read_text(path) or "").split("\n"):
        row = _parse(line) if line.strip() else {}
        if isinstance(row, dict):
            rows.append(row)
        else:
            num_unreadable += 1
    return rows, num_unreadable


def read_environment(run_dir: Path) -> dict[str, Any]:
    """env.json; empty where it is missing or unreadable."""
    environment = _parse(read_text(run_dir / "env.json") or "")
    return environment if isinstance(environment, dict) else {}


def read_resamples(run_dir: Path) -> dict[str, Any]:
    """resamples.json; empty where it is missing or unreadable, as in a run of version 0.1."""
    resamples = _parse(read_text(run_dir / RESAMPLES) or "")
    return resamples if isinstance(resamples, dict) else {}


def _parse(text: str) -> Any:
    """The value; None for text that is not JSON, nested too deeply, or has too many digits."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_text(path: Path) -> str | None:
    """The text of a file; None without the file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
