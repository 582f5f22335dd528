"""Where arrays live: the mesh, and one pure function from a parameter's path and shape to its spec.

Mesh axes: `data` (batch), `fsdp` (batch and parameters), `tensor` (heads and feed-forward width).
One device is a mesh of one.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tinybert_jax.parallel.mesh import BATCH_AXES

# The dim (counted from the end) that the `tensor` axis splits, by path.
_TENSOR_DIM = (
    (re.compile(r"attention/(query|key|value)/kernel$|intermediate/kernel$"), -1),
    (re.compile(r"attention/(query|key|value)/(bias|scale)$|intermediate/(bias|scale)$"), -1),
    (re.compile(r"(attention/output|layers/(\[\d+\]/)?output)/kernel$"), -2),
)


def param_specs(abstract: Any, mesh: Mesh, *, num_leading: int = 0) -> Any:
    """A tree of PartitionSpec like `abstract` (arrays or ShapeDtypeStructs).

    `num_leading` axes in front, those of several models side by side, are left whole.

    `tensor` splits the dim named by the path where it divides; `fsdp` the largest other dim that
    it divides. Embedding tables are split by rows over both. What neither divides is replicated.
    """

    def spec(path, leaf) -> PartitionSpec:
        name = "/".join(str(getattr(part, "key", part)) for part in path)
        own = _spec(name, tuple(leaf.shape[num_leading:]), mesh)
        return PartitionSpec(*(None,) * min(num_leading, leaf.ndim), *own)

    return jax.tree_util.tree_map_with_path(spec, abstract)


def shardings(specs: Any, mesh: Mesh) -> Any:
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def placed(params: Any, mesh: Mesh) -> Any:
    """Parameters on their devices."""
    return jax.device_put(params, shardings(param_specs(params, mesh), mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over `data` and `fsdp`; each example whole on its device."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def constrain(hidden: jax.Array) -> jax.Array:
    """Keeps activations [batch, …] split by example, whatever their parameters' sharding suggests.

    Without it XLA may carry a parameter's split into the residual stream and regather at each
    block. Outside of a mesh context (`jax.set_mesh`) it does nothing.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return hidden
    return jax.lax.with_sharding_constraint(hidden, PartitionSpec(BATCH_AXES))


def over_batch(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Runs a function of arrays [batch, …] on each device's own examples, in a mesh context.

    For kernels that XLA cannot split by itself; the `tensor` axis repeats them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    spec = PartitionSpec(BATCH_AXES)
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if name.endswith("/embedding"):  # by rows: split columns would regather after every look-up
        for axes in (("fsdp", "tensor"), ("fsdp",), ("tensor",)):
            if _divides(int(np.prod([mesh.shape[axis] for axis in axes])), shape[0]):
                return PartitionSpec(axes)
        return PartitionSpec()
    dims: list[str | None] = [None] * len(shape)
    for pattern, dim in _TENSOR_DIM:
        if pattern.search(name) and _divides(mesh.shape["tensor"], shape[dim]):
            dims[dim] = "tensor"
    is_stacked = "/layers/" in f"/{name}"
    free = [i for i in range(int(is_stacked), len(shape)) if dims[i] is None]
    free = [i for i in free if _divides(mesh.shape["fsdp"], shape[i])]
    if free and len(shape) - int(is_stacked) >= 2:
        dims[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*dims)


def _divides(size: int, dim: int) -> bool:
    return size > 1 and dim % size == 0
