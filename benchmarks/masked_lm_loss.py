"""The masked-LM loss in chunks against the same loss on whole logits: time and memory, one run.

    python benchmarks/masked_lm_loss.py [--chunk-size 256] [--dim 312]

A ratio above 1 means that the chunks are faster. The sizes are those of one step of
tinybert-4l-312d: 1500 slots for masked tokens, all of them in use or as many as masking 15 % of
128-token rows fills. Both sides run in turn; each figure is the median of its rounds.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.losses import pointwise, vocabulary
from tinybert_jax.objectives.masking import num_slots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--predictions", type=int, default=1500)
    parser.add_argument("--vocab", type=int, default=30522)
    parser.add_argument("--dim", type=int, default=312)
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    shapes = (args.predictions, args.dim), (args.vocab, args.dim), (args.vocab,)
    arrays = [jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32) for shape in shapes]
    filled = 0.15 * 128 / num_slots(0.15, 128)
    chunked = functools.partial(vocabulary.masked_lm, chunk_size=args.chunk_size)
    print(f"{args.predictions} slots × {args.vocab} words × {args.dim}, fp32, {jax.devices()[0]}")
    for share in (1.0, filled):
        labels = rng.integers(0, args.vocab, args.predictions)
        labels[round(share * args.predictions) :] = pointwise.IGNORED_LABEL
        inputs = [*arrays, jnp.asarray(rng.permutation(labels))]
        compare(
            share, inputs, {"whole": whole, f"chunks of {args.chunk_size}": chunked}, args.rounds
        )


def whole(hidden, table, bias, labels):
    logits = jnp.einsum("nd,vd->nv", hidden, table, preferred_element_type=jnp.float32)
    return pointwise.masked_lm(logits + bias[None], labels)


def compare(share: float, inputs: list, candidates: dict, num_rounds: int) -> None:
    """Prints the ratio of the first candidate to the second: seconds, temporary bytes, values."""
    steps = {
        name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*inputs).compile()
        for name, loss in candidates.items()
    }
    values = {name: jax.block_until_ready(step(*inputs)) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            jax.block_until_ready(step(*inputs))
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    memory = {n: step.memory_analysis().temp_size_in_bytes / 2**20 for n, step in steps.items()}
    print(f"{share:.0%} of the slots in use")
    for name in steps:
        print(f"  {name:<16} {1000 * medians[name]:8.1f} ms  {memory[name]:8.1f} MiB temporary")
    first, second = steps
    errors = jax.tree.map(relative_error, values[second], values[first])
    print(
        f"  time ratio {medians[first] / medians[second]:.2f}  "
        f"memory ratio {memory[first] / memory[second]:.2f}  "
        f"largest relative difference {max(jax.tree.leaves(errors)):.1e}"
    )


def relative_error(got: jax.Array, want: jax.Array) -> float:
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


if __name__ == "__main__":
    main()
