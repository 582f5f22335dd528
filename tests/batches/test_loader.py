import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from tinybert_jax.batches import loader
from tinybert_jax.batches.batch import Batch, Plan, TokenRows, make_batch
from tinybert_jax.batches.bucketing import bucketed_epochs
from tinybert_jax.batches.packing import packed_epochs
from tinybert_jax.config.compute import MeshSection
from tinybert_jax.models.inputs import Text
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import make_mesh


class PaddedRows(NamedTuple):
    """A row source of `TokenRows` in memory, padded to one width."""

    rows: TokenRows
    width: int
    pad_token_id: int

    @property
    def num_rows(self) -> int:
        return len(self.rows.lengths)

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        plan = Plan(rows[:, None], self.width)
        batch = make_batch(self.rows, plan, self.pad_token_id)
        (ids, types), segment_ids = batch.inputs, batch.attention_mask
        return ids, segment_ids, types, batch.targets["labels"][:, 0]


WIDTH = 8


class MappedRows:
    """A memory-mapped matrix of token ids; the first id of a row is `first` + the row number."""

    width = WIDTH

    def __init__(self, path, num_rows, first):
        ids = np.arange(num_rows)[:, None] * [[1] + [0] * (WIDTH - 1)] + first
        ids.astype(np.uint16).tofile(path)
        self.matrix = np.memmap(path, np.uint16, mode="r", shape=(num_rows, WIDTH))
        self.num_rows = num_rows

    def gather(self, rows):
        ids = self.matrix[rows].astype(np.int32)
        return ids, np.ones_like(ids), np.zeros_like(ids), np.arange(len(rows), dtype=np.int32) * 0


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return [
        MappedRows(folder / str(first), num_rows, first)
        for num_rows, first in ((501, 0), (67, 1000), (7, 2000))
    ]


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 17, 150)
    return TokenRows(
        ids=rng.integers(5, 99, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second=lengths.astype(np.int32),
        labels=np.arange(150, dtype=np.int32),
        num_truncated=0,
        teacher_logits=rng.normal(size=(150, 3)).astype(np.float32),
    )


def _makers(corpora, rows):
    """Kind of order -> function that makes the batches of a process."""
    lengths, size = rows.lengths, 16
    bucketed = bucketed_epochs(lengths, buckets=(8, 16), global_batch_size=size, seed=(3, 1))
    packed = packed_epochs(lengths, width=16, global_batch_size=size, seed=(3, 1), multiple=4)
    return {
        "mixed": lambda **process: loader.mixed_batches(
            corpora, (0.5, 0.3, 0.2), global_batch_size=size, seed=(3, 1), **process
        ),
        "one corpus": lambda **process: loader.mixed_batches(
            corpora[:1], (1.0,), global_batch_size=size, seed=(3, 1), **process
        ),
        "bucketed": lambda **process: loader.planned_batches(
            rows, bucketed, pad_token_id=0, **process
        ),
        "packed": lambda **process: loader.planned_batches(rows, packed, pad_token_id=0, **process),
    }


KINDS = ["mixed", "one corpus", "bucketed", "packed"]


def _assert_equal(got, expected):
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    assert [a.dtype for a in got] == [b.dtype for b in expected]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("process_count", [2, 4])
def test_the_slices_of_all_processes_are_the_global_batch(corpora, rows, kind, process_count):
    make = _makers(corpora, rows)[kind]
    whole = make()
    parts = [make(process_index=i, process_count=process_count) for i in range(process_count)]
    for step in range(40):
        slices = [part(step) for part in parts]
        together = jax.tree.map(lambda *fields: np.concatenate(fields), *slices)
        _assert_equal(together, whole(step))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_threads, num_ahead", [(0, 0), (1, 1), (8, 16)])
def test_threads_do_not_change_the_batches(corpora, rows, kind, num_threads, num_ahead):
    batch_at = _makers(corpora, rows)[kind]()
    batches = loader.prefetched(
        batch_at, start_step=3, num_threads=num_threads, num_ahead=num_ahead
    )
    for step in range(3, 40):
        _assert_equal(next(batches), batch_at(step))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_from_step_a_million_need_no_replay(corpora, rows, kind, monkeypatch):
    make = _makers(corpora, rows)[kind]
    make_batch, permute = make(), loader.permute
    steps, draws = [], []

    def batch_at(step):
        steps.append(step)
        return make_batch(step)

    def count_rows(index, *args):
        draws.append(len(index))
        return permute(index, *args)

    monkeypatch.setattr(loader, "permute", count_rows)
    batches = loader.prefetched(batch_at, start_step=1_000_000, num_threads=4, num_ahead=8)
    first, second = next(batches), next(batches)
    del batches
    assert min(steps) == 1_000_000 and max(steps) < 1_000_000 + 2 + 8 + 4
    assert sum(draws) <= 16 * len(steps)
    _assert_equal(first, make()(1_000_000))
    _assert_equal(second, make()(1_000_001))


@pytest.mark.parametrize("make_epochs", [bucketed_epochs, packed_epochs])
def test_a_batch_plans_only_the_epoch_it_belongs_to(rows, make_epochs):
    width = {"buckets": (8, 16)} if make_epochs is bucketed_epochs else {"width": 16}
    epochs = make_epochs(rows.lengths, global_batch_size=16, seed=(3, 1), **width)
    planned = []

    def plan(epoch):
        planned.append(epoch)
        return epochs.plan(epoch)

    batch_at = loader.planned_batches(rows, epochs._replace(plan=plan), pad_token_id=0)
    for step in (1_000_000, 1_000_000, 1_000_000 + epochs.num_batches):
        batch_at(step)
    first = 1_000_000 // epochs.num_batches
    assert planned == [first, first + 1]


def test_batches_are_made_and_placed_ahead():
    made = []

    def batch_at(step):
        made.append(step)
        ids, labels = np.full((8, 2), step, np.int32), np.full(8, step, np.int32)
        return Batch(Text(ids, ids), ids, {"labels": labels}, labels)

    placement = sharding.batch_sharding(make_mesh(MeshSection()))
    batches = loader.prefetched(batch_at, start_step=0, placement=placement, num_ahead=5)
    assert {field.sharding for field in jax.tree.leaves(next(batches))} == {placement}
    deadline = time.monotonic() + 10
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(made) == list(range(6))  # the batch that was taken and five in advance


def test_an_error_in_a_thread_reaches_the_caller():
    def batch_at(step):
        raise OSError("shard 3 is gone")

    with pytest.raises(OSError, match="shard 3 is gone"):
        next(loader.prefetched(batch_at, start_step=0))


def _stream(sizes, weights, seed, count):
    return loader.make_draws(sizes, weights, seed)(np.arange(count))


def test_an_epoch_of_a_corpus_holds_every_row_once():
    sizes = (501, 67, 13)
    corpus, row = _stream(sizes, (0.5, 0.3, 0.2), (0,), 150_000)  # crosses two cycles
    for number, size in enumerate(sizes):
        drawn = row[corpus == number]
        epochs = drawn[: len(drawn) // size * size].reshape(-1, size)
        assert len(epochs) > 100
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        assert len(np.unique(epochs[:50], axis=0)) == 50  # all in different orders


def test_order_depends_on_seed_and_corpus_only():
    corpus, row = _stream((500, 500), (1.0, 1.0), (0,), 2000)
    again = _stream((500, 500), (1.0, 1.0), (0,), 2000)
    other = _stream((500, 500), (1.0, 1.0), (1,), 2000)
    assert np.array_equal(corpus, again[0]) and np.array_equal(row, again[1])
    assert (corpus != other[0]).any() and (row != other[1]).any()
    assert (row[corpus == 0][:500] != row[corpus == 1][:500]).any()


def test_corpora_are_drawn_in_proportion_to_weights():
    weights = (0.6, 0.3, 0.0999, 0.0001)
    expected = np.array(weights)
    for count in (1024, 20_000):
        corpus, _ = _stream((1000, 10, 1, 100), weights, (4,), count)
        share = np.bincount(corpus, minlength=4) / count
        sigma = np.sqrt(expected * (1 - expected) / count)
        assert (np.abs(share - expected) < 3 * sigma).all(), (share, weights)
    cycles = 3 * 2**16
    corpus, _ = _stream((1000, 10, 1, 100), weights, (4,), cycles)
    assert np.abs(np.bincount(corpus) / cycles - expected).max() < 2**-16


def _order(size, epoch, seed):
    return loader.permute(np.arange(size), np.full(size, epoch), size, seed)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 99, 100, 101, 4096, 65_537])
