"""The layers hold: a file imports only from lower levels, and budgets are kept."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "tinybert_jax"
LEVELS = [
    ["presets", "fields", "cost", "log", "tree", "metrics", "charts", "host", "best", "profile"],
    ["stage_sections", "objective_sections", "compute_sections"],
    ["needs"],
    ["sections", "report_style"],
    ["report_results", "data_sections"],
    ["config", "report_confusion", "report_pareto"],
    ["sharding", "losses", "masking", "optim", "report"],
    ["attention_losses", "word_losses"],
    ["model"],
    ["data", "convert", "checkpoint"],
    ["distill", "evaluate"],
    ["objectives", "checks", "corpus_checks", "inference", "export"],
    ["distill_objective", "family", "inputs"],
    ["train", "loop"],
    ["run"],
    ["feed", "teacher_logits", "meter"],
    ["stage", "results", "plan_work"],
    ["plan"],
    ["recipes"],
    ["models", "cli", "__init__"],
    ["__main__"],
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def _imports(path: Path) -> set[str]:
    """Rooms of the package that a file imports, at its top or late."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinybert_jax"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found & LEVEL_OF.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    room = _room(path)
    too_high = {r for r in _imports(path) if r != room and LEVEL_OF[r] >= LEVEL_OF[room]}
    assert not too_high, f"{path.name} (level {LEVEL_OF[room]}) imports {too_high}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_budgets(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            budget = 120 if node.name == "main" or path.parent.name == "recipes" else 60
            assert node.end_lineno - node.lineno < budget, f"{node.name} is too long"


def test_recipes_do_not_import_each_other_except_the_pipeline():
    for path in (ROOT / "recipes").glob("*.py"):
        if path.stem not in ("pipeline", "__init__"):
            assert "recipes" not in _imports(path), path.name


def test_heavy_imports_stay_in_their_rooms():
    """transformers and datasets only in convert and data, and late; Orbax only in checkpoint."""
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or node.names[0].name]
                roots = {name.split(".")[0] for name in names}
                assert not roots & {"transformers", "datasets", "torch", "orbax"}, path.name
        late = {
            alias.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in [getattr(node, "module", None) or node.names[0].name]
        }
        assert "torch" not in late, path.name
        if late & {"transformers", "datasets"}:
            assert _room(path) in ("convert", "data"), path.name
        if "orbax" in late:
            assert path.stem == "checkpoint"


def test_config_needs_no_jax():
    sections = "sections objective_sections stage_sections data_sections fields"
    for name in [*sections.split(), "config", "needs", "presets", "cli", "cost", "host"]:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        tops = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        modules = {getattr(n, "module", None) or n.names[0].name for n in tops}
        assert not {m.split(".")[0] for m in modules} & {"jax", "flax", "numpy"}, name
