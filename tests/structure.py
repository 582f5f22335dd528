"""Counts of the package's structure: `python tests/structure.py`. test_architecture.py holds them.

Each line names a count, its value, the limit, and the places where it is not zero.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent / "tinybert_jax"
FILES = sorted(ROOT.rglob("*.py"))
NUM_ALIKE = 6  # lines in a row that may not stand twice
# Files and rooms that may take a whole RunConfig.
CONFIG_READERS = ("config/", "recipes/", "cli.py", "runs/preflight.py")


class Count(NamedTuple):
    name: str
    value: int
    limit: int
    places: list[str]


def counts() -> list[Count]:
    rooms = sorted({_name(path).split("/")[0] for path in FILES if "/" in _name(path)})
    top = [_name(path) for path in FILES if "/" not in _name(path)]
    asks = _files_with(r"is_regression|\"regression\"")
    bert = [name for name in _files_with(r'"bert"') if not name.startswith(_FAMILY_ROOMS)]
    order = _files_with(r"STAGES\.index|STAGE_NAMES\.index")
    configs = list(_whole_configs())
    twice = list(_alike())
    return [
        Count("top-level files", len(top), 3, top),
        Count("rooms", len(rooms), 20, rooms),
        Count("files that ask whether a task is a regression", len(asks), 3, asks),
        Count('"bert" outside of models/ and huggingface/', len(bert), 0, bert),
        Count("STAGES.index", len(order), 0, order),
        Count("functions elsewhere that take a RunConfig", len(configs), 0, configs),
        Count(f"runs of {NUM_ALIKE} lines that stand twice", len(twice), 0, twice),
    ]


_FAMILY_ROOMS = ("models/", "huggingface/")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _files_with(pattern: str) -> list[str]:
    """Files with a line of code that has the pattern: comments and docstrings do not count."""
    found = []
    for path in FILES:
        lines = [line for _, line in _code_lines(path)]
        if any(re.search(pattern, line) for line in lines):
            found.append(_name(path))
    return found


def _code_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) without docstrings, comments, imports and signatures."""
    text = path.read_text()
    tree = ast.parse(text)
    left_out: set[int] = set()
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Expr) else None
        is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.FunctionDef):
            left_out |= set(range(node.lineno, node.body[0].lineno))
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.split("  # ")[0].strip()
        if number not in left_out and stripped and not stripped.startswith("#"):
            yield number, stripped


def _whole_configs() -> Iterator[str]:
    for path in FILES:
        if _name(path).startswith(CONFIG_READERS):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if any("RunConfig" in ast.unparse(a.annotation) for a in arguments if a.annotation):
                    yield f"{_name(path)}:{node.name}"


def _alike() -> Iterator[str]:
    """Places whose next lines stand elsewhere too, to the letter; lone brackets do not count."""
    seen: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in FILES:
        lines = [(n, own) for n, own in _code_lines(path) if re.search(r"\w", own)]
        for first in range(len(lines) - NUM_ALIKE + 1):
            part = lines[first : first + NUM_ALIKE]
            seen[tuple(own for _, own in part)].append(f"{_name(path)}:{part[0][0]}")
    yield from (" = ".join(places) for places in seen.values() if len(places) > 1)


if __name__ == "__main__":
    for name, value, limit, places in counts():
        print(f"{name}: {value} (at most {limit})  {', '.join(places[:20])}")
