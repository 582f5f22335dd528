"""Compares the copies of arrays that several processes hold: a flipped bit makes one differ."""

import collections
import json
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from tinybert_jax.parallel import processes
from tinybert_jax.parallel.group import LostProcessError


def check(leaves: Iterable[tuple[str, jax.Array]], where: str) -> None:
    """Raises LostProcessError where a copy of an array differs, and names its process.

    `leaves`: (name, array of values of 32 bits). Each device adds up the bits of what it holds, so
    it costs about as much as copying the arrays. `where`: the step, for the message.
    """
    if processes.count() == 1:
        return
    own: dict[str, list[jax.Array]] = {}
    for name, leaf in leaves:
        for shard in leaf.addressable_shards:
            begin = ",".join(str(part.start or 0) for part in shard.index)
            own.setdefault(f"{name}|{begin}", []).append(_sum_bits(shard.data))
    sums = {name: [int(value) for value in all_] for name, all_ in jax.device_get(own).items()}
    told = [json.loads(text) for text in processes.gather("replicas", json.dumps(sums))]
    for name in {name: None for sums in told for name in sums}:
        held = [(number, value) for number, sums in enumerate(told) for value in sums.get(name, ())]
        counted = collections.Counter(value for _, value in held).most_common()
        if len(counted) == 1:
            continue
        is_sure = counted[0][1] > counted[1][1]
        wrong = {number for number, value in held if not is_sure or value != counted[0][0]}
        named = " or ".join(processes.describe(number) for number in sorted(wrong))
        raise LostProcessError(
            f"{named}: expected the same bits of {name.partition('|')[0]} on all devices {where}, "
            "got others: a memory or a chip is faulty. The last checkpoint is kept: repeat the "
            "command without that machine"
        )


@jax.jit
def _sum_bits(values: jax.Array) -> jax.Array:
    """The sum of all values as integers of 32 bits, modulo 2³²: any single flipped bit changes it.

    A sum of integers does not depend on its order.
    """
    return jnp.sum(jax.lax.bitcast_convert_type(values, jnp.uint32), dtype=jnp.uint32)