def test_permute_is_a_permutation(size):
    order = _order(size, epoch=3, seed=(size,))
    assert np.array_equal(np.sort(order), np.arange(size))


def test_permute_is_statistically_random():
    """Positions of rows, and how often neighbours stay neighbours, against random permutations."""
    size, num_orders = 5000, 40
    orders = np.stack([_order(size, e, (7,)) for e in range(num_orders)])
    # Rows at the first 250 positions of all orders, in 50 bins: chi-square with 49 degrees.
    counts = np.bincount(orders[:, :250].ravel() * 50 // size, minlength=50)
    expected = num_orders * 250 / 50
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 49) < 4 * np.sqrt(2 * 49)
    # The number of positions where row r + 1 follows row r is Poisson with mean 1 per order.
    followed = np.count_nonzero(np.diff(orders, axis=1) == 1)
    assert abs(followed - num_orders) < 4 * np.sqrt(num_orders)
    correlation = [np.corrcoef(order[:-1], order[1:])[0, 1] for order in orders]
    assert np.abs(correlation).max() < 4 / np.sqrt(size)


def test_permute_reaches_rows_beyond_32_bits():
    size = 10**12
    rows = loader.permute(np.arange(size - 1000, size), np.zeros(1000, np.int64), size, (0,))
    assert len(set(rows.tolist())) == 1000
    assert rows.min() >= 0 and rows.max() < size and (rows > 2**32).mean() > 0.9


