"""Nested dicts of arrays addressed by one path string, such as `encoder/layers/output/kernel`."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tinybert_jax.models.linear import rounded_kernels


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a": {"b": x}}` to `{"a/b": x}`, in the tree's own order."""
    return {
        "/".join(str(part.key) for part in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def sha256(tree: Any) -> str:
    """Of all arrays, in the tree's order."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def num_parameters(tree: Mapping[str, Any]) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


Params = dict[str, Any]


Apply = Callable[..., Any]


def frozen_params(
    params: Params,
    *,
    dtype: DTypeLike,
    product_dtype: DTypeLike | None = None,
    unroll: bool = False,
) -> Params:
    """Those of a model that is not trained, as its passes read them: the same bits but for int8.

    Kernels are rounded once (`rounded_kernels`); layers that are unrolled are `unstack_layers`.
    """
    rounded = rounded_kernels(params, dtype=dtype, product_dtype=product_dtype)
    return unstack_layers(rounded) if unroll else rounded


def unstack_layers(params: Params) -> Params:
    """Parameters with a tuple of layers, each a stack of one, instead of a stack of all.

    Of one model, or of a dict that holds one, such as {student, projection}. `apply` takes both
    forms. Of a stack XLA:CPU copies every layer that an unrolled encoder reads, and puts its
    gradient together: a fine-tuning step of benchmarks/finetune.py took 1.04 times as long.
    """

    def apart(stacked: Any) -> tuple[Any, ...]:
        def one(i: int) -> Any:
            return jax.tree.map(lambda x: x[i : i + 1], stacked)

        return tuple(one(i) for i in range(len(jax.tree.leaves(stacked)[0])))

    return _with_layers(params, apart)


def restack_layers(params: Params) -> Params:
    """The inverse of `unstack_layers`; in a program XLA takes the parts where they are.

    Of arrays of NumPy it makes arrays of NumPy.
    """

    def joined(layers: Any) -> Any:
        if not isinstance(layers, tuple):
            return layers
        is_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(layers))
        xp = np if is_host else jnp
        return jax.tree.map(lambda *parts: xp.concatenate(parts), *layers)

    return _with_layers(params, joined)


def _with_layers(params: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(params, Mapping):
        return params
    return {
        name: change(own) if name == "layers" else _with_layers(own, change)
        for name, own in params.items()
    }
