"""Memory and time of the attention losses against forms that build the maps, as rows get longer.

    python benchmarks/attention_memory.py

The score loss in Gram form and MiniLMv2's relation KL (queries with queries) in blocks, each with
its gradient by the student's queries and keys, 12 heads, student heads of 26 and teacher heads of
64 for the scores, of 32 for both in the relations. Memory is what XLA sets aside for the compiled
loss and gradient beside inputs and outputs; time is the median of `--rounds`, the two forms taking
turns. `difference` is between the two forms' gradients, by norm.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.losses import attention as attention_losses
from tinybert_jax.losses import relations

BATCH, HEADS, SCORE_DIMS, RELATION_DIM = 2, 12, (26, 64), 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"{BATCH} rows, {HEADS} heads, {jax.devices()[0].device_kind}")
    for name, ours, maps, dims in (
        ("scores, Gram form", gram, score_maps, SCORE_DIMS),
        ("relations, in blocks", blocks, relation_maps, (RELATION_DIM, RELATION_DIM)),
    ):
        for seq in args.lengths:
            print(f"  {name:<22} {seq:>5} tokens  {compared(ours, maps, dims, seq, args.rounds)}")


def gram(sq, sk, tq, tk, mask):
    return attention_losses.attention_mse(sq, sk, tq, tk, mask, normalisation="valid_only")


def blocks(sq, sk, tq, tk, mask):
    del sk, tk
    return relations.relation_kl(sq, sq, tq, tq, mask)


def score_maps(sq, sk, tq, tk, mask):
    pair = (mask[:, None, :, None] & mask[:, None, None, :]).astype(jnp.float32)
    difference = pair * (_scores(sq, sk) - _scores(tq, tk))
    return jnp.square(difference).sum() / pair.sum() / sq.shape[2]


def relation_maps(sq, sk, tq, tk, mask):
    del sk, tk
    hidden = jnp.where(mask[:, None, None, :], 0.0, -1e30)
    ours, theirs = (jax.nn.log_softmax(_scores(x, x) + hidden) for x in (sq, tq))
    each = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
    return jnp.sum(each * mask[:, None, :]) / mask.sum() / sq.shape[2]


def _scores(query, key):
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("bthk,bshk->bhts", query * query.shape[-1] ** -0.5, key, precision=precision)


def compared(ours: Callable, maps: Callable, dims: tuple[int, int], seq: int, rounds: int) -> str:
    student, teacher = dims
    keys = jax.random.split(jax.random.key(0), 4)
    inputs: tuple[Any, ...] = tuple(
        jax.random.normal(key, (BATCH, seq, HEADS, dim))
        for key, dim in zip(keys, (student, student, teacher, teacher), strict=True)
    )
    inputs = *inputs, jnp.arange(seq)[None, :] < jnp.array([[seq], [seq - seq // 8]])
    sides = [
        jax.jit(jax.value_and_grad(form, argnums=(0, 1))).lower(*inputs).compile()
        for form in (ours, maps)
    ]
    memory = [side.memory_analysis().temp_size_in_bytes / 2**20 for side in sides]
    gradients = [_flat(side(*inputs)[1]) for side in sides]
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for side, own in zip(sides, seconds, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(side(*inputs))
            own.append(time.perf_counter() - begin)
    times = [1000 * statistics.median(own) for own in seconds]
    difference = np.linalg.norm(gradients[0] - gradients[1]) / np.linalg.norm(gradients[1])
    return (
        f"{memory[0]:>8,.1f} MiB, maps {memory[1]:>8,.1f} MiB   {times[0]:>8,.1f} ms, maps "
        f"{times[1]:>8,.1f} ms   difference {difference:.0e}"
    )


def _flat(gradient: tuple[jax.Array, ...]) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in gradient])


if __name__ == "__main__":
    main()