def test_a_mixed_batch_holds_the_drawn_rows_in_order(corpora):
    batch_at = loader.mixed_batches(corpora, (0.5, 0.3, 0.2), global_batch_size=64, seed=(9,))
    draw = loader.make_draws([c.num_rows for c in corpora], (0.5, 0.3, 0.2), (9,))
    for step in (0, 5, 2000):
        batch = batch_at(step)
        corpus, row = draw(np.arange(step * 64, step * 64 + 64))
        assert len(set(corpus)) == 3
        assert batch.inputs.input_ids[:, 0].tolist() == (corpus * 1000 + row).tolist()
        assert batch.attention_mask.all() and (batch.weights == 1).all()


def test_rows_in_memory_are_a_row_source(rows):
    source = PaddedRows(rows, 16, pad_token_id=2)
    chosen = np.array([5, 149, 0])
    ids, segment_ids, types, labels = source.gather(chosen)
    expected = make_batch(rows, Plan(chosen, 16), 2)
    assert np.array_equal(ids, expected.inputs.input_ids)
    assert np.array_equal(labels, expected.targets["labels"])
    assert np.array_equal(segment_ids, expected.attention_mask.astype(np.int32))
    assert np.array_equal(types, expected.inputs.token_type_ids)
    batch = loader.mixed_batches([source], [1.0], global_batch_size=150, seed=(0,))(0)
    assert sorted(batch.targets["labels"]) == list(range(150))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": (1.0, 1.0)}, "one share per corpus, got 2 shares for 3"),
        ({"sources": [], "weights": ()}, "got 0 shares for 0"),
        ({"weights": (1.0, 1.0, 0.0)}, "leave out that corpus"),
        ({"weights": (1.0, 1.0, -1.0)}, "leave out that corpus"),
        ({"weights": (1.0, 1.0, float("nan"))}, "leave out that corpus"),
        ({"weights": (1.0, 1.0, 1e-6)}, "above 1/65536"),
        ({"global_batch_size": 18, "process_count": 4}, "multiple of the 4 processes, got 18"),
    ],
)
def test_wrong_mixtures_are_refused(corpora, change, message):
    arguments = {
        "sources": corpora,
        "weights": (1.0, 1.0, 1.0),
        "global_batch_size": 16,
        "seed": (0,),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        loader.mixed_batches(**arguments)


def test_corpora_of_two_widths_or_without_rows_are_refused(corpora, rows):
    wide = PaddedRows(rows, 16, 0)
    with pytest.raises(ValueError, match=r"stores of one width, got \[8, 16\]"):
        loader.mixed_batches([corpora[0], wide], (1.0, 1.0), global_batch_size=4, seed=(0,))
    empty = rows._replace(offsets=rows.offsets[:1])
    with pytest.raises(ValueError, match=r"rows in every corpus, got \[0\]"):
        loader.mixed_batches([PaddedRows(empty, 16, 0)], (1.0,), global_batch_size=4, seed=(0,))


_PROCESS = """
import sys, jax, numpy as np
index, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from tests.batches.test_loader import distributed_sums
print(distributed_sums())
"""


def distributed_sums():
    """Sum over devices of row number times position in the global batch, for every step."""
    mesh = make_mesh(MeshSection())
    placement = sharding.batch_sharding(mesh)
    source = PaddedRows(_numbered_rows(), 4, 0)
    batch_at = loader.mixed_batches(
        [source],
        [1.0],
        global_batch_size=16,
        seed=(2,),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    batches = loader.prefetched(batch_at, start_step=0, placement=placement)
    positions = np.arange(1, 17, dtype=np.int32)
    weigh = jax.jit(lambda labels: (labels * positions).sum())
    return [int(weigh(next(batches).targets["labels"])) for _ in range(5)]


def _numbered_rows():
    return TokenRows(
        ids=np.full(100 * 4, 7, np.int32),
        offsets=np.arange(101, dtype=np.int64) * 4,
        second=np.full(100, 4, np.int32),
        labels=np.arange(100, dtype=np.int32),
        num_truncated=0,
    )


def test_two_processes_place_one_global_batch():
    """Two processes with a coordinator and four devices each, against one with eight devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(i), port],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    assert outputs == [str(distributed_sums())] * 2
