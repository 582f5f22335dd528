"""`tinybert data prepare engine=ray`: transforms the chunks with Ray Data, on one machine or many.

Why Ray Data: it streams with bounded memory, can preserve the order of blocks, and runs the same
program locally and on a cluster. Beam's collections are unordered and Beam's cluster runners need a
JVM; datatrove writes one file per rank, so the bytes would depend on the number of workers. Ray
reads chunks per group of files and transforms them on any worker; the calling process appends the
rows in order, so resuming works as without Ray.

Every machine needs the sources under the same path. RAY_ADDRESS names a running cluster.
"""

import importlib
import os
import pickle
from collections.abc import Generator, Iterator
from typing import Any

from tinybert_jax.data.errors import fail
from tinybert_jax.data.records import Source
from tinybert_jax.tokens.transform import (
    ChunkResult,
    TransformSpec,
    make_transform,
    read_options,
    remaining_chunks,
)

Row = dict[str, Any]  # one column of pickled bytes: Ray's blocks are Arrow tables
_COLUMN = "pickle"


def run(
    spec: TransformSpec, groups: list[tuple[int, list[Source]]], done: tuple[int, int], workers: int
) -> Generator[ChunkResult, None, None]:
    """Yields the results of the chunks after the chunk `done`, in the order of the chunks."""
    try:
        ray: Any = importlib.import_module("ray")  # optional, so pyright may not find it
    except ImportError:
        fail("engine: ray", "the package ray", "none", "install the extra: pip install '.[ray]'")
    if not ray.is_initialized():
        num_cpus = None if os.environ.get("RAY_ADDRESS") else workers
        ray.init(num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = spec.settings["chunk_bytes"]  # one chunk per block
    items = [{_COLUMN: pickle.dumps((group, done, spec.settings))} for group in groups]
    rows = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .flat_map(_read, num_cpus=0.25)  # Ray would fuse it with a next step of equal num_cpus
        .map(_Transform, fn_constructor_args=(spec,), num_cpus=1, concurrency=(1, workers))
    )
    for row in rows.iter_rows():
        yield pickle.loads(row[_COLUMN])


def _read(row: Row) -> Iterator[Row]:
    group, done, settings = pickle.loads(row[_COLUMN])
    for chunk in remaining_chunks(group, done, read_options(settings)):
        yield {_COLUMN: pickle.dumps(chunk)}


class _Transform:
    """A class, so that a Ray worker loads the tokenizer only once."""

    def __init__(self, spec: TransformSpec):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._transform = make_transform(spec)

    def __call__(self, row: Row) -> Row:
        return {_COLUMN: pickle.dumps(self._transform(pickle.loads(row[_COLUMN])))}
