"""Parameters as nested dicts; a path such as `encoder/layers/output/kernel` names one array."""

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tinybert_jax.models.inputs import Text
from tinybert_jax.models.linear import rounded_kernels
from tinybert_jax.parallel.sharding import copy_per_shard


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a": {"b": x}}` to `{"a/b": x}`, in the order of the tree's leaves."""
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
    """SHA-256 of the bytes of all arrays, in the order of the tree's leaves."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def num_parameters(tree: Mapping[str, Any]) -> int:
    """The number of values in all arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


if TYPE_CHECKING:  # nested dicts of arrays; `unstack_layers` makes tuples of dicts
    Params = dict[str, "jax.Array | Params | tuple[Params, ...]"]
else:  # the checker that tests use at run time does not follow the recursion
    Params = dict[str, Any]


@runtime_checkable
class Apply(Protocol):
    """The forward pass of a model; deterministic without `key`, which draws the dropout masks.

    Options: `num_segments` of packed rows, of heads `taps`, of a masked LM `positions`. Returns an
    `EncoderOutput`, a `ClassifierOutput` or a `MaskedLMOutput`.
    """

    def __call__(
        self,
        params: Params,
        inputs: Text,
        attention_mask: jax.Array,
        key: jax.Array | None = None,
        /,
        **options: Any,
    ) -> Any: ...


def frozen_params(
    params: Params,
    *,
    dtype: DTypeLike,
    product_dtype: DTypeLike | None = None,
    unroll: bool = False,
) -> Params:
    """The parameters of a frozen model in the form that its forward passes read.

    Kernels are rounded once (`rounded_kernels`) instead of in every pass, and layers are unstacked
    with `unroll`. The outputs have the same bits, except for int8 and float8 products.
    """
    rounded = rounded_kernels(params, dtype=dtype, product_dtype=product_dtype)
    return unstack_layers(rounded) if unroll else rounded


def copy_table_per_shard(params: Params, num_shards: int) -> Params:
    """The parameters of a model that reads a word table as input and as output, a masked LM or an
    encoder-decoder, with a table [shards, vocab, dim] by `copy_per_shard`."""
    tied = params.get("decoder", {})
    side = "decoder" if "embeddings" in tied else "encoder"
    own: Any = params[side]
    embeddings = own["embeddings"]
    embeddings = {**embeddings, "word": copy_per_shard(embeddings["word"], num_shards)}
    return {**params, side: {**own, "embeddings": embeddings}}


def unstack_layers(params: Params) -> Params:
    """Splits the stack of layers, [layers, …], into a tuple with arrays [1, …] per layer.

    `params` is a model or a dict that holds one, such as {student, projection}. `apply` takes both
    forms. From a stack, XLA:CPU copies every layer that an unrolled encoder reads and concatenates
    the gradients: a fine-tuning step of benchmarks/finetune.py took 1.04 times as long.
    """

    def unstack(stacked: Any) -> tuple[Any, ...]:
        def layer(i: int) -> Any:
            return jax.tree.map(lambda x: x[i : i + 1], stacked)

        return tuple(layer(i) for i in range(len(jax.tree.leaves(stacked)[0])))

    return _with_layers(params, unstack)


def restack_layers(params: Params) -> Params:
    """The inverse of `unstack_layers`; NumPy arrays stay NumPy arrays.

    In a jitted program XLA reads the parts without a copy.
    """

    def stack(layers: Any) -> Any:
        if not isinstance(layers, tuple):
            return layers
        is_numpy = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(layers))
        xp = np if is_numpy else jnp
        return jax.tree.map(lambda *parts: xp.concatenate(parts), *layers)

    return _with_layers(params, stack)


def _with_layers(params: Any, change: Callable[[Any], Any]) -> Any:
    """`params` with `change` applied to every value under the key `layers`."""
    if not isinstance(params, Mapping):
        return params
    return {
        name: change(value) if name == "layers" else _with_layers(value, change)
        for name, value in params.items()
    }
