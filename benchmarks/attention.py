"""Attention on this machine's device: XLA's against cuDNN's, forward and with the gradient.

    python benchmarks/attention.py

Milliseconds of one layer's attention, queries, keys and values in bfloat16, for packed rows (each
token reads its own segment). The sizes are BERT-base's and tinybert-4l-312d's, whose heads of 26
are filled up to 32 for cuDNN. Beside each side the error of its gradient, of the norm of one from
fp32 maps. A side that the device does not have says what it expects.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.models.attention import attend, make_visible

SIZES = {  # heads, head dim
    "bert-base": (12, 64),
    "tinybert-4l-312d": (12, 26),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--widths", default="128,256,512")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    print(jax.devices()[0].device_kind)
    for name, (num_heads, head_dim) in SIZES.items():
        for width in map(int, args.widths.split(",")):
            inputs = draw(args.tokens // width, width, num_heads, head_dim)
            exact = gradient("xla")(*[x.astype(jnp.float32) for x in inputs[:3]], inputs[3])
            line = f"{name:<18} T={width:<4}"
            for backend in ("xla", "cudnn"):
                try:
                    line += compare(backend, inputs, exact, args.rounds)
                except ValueError as error:  # attend's own: what it expects
                    line += f"  {backend}: {str(error).splitlines()[0][:60]}"
            print(line, flush=True)


def draw(num_rows: int, width: int, num_heads: int, head_dim: int) -> tuple:
    generator = np.random.default_rng(0)
    shape = (num_rows, width, num_heads, head_dim)
    taps = [jnp.asarray(generator.normal(size=shape), jnp.bfloat16) for _ in range(3)]
    cuts = np.sort(generator.integers(1, width, (num_rows, 3)), axis=1)
    segments = 1 + (np.arange(width)[None, None] >= cuts[:, :, None]).sum(1)
    segments[:, -width // 16 :] = 0
    return *taps, make_visible(jnp.asarray(segments, jnp.int32))


def forward(backend: str):
    return jax.jit(lambda *inputs: attend(*inputs, 0.0, None, backend=backend)[0])


def gradient(backend: str):
    def value(queries, keys, values, visible):
        context, _ = attend(queries, keys, values, visible, 0.0, None, backend=backend)
        return jnp.sum(jnp.sin(context.astype(jnp.float32)))

    return jax.jit(jax.grad(value, argnums=(0, 1, 2)))


def compare(backend: str, inputs: tuple, exact: tuple, num_rounds: int) -> str:
    times = [milliseconds(f(backend), inputs, num_rounds) for f in (forward, gradient)]
    got = gradient(backend)(*inputs)
    errors = [
        jnp.linalg.norm(g.astype(jnp.float32) - e) / jnp.linalg.norm(e)
        for g, e in zip(got, exact, strict=True)
    ]
    return f"  {backend} {times[0]:6.3f} {times[1]:6.3f} ms, error {max(map(float, errors)):.1e}"


def milliseconds(function, inputs: tuple, num_rounds: int) -> float:
    jax.block_until_ready(function(*inputs))
    times = []
    for _ in range(num_rounds):
        begin = time.perf_counter()
        jax.block_until_ready([function(*inputs) for _ in range(10)])
        times.append((time.perf_counter() - begin) / 10)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    main()
