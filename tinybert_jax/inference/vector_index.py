"""A vector index in a folder, with which `tinybert search` embeds a file once.

Needs faiss (extra `index`). Up to 100,000 texts the index is exact; beyond that it is a graph
(HNSW, arXiv 1603.09320), which finds nearly all of the closest vectors and reads few of them.
"""

import functools
import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinybert_jax.huggingface.hub import find_folder
from tinybert_jax.metrics.cosines import unit_vectors
from tinybert_jax.performance import disk

NUM_EXACT = 100_000  # texts up to which every vector is compared
_NUM_LINKS, _BUILD_WIDTH, _SEARCH_WIDTH = 32, 200, 128  # of the graph
_VECTORS, _ABOUT = "vectors.faiss", "index.json"
_NAMED = {
    "weights": "of other weights",
    "texts": "of other texts",
    "options": "with another --max-length or --width",
}


def search_index(
    folder: Path,
    model: str,
    texts: Sequence[str],
    options: dict[str, Any],
    queries: np.ndarray,
    top: int,
    make_vectors: Callable[[], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, places) [queries, top] of the closest vectors, the highest first.

    The index is written from `make_vectors()` where `folder` does not exist, and read where it
    does. Raises ValueError where faiss is missing, for a folder that is no index, and for an index
    of other weights, texts or options.
    """
    if not importlib.util.find_spec("faiss"):
        raise ValueError(
            "--index: expected the package faiss, got none; install it with "
            "`pip install 'tinybert-jax[index]'`, or leave out --index"
        )
    import faiss

    about = {"weights": _hash_model(find_folder(model)), "texts": _hash(texts), "options": options}
    if not folder.exists():
        _write(folder, about, make_vectors())
    _check(folder, about)
    index = faiss.read_index(str(folder / _VECTORS))
    top = min(top, index.ntotal)
    search = index.search
    if isinstance(index, faiss.IndexHNSW):
        found = faiss.SearchParametersHNSW(efSearch=max(_SEARCH_WIDTH, 4 * top))
        search = functools.partial(index.search, params=found)
    return search(unit_vectors(queries).astype(np.float32), top)


def _write(folder: Path, about: dict[str, Any], vectors: np.ndarray) -> None:
    import faiss

    units = np.ascontiguousarray(unit_vectors(vectors), np.float32)
    if len(units) <= NUM_EXACT:
        index = faiss.IndexFlatIP(units.shape[1])
    else:
        index = faiss.IndexHNSWFlat(units.shape[1], _NUM_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _BUILD_WIDTH
    index.add(units)
    disk.make_folder(folder.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-partial-", dir=folder.parent))
    try:
        faiss.write_index(index, str(partial / _VECTORS))
        own = _hash_file(partial / _VECTORS)
        (partial / _ABOUT).write_text(json.dumps({**about, "vectors": own}), encoding="utf-8")
        disk.sync_tree(partial)
        partial.rename(folder)
        disk.sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(folder: Path, about: dict[str, Any]) -> None:
    """Raises ValueError for a folder that is not an intact index of `about`."""
    try:
        found = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        is_intact = found["vectors"] == _hash_file(folder / _VECTORS)
    except (OSError, ValueError, KeyError, TypeError):
        found, is_intact = {}, False
    if not is_intact:
        raise ValueError(
            f"--index: expected a folder that tinybert search wrote, or none, got {folder}, which "
            "is something else or damaged; remove it, or choose another name"
        )
    others = [text for name, text in _NAMED.items() if found.get(name) != about[name]]
    if others:
        raise ValueError(
            f"--index: expected the index of this model and these texts, got {folder}, one "
            f"{' and '.join(others)}; remove it to make it again, or choose another name"
        )


def _hash_model(folder: Path) -> str:
    patterns = ("*.safetensors", "*.json", "vocab.txt", "*/config.json")
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return _hash([f"{path.relative_to(folder)} {_hash_file(path)}" for path in files])


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
