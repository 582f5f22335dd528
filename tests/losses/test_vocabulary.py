"""Losses over chunks of logits against losses of all logits, in PyTorch and in `pointwise`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.losses import pointwise, vocabulary

torch = pytest.importorskip("torch")
from reference import assert_same, normal, relative_error, value_and_grads

F = torch.nn.functional

VOCAB_LABELS = np.array([3, -100, 0, 10, -100, -100, -100, 7, 3, 0, 10, 9])


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("chunk_size", [1, 4, 5, 100])
def test_masked_lm_equals_the_loss_of_all_logits_for_any_chunk_size(chunk_size, num_shards):
    """Tolerance 1e-6: the summation order of a dozen fp32 rows changes no more than that."""
    inputs = normal(2, 12, 6, scale=2), normal(3, 11, 6), normal(4, 11)
    labels = jnp.array(VOCAB_LABELS)

    def whole(hidden, table, bias):
        return pointwise.masked_lm(hidden @ table.T + bias[None], labels)

    def chunked(hidden, table, bias):
        return vocabulary.masked_lm(
            hidden, table, bias, labels, chunk_size=chunk_size, num_shards=num_shards
        )

    for got, want in zip(
        value_and_grads(chunked, *inputs), value_and_grads(whole, *inputs), strict=True
    ):
        assert relative_error(got, want) <= 1e-6
    got, want = (loss(*map(jnp.array, inputs)) for loss in (chunked, whole))
    np.testing.assert_allclose(got, want, rtol=1e-6)  # without gradients
    assert_same(
        chunked,
        lambda hidden, table, bias: F.cross_entropy(
            hidden @ table.T + bias, torch.tensor(VOCAB_LABELS), ignore_index=-100
        ),
        *inputs,
    )


def test_a_shard_with_a_table_of_its_own_gives_that_table_its_gradient():
    inputs = normal(2, 12, 6, scale=2), normal(3, 11, 6), normal(4, 11)
    (hidden, table, bias), labels = map(jnp.array, inputs), jnp.array(VOCAB_LABELS)

    def by_table(table, num_shards, rows=slice(None)):
        def loss(table):
            own = hidden[rows], table, bias, labels[rows]
            count = jnp.float32(7)
            return vocabulary.masked_lm(*own, chunk_size=4, num_shards=num_shards, count=count)

        return jax.grad(loss)(table)

    both = by_table(jnp.stack([table, table]), 2)
    for own, rows in zip(both, (slice(6), slice(6, 12)), strict=True):
        np.testing.assert_allclose(own, by_table(table, 1, rows), atol=1e-6)


@pytest.mark.parametrize(
    ("num_rows", "largest", "size"),
    [(651, 256, 224), (651, 512, 328), (512, 512, 512), (513, 512, 264), (5, 512, 8), (5, 3, 3)],
)
def test_even_chunks_are_as_few_as_chunks_of_the_largest_size(num_rows, largest, size):
    assert vocabulary.even_chunk_size(num_rows, largest) == size
    assert -(-num_rows // size) == -(-num_rows // largest)


def test_masked_lm_sums_add_up_losses_and_count_hits():
    logits, real = normal(2, 12, 11, scale=2), VOCAB_LABELS >= 0
    logits[0, VOCAB_LABELS[0]] = logits[9, VOCAB_LABELS[9]] = 20  # at least two hits
    hidden, table, bias = logits, np.eye(11, dtype=np.float32), np.zeros(11, np.float32)

    got = jax.jit(functools.partial(vocabulary.masked_lm_sums, chunk_size=5))(
        *map(jnp.array, (hidden, table, bias, VOCAB_LABELS))
    )

    nll = F.cross_entropy(
        torch.tensor(logits).double(),
        torch.tensor(VOCAB_LABELS),
        ignore_index=-100,
        reduction="sum",
    )
    np.testing.assert_allclose(got[0], nll, rtol=1e-6)
    num_hits = (logits.argmax(-1) == VOCAB_LABELS)[real].sum()
    assert got[1] == num_hits and 2 <= num_hits < real.sum()


def test_masked_lm_never_holds_all_logits_in_memory():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1024, 8), (4096, 8), (4096,))]
    labels = jax.ShapeDtypeStruct((1024,), jnp.int32)
    bytes_of_all_logits = 4 * 1024 * 4096

    def temporary_bytes(loss):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        return step.lower(*shapes, labels).compile().memory_analysis().temp_size_in_bytes

    def whole(hidden, table, bias, labels):
        return pointwise.masked_lm(hidden @ table.T + bias[None], labels)

    chunked = functools.partial(vocabulary.masked_lm, chunk_size=64)
    assert temporary_bytes(whole) >= bytes_of_all_logits
    assert temporary_bytes(chunked) <= bytes_of_all_logits / 4


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 100])
@pytest.mark.parametrize("temperature, num_shards", [(1.0, 1), (2.0, 1), (2.0, 2)])
def test_kl_matches_torch_for_any_chunk_size(chunk_size, temperature, num_shards):
    labels, vocab = VOCAB_LABELS, 11
    teacher = [normal(3, len(labels), 6), normal(4, vocab, 6), normal(5, vocab)]

    def loss(hidden, table, bias):
        return vocabulary.kl(
            (hidden, table, bias),
            tuple(map(jnp.array, teacher)),
            jnp.array(labels != -100),
            temperature=temperature,
            chunk_size=chunk_size,
            num_shards=num_shards,
        )

    def log_probs(hidden, table, bias):
        return torch.log_softmax((hidden @ table.T + bias)[labels != -100] / temperature, -1)

    target = log_probs(*(torch.tensor(x, dtype=torch.float64) for x in teacher))

    def reference(*student):
        return F.kl_div(log_probs(*student), target, reduction="batchmean", log_target=True)

    assert_same(loss, reference, normal(0, len(labels), 4), normal(1, vocab, 4), normal(2, vocab))
