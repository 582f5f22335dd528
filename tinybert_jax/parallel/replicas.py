"""Compares the copies of arrays that several devices hold: a flipped bit makes one differ.

A device that returns a wrong bit changes the copy that it holds of the weights. All devices then
train on, each with a copy of its own, and no loss tells.
"""

import collections
import json
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tinybert_jax.parallel import processes
from tinybert_jax.parallel.group import LostProcessError


class Difference(NamedTuple):
    """An array of which some devices hold another copy than the others."""

    name: str
    devices: tuple[str, ...]
    processes: tuple[int, ...]  # of these devices

    def __str__(self) -> str:
        shown = zip(self.devices, self.processes, strict=True)
        return f"{self.name} on " + ", ".join(f"{own} (process {number})" for own, number in shown)


def differences(leaves: Iterable[tuple[str, jax.Array]]) -> list[Difference]:
    """The arrays, by (name, array), whose copies differ on the devices of all processes.

    Each device adds up the bits of what it holds, so it costs about as much as reading the arrays
    once. With two copies nothing says which one is wrong: both are named.
    """
    own: dict[str, list[tuple[str, jax.Array]]] = {}
    for name, leaf in leaves:
        for shard in _raw(leaf).addressable_shards:
            begin = ",".join(str(part.start or 0) for part in shard.index)
            copies = own.setdefault(f"{name}|{begin}", [])
            copies.append((str(shard.device), _sum_bits(shard.data)))
    sums = {
        name: [(device, int(total)) for device, total in copies]
        for name, copies in jax.device_get(own).items()
    }
    told = [json.loads(text) for text in processes.gather("replicas", json.dumps(sums))]
    found = []
    for name in {name: None for sums in told for name in sums}:
        held = [
            (device, number, total)
            for number, sums in enumerate(told)
            for device, total in sums.get(name, ())
        ]
        counted = collections.Counter(total for _, _, total in held).most_common()
        if len(counted) == 1:
            continue
        is_sure = counted[0][1] > counted[1][1]
        wrong = [own for own in held if not is_sure or own[2] != counted[0][0]]
        devices, numbers, _ = zip(*wrong, strict=True)
        found.append(Difference(name.partition("|")[0], devices, numbers))
    return found


def check(leaves: Iterable[tuple[str, jax.Array]], where: str) -> None:
    """Raises LostProcessError where processes hold different copies, and names one.

    `where`: the step, for the message.
    """
    found = differences(leaves) if processes.count() > 1 else []
    if not found:
        return
    first = found[0]
    named = " or ".join(processes.describe(number) for number in sorted(set(first.processes)))
    raise LostProcessError(
        f"{named}: expected the same bits of {first.name} on all devices {where}, got others: a "
        "memory or a chip is faulty. The last checkpoint is kept: repeat the command without that "
        "machine"
    )


def _raw(leaf: jax.Array) -> jax.Array:
    """A PRNG key as integers; other leaves unchanged."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


@jax.jit
def _sum_bits(values: jax.Array) -> jax.Array:
    """The sum of an array's words as integers, modulo 2³²: any single flipped bit changes it.

    A sum of integers does not depend on its order.
    """
    words = jax.lax.bitcast_convert_type(values, jnp.dtype(f"uint{8 * values.dtype.itemsize}"))
    return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)
