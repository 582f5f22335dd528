"""Shardings of parameters, batches and activations on the mesh of `parallel.mesh`.

The spec of a parameter is a pure function of the parameter's path and shape.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tinybert_jax.parallel import processes
from tinybert_jax.parallel.mesh import BATCH_AXES, num_batch_shards, platform_of

# The dim (counted from the end) that the `tensor` axis splits, by path.
_TENSOR_DIM = (
    (re.compile(r"attention/(query|key|value)/kernel$|intermediate/kernel$"), -1),
    (re.compile(r"attention/(query|key|value)/(bias|scale)$|intermediate/(bias|scale)$"), -1),
    (re.compile(r"(attention/output|layers/(\[\d+\]/)?output)/kernel$"), -2),
)


def param_specs(abstract: Any, mesh: Mesh, *, num_leading: int = 0) -> Any:
    """The PartitionSpecs of `abstract`, a tree of arrays or ShapeDtypeStructs.

    `num_leading`: leading dims, such as the seeds of a model, that no axis splits.

    `tensor` splits the dim that the path names, `fsdp` the largest other dim; both only where the
    axis size divides the dim. Embedding tables are split by rows over both axes. Dims that no axis
    divides are replicated.
    """

    def spec(keys, leaf) -> PartitionSpec:
        path = "/".join(str(getattr(part, "key", part)) for part in keys)
        inner = _spec(path, tuple(leaf.shape[num_leading:]), mesh)
        return PartitionSpec(*(None,) * min(num_leading, leaf.ndim), *inner)

    return jax.tree_util.tree_map_with_path(spec, abstract)


def named_shardings(specs: Any, mesh: Mesh) -> Any:
    """The NamedShardings of a tree of PartitionSpecs."""
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def place_params(params: Any, mesh: Mesh) -> Any:
    """Parameters, sent to the devices by their `param_specs`."""
    return place(params, named_shardings(param_specs(params, mesh), mesh))


def place(tree: Any, shardings: Any) -> Any:
    """Sends a tree that every process holds whole to the devices.

    `shardings`: a tree like it, or one sharding for all leaves. Each process sends its own shards.
    """
    if processes.count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda leaf: shardings, tree)

    def send(leaf: Any, own: NamedSharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, own, lambda index: whole[index])

    return jax.tree.map(send, tree, shardings)


def fetch(tree: Any) -> Any:
    """The whole arrays of a tree, in the host's memory of every process; all have to call it."""
    leaves, structure = jax.tree.flatten(tree)
    far = [number for number, leaf in enumerate(leaves) if _is_far(leaf)]
    if far:
        parts = [leaves[number] for number in far]
        whole = jax.tree.map(lambda leaf: replicated_sharding(leaf.sharding.mesh), parts)
        for number, leaf in zip(far, jax.jit(_same, out_shardings=whole)(parts), strict=True):
            leaves[number] = leaf
    return jax.device_get(jax.tree.unflatten(structure, leaves))


def _is_far(leaf: Any) -> bool:
    """Whether other processes hold parts of an array that this one lacks."""
    return isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    )


def _same(tree: Any) -> Any:
    return tree


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the examples over `data` and `fsdp`; an example stays whole on one device."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """(number of this process's part of a batch, number of parts).

    Processes that differ along `tensor` alone hold the same part. Raises ValueError where the
    devices of a process hold no such part.
    """
    shards = num_batch_shards(mesh)
    if processes.count() == 1:
        return 0, 1
    places = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
    held = sorted({index[0].start or 0 for index in places if index is not None})
    size = len(held)
    if held != list(range(held[0], held[0] + size)) or held[0] % size or shards % size:
        shown = " × ".join(f"{axis} {number}" for axis, number in mesh.shape.items())
        raise ValueError(
            f"mesh: expected axes that give each process an equal part of a batch, got {shown} "
            f"with {len(mesh.local_devices)} devices in {processes.describe(processes.index())}; "
            "make the product of fsdp and tensor a divisor or a multiple of that number"
        )
    return held[0] // size, shards // size


def shard_by_example(hidden: jax.Array) -> jax.Array:
    """Keeps activations [batch, …] split by example, whatever the sharding of the parameters.

    Without it XLA may split the residual stream like a parameter and all-gather in every block.
    Outside a mesh context (`jax.set_mesh`) it does nothing.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return hidden
    return jax.lax.with_sharding_constraint(hidden, PartitionSpec(BATCH_AXES))


def copy_per_shard(tree: Any, num_shards: int) -> Any:
    """Arrays [shards, …]: a copy for each batch shard; a single shard keeps its arrays as they are.

    For parameters that a model reads several times. A shard adds up the gradients of its copy, and
    the sum over shards comes after: one all-reduce instead of one for each time.
    """
    if num_shards == 1:
        return tree
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_shards, *x.shape)), tree)


def in_stored_layout(gradients: Any, mesh: Mesh) -> Any:
    """Gradients in the layout in which TPUs store their parameters; elsewhere as they are.

    An optimizer computes in the layout of the gradients: if the parameters have another one, they
    and their moments are copied there and back in every step. Split gradients stay as they are,
    because the constraint would gather them.
    """
    is_split = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
    if platform_of(mesh) != "tpu" or is_split:
        return gradients

    def constrain(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2 or min(leaf.shape[-2:]) < 8:  # small ones are stored in other ways too
            return leaf
        return with_layout_constraint(leaf, Layout(stored_order(leaf.shape)))

    return jax.tree.map(constrain, gradients)


def stored_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dims of an fp32 array, of at least 8 rows and columns, from major to minor on TPUs.

    They store a matrix or its transpose, whichever has fewer tiles of 8 × 128.
    """
    dims = tuple(range(len(shape)))
    if len(shape) > 1 and _num_tiles(*shape[:-3:-1]) < _num_tiles(*shape[-2:]):
        return (*dims[:-2], dims[-1], dims[-2])
    return dims


def _num_tiles(rows: int, columns: int) -> int:
    return math.ceil(rows / 8) * math.ceil(columns / 128)


def shard_map_over_batch(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes every device run a function of arrays [batch, …] on the examples of that device.

    For kernels that XLA cannot partition; devices along the `tensor` axis repeat the same work.
    Outside a mesh context (`jax.set_mesh`) the function stays as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    spec = PartitionSpec(BATCH_AXES)
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if path.endswith("/embedding"):  # by rows: columns would need a gather after every look-up
        for axes in (("fsdp", "tensor"), ("fsdp",), ("tensor",)):
            if _divides(int(np.prod([mesh.shape[axis] for axis in axes])), shape[0]):
                return PartitionSpec(axes)
        return PartitionSpec()
    dims: list[str | None] = [None] * len(shape)
    for pattern, dim in _TENSOR_DIM:
        if pattern.search(path) and _divides(mesh.shape["tensor"], shape[dim]):
            dims[dim] = "tensor"
    is_stacked = "/layers/" in f"/{path}"  # dim 0 is the layer, which no axis splits
    free = [i for i in range(int(is_stacked), len(shape)) if dims[i] is None]
    free = [i for i in free if _divides(mesh.shape["fsdp"], shape[i])]
    if free and len(shape) - int(is_stacked) >= 2:
        dims[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*dims)


def _divides(size: int, dim: int) -> bool:
    return size > 1 and dim % size == 0
