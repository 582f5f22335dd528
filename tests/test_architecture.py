"""Rooms import downwards, files inside a room upwards in the order listed, and budgets hold."""

import ast
import statistics
from pathlib import Path

import pytest
import structure

ROOT = structure.ROOT

# Ground floor first. A room imports only from rooms above it in this table; inside a room a file
# imports only from files before it. Late imports count too.
ROOMS = {
    "settings": "section sizes layer_maps",
    "losses": "pointwise forms attention relations vocabulary similarity",
    "terms": "term attention hidden relation cls cosine pooled logits label words sentence "
    "contrastive table",
    "config": "models data tasks task_kinds stages distillation compute log consistency run "
    "by_rows load schema command",
    "metrics": "classification regression multi_label tagging spans intervals paired calibration "
    "cosines translation",
    "report": "charts style shell run_files tables gate score_table figures headline confusion "
    "per_class pareto advice calibration differences console card provenance page comparison "
    "settings_table several_runs run_comparison command",
    "performance": "flops accelerators gpu_target device_peaks hlo latency trace disk host "
    "program_cache",
    "parallel": "mesh group processes replicas sharding",
    "data": "errors encoding examples json_text csv_rows tables conll squad corpus parallel "
    "records builtin wordpiece splits table_columns guess",
    "models": "inputs activations dropout linear params norm triton_blocks attention_kernel "
    "score_kernel attention encoder bert distilbert families heads seq2seq decoding",
    "batches": "batch tokenize bucketing packing loader",
    "tokens": "store instances transform ray workers prepare inspect",
    "huggingface": "untrusted sentence_folder header tensors hub weights bert distilbert families "
    "head config_json folder encoder_decoder rewrite push command",
    "tasks": "task classification regression multi_label tagging question_answering embeddings "
    "translation linear table",
    "objectives": "alignment linear_probe reduction factored objective masking masked_lm "
    "supervised similarity distillation",
    "inference": "scorer pretrained seq2seq columns predict pipeline vector_index search compare "
    "translate command",
    "training": "members optimizer early_stopping loop step skipping shards manifest checkpoint "
    "trackers live_view metric_log throughput preemption saver generations",
    "runs": "shared_folder inputs run judges identity run_store from_step corpus_checks checks "
    "environment run_folder preflight stage_batches teacher_logits teacher_text workload estimate "
    "scoring results head_init student_start stage_state stage_step divergence stage "
    "used_words topologies compile saved_states doctor command",
    "recipes": "data pretrain finetune distill update by_rows from_table pipeline api",
    "launch": "job slurm jobset gcluster tpu_vm sky command",
}
TOP = ("cli", "__main__", "__init__")
FILES = structure.FILES
MODULES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
CODE = {p: m for p, m in MODULES.items() if not m.endswith(".__init__")}
ids = MODULES.get


def _room(module: str) -> str:
    return module.split(".")[0]


def _imports(path: Path) -> set[str]:
    """Modules of the package, such as `models.heads`, that a file imports, at its top or late."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name.removeprefix("tinybert_jax.") for name in names}
    return found & set(MODULES.values())


def _roots(body: list[ast.stmt] | ast.AST) -> set[str]:
    """Top-level packages that statements import."""
    nodes = body if isinstance(body, list) else ast.walk(body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_every_file_is_in_the_table():
    there = {module for module in CODE.values() if _room(module) not in TOP}
    told = {f"{room}.{file}" for room, files in ROOMS.items() for file in files.split()}
    assert there == told


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_imports_go_down(path):
    module, rooms = CODE[path], [*ROOMS, *TOP]
    for other in _imports(path):
        if _room(other) == _room(module):
            files = ROOMS.get(_room(module), "").split()
            assert module == other or _place(files, other) < _place(files, module), other
        else:
            assert rooms.index(_room(other)) < rooms.index(_room(module)), other


def _place(files: list[str], module: str) -> int:
    return files.index(module.split(".")[1])


def test_floors_between_rooms():
    """The longest chain of imports from room to room."""
    reads = {room: set() for room in ROOMS}
    for path, module in CODE.items():
        if _room(module) in ROOMS:
            reads[_room(module)] |= {_room(m) for m in _imports(path)} - {_room(module)}
    floor: dict[str, int] = {}
    for room in ROOMS:  # a room reads only rooms that stand before it
        floor[room] = 1 + max((floor[other] for other in reads[room]), default=0)
    assert max(floor.values()) <= 10, floor
    assert len(ROOMS) <= 20


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_budgets(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            budget = 120 if node.name == "main" and path.parent.name == "recipes" else 60
            assert node.end_lineno - node.lineno < budget, f"{node.name} is too long"


def test_most_files_are_short():
    assert statistics.median(p.read_text().count("\n") for p in CODE) <= 170


def test_recipes_do_not_import_each_other_except_the_pipeline_and_the_api():
    for path, module in CODE.items():
        if module.startswith("recipes.") and module not in ("recipes.pipeline", "recipes.api"):
            assert not [m for m in _imports(path) if m.startswith("recipes.")], module


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_heavy_imports_stay_in_their_rooms(path):
    """transformers and datasets only where text is read, and late; Orbax only in checkpoint, fsspec

    only in generations.
    """
    module, tree = MODULES[path], ast.parse(path.read_text())
    assert not _roots(tree.body) & {"transformers", "datasets", "torch", "orbax", "fsspec"}
    late = _roots(tree)
    assert "torch" not in late
    if late & {"transformers", "datasets"}:
        assert _room(module) in ("huggingface", "data", "batches")
    if "orbax" in late:
        assert module == "training.checkpoint"
    if "fsspec" in late:
        assert module == "training.generations"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_losses_see_arrays_and_models_see_no_losses(path):
    room, others = _room(MODULES[path]), {_room(module) for module in _imports(path)}
    if room == "losses":
        assert others <= {"losses"}
    if room == "models":
        assert others <= {"models", "settings", "parallel"}


def test_config_and_help_need_no_jax():
    """Config is pure pydantic, early and late; the command line imports jax only late."""
    for path, module in CODE.items():
        if _room(module) == "config":
            assert not _roots(ast.parse(path.read_text())) & {"jax", "flax", "numpy"}, module
        if module in (
            "cli",
            "huggingface.command",
            "inference.command",
            "report.command",
            "runs.command",
            "inference.translate",
            "performance.flops",
            "performance.host",
        ):
            assert not _roots(ast.parse(path.read_text()).body) & {"jax", "flax", "numpy"}, module


@pytest.mark.parametrize("count", structure.counts(), ids=lambda count: count.name)
def test_counts_of_the_structure(count):
    assert count.value <= count.limit, count.places
