"""Compares the replicas of arrays that several devices hold: a flipped bit shows in a checksum.

A device that returns a wrong bit changes the copy that it holds of the weights. All devices then
train on, each with a copy of its own, and no loss tells.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec


def different_replicas(tree: Any, mesh: Mesh) -> list[str]:
    """The arrays of `tree` of which a device holds another copy than the others, as text.

    Every device sums the bits of the shards that it holds; the sums are compared on the host. The
    leaves are sharded over `mesh`. With two copies nothing says which one is wrong: both are named.
    """
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="."), _raw(leaf))
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    leaves: list[Any] = [leaf for _, leaf in named]  # their sharding has a spec
    per_device = _make_sums(mesh, tuple(leaf.sharding.spec for leaf in leaves))(*leaves)
    by_device = dict(zip(mesh.devices.flat, np.asarray(per_device), strict=True))
    return list(_differences(named, by_device))


@functools.cache
def _make_sums(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable[..., jax.Array]:
    """sums(*arrays): uint32 [devices, arrays], the sum of the bits of each device's shards."""

    def sums(*shards: jax.Array) -> jax.Array:
        return jnp.stack([_sum_bits(shard) for shard in shards]).reshape(1, -1)

    everywhere = PartitionSpec(mesh.axis_names)
    return jax.jit(
        jax.shard_map(sums, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=False)
    )


def _differences(
    named: list[tuple[str, jax.Array]], by_device: dict[Any, np.ndarray]
) -> Iterator[str]:
    for place, (name, leaf) in enumerate(named):
        copies: defaultdict[str, list[Any]] = defaultdict(list)  # by the part of the array
        for device, part in leaf.sharding.devices_indices_map(leaf.shape).items():
            copies[str(part)].append(device)
        for devices in copies.values():
            sums = {device: int(by_device[device][place]) for device in devices}
            (usual, count), *others = Counter(sums.values()).most_common()
            if not others:
                continue
            is_tie = others[0][1] == count
            wrong = [device for device in devices if is_tie or sums[device] != usual]
            shown = ", ".join(f"{device} (process {device.process_index})" for device in wrong)
            yield f"{name} on {shown}"


def _raw(leaf: jax.Array) -> jax.Array:
    """A PRNG key as integers; other leaves unchanged."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _sum_bits(shard: jax.Array) -> jax.Array:
    """The sum of an array's words as integers, modulo 2^32: one flipped bit changes it."""
    words = jax.lax.bitcast_convert_type(shard, jnp.dtype(f"uint{8 * shard.dtype.itemsize}"))
    return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)
