"""`tinybert data prepare engine=ray`: the same chunks through Ray Data, on one machine or many.

Why Ray Data: it streams with bounded memory, keeps the order of blocks if asked, and its local
runtime is the one of the cluster. Beam's collections have no order and its cluster runners want a
JVM; datatrove deals the input to as many ranks as it is told and writes a file a rank, so that the
bytes would hang on the number of workers. Here chunks are read per group of files and transformed
anywhere, and the process that asked appends their rows in order: resuming works as without Ray.

Every machine has to see the sources under the same path. RAY_ADDRESS names a running cluster.
"""

import importlib
import os
import pickle
from collections.abc import Iterator
from typing import Any

from tinybert_jax.data.errors import fail
from tinybert_jax.data.records import Source
from tinybert_jax.tokens.transform import Done, Work, make_transform, read_options, todo

Row = dict[str, Any]  # one column: Ray's blocks are Arrow tables
_COLUMN = "pickle"


def run(
    work: Work, groups: list[tuple[int, list[Source]]], done: tuple[int, int], workers: int
) -> Iterator[Done]:
    """What becomes of each chunk after `done`, in the order of the chunks."""
    try:
        ray: Any = importlib.import_module("ray")  # an extra, also for the type checker
    except ImportError:
        fail("engine: ray", "the package ray", "none", "install the extra: pip install '.[ray]'")
    if not ray.is_initialized():
        here = None if os.environ.get("RAY_ADDRESS") else workers
        ray.init(num_cpus=here, include_dashboard=False, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = work.settings["chunk_bytes"]  # a chunk a block
    items = [{_COLUMN: pickle.dumps((group, done, work.settings))} for group in groups]
    rows = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .flat_map(_read, num_cpus=0.25)  # another share than the next step, else the two are fused
        .map(_Transform, fn_constructor_args=(work,), num_cpus=1, concurrency=(1, workers))
    )
    for row in rows.iter_rows():
        yield pickle.loads(row[_COLUMN])


def _read(row: Row) -> Iterator[Row]:
    group, done, settings = pickle.loads(row[_COLUMN])
    for chunk in todo(group, done, read_options(settings)):
        yield {_COLUMN: pickle.dumps(chunk)}


class _Transform:
    """Lives on a worker, so that the tokenizer is loaded once."""

    def __init__(self, work: Work):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._transform = make_transform(work)

    def __call__(self, row: Row) -> Row:
        return {_COLUMN: pickle.dumps(self._transform(pickle.loads(row[_COLUMN])))}
