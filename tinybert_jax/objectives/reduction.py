"""Starts a narrower student from a teacher's layers: every map of the teacher in fewer dimensions.

The student's states are the teacher's, seen along a few directions: x_teacher ≈ directions · x. A
product of two of the teacher's matrices (of queries and keys, or of values and output) is cut to
the rank of the student's head by a singular value decomposition that weights its input by the
second moments of the states, so that what is lost is what the states use least (as in ASVD, arXiv
2312.05821). The feed-forward layer keeps the neurons with the largest weights, and LayerNorms are
fitted to the teacher's states.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from tinybert_jax.objectives.alignment import principal_directions, project_tables

Encode = Callable[[Any], Sequence[np.ndarray]]  # parameters -> [tokens, dim] of each hidden state


def reduction_directions(
    states: Sequence[Float[np.ndarray, "tokens dim"]], num_directions: int
) -> Float[np.ndarray, "dim directions"]:
    """Orthonormal directions that hold most of the states' energy, in a basis made for LayerNorm.

    A LayerNorm subtracts the mean over its dimensions. The basis is turned so that this mean is the
    direction with the least energy of those that are kept.
    """
    top = principal_directions(np.concatenate(list(states)), num_directions).astype(np.float64)
    last, mean = np.zeros(num_directions), np.full(num_directions, num_directions**-0.5)
    last[-1] = 1.0
    normal = last - mean
    if not normal.any():  # a single direction
        return top.astype(np.float32)
    normal /= np.linalg.norm(normal)
    return (top - 2.0 * np.outer(top @ normal, normal)).astype(np.float32)


def start_from_reduced_teacher(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    layers: Sequence[int],
    states: Sequence[Float[np.ndarray, "tokens dim"]],
    directions: Float[np.ndarray, "dim directions"],
    num_heads: int,
) -> dict[str, Any]:
    """The student's encoder with the given teacher layers, counted from 1, in fewer dimensions.

    `states`: the teacher's embeddings and the outputs of all its layers, at the same tokens. Both
    models have `num_heads` heads. The pooler of `student` does not change.
    """
    share = _share_of_energy(states, directions)
    reduced = [
        _reduce_layer(
            _layer(teacher["layers"], number - 1),
            _layer(student["layers"], place),
            states[number - 1],
            directions,
            num_heads,
            share,
        )
        for place, number in enumerate(layers)
    ]
    embeddings = project_tables(student, teacher, directions)
    embeddings["norm"] = _reduce_norm(teacher["embeddings"]["norm"], directions, share)
    return {**student, "embeddings": embeddings, "layers": _stack(reduced)}


def refit_norms(
    params: Mapping[str, Any],
    encode: Encode,
    targets: Sequence[Float[np.ndarray, "tokens dim"]],
) -> dict[str, Any]:
    """Fits scale and bias of the LayerNorm behind every hidden state, one after another.

    By least squares to `targets`, which has an entry for each hidden state; a later state is fitted
    with the earlier ones as they are fitted.
    """
    fitted = {**params, "embeddings": dict(params["embeddings"]), "layers": dict(params["layers"])}
    for entry, target in enumerate(targets):
        hidden = np.asarray(encode(fitted)[entry], np.float64)
        if entry == 0:
            norm = fitted["embeddings"]["norm"]
            fitted["embeddings"]["norm"] = _fit(hidden, norm["scale"], norm["bias"], target)
            continue
        norm = {name: np.array(leaf) for name, leaf in fitted["layers"]["output_norm"].items()}
        own = _fit(hidden, norm["scale"][entry - 1], norm["bias"][entry - 1], target)
        for name, values in own.items():
            norm[name][entry - 1] = values
        fitted["layers"]["output_norm"] = norm
    return fitted


def _fit(hidden: Any, scale: Any, bias: Any, target: Any) -> dict[str, np.ndarray]:
    """scale and bias that bring the normalised states nearest to `target`."""
    normed = (hidden - np.asarray(bias)) / np.asarray(scale)
    centred = normed - normed.mean(0)
    wanted = np.asarray(target, np.float64)
    slope = (centred * (wanted - wanted.mean(0))).sum(0) / np.maximum((centred**2).sum(0), 1e-12)
    offset = wanted.mean(0) - slope * normed.mean(0)
    return {"scale": slope.astype(np.float32), "bias": offset.astype(np.float32)}


def _share_of_energy(states: Sequence[np.ndarray], directions: np.ndarray) -> float:
    """The share of the states' squared norm along the directions."""
    total = sum(float(np.square(own).sum()) for own in states)
    kept = sum(float(np.square(own @ directions).sum()) for own in states)
    return kept / total


def _reduce_layer(
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
    inputs: np.ndarray,
    directions: np.ndarray,
    num_heads: int,
    share: float,
) -> dict[str, Any]:
    """The parameters of one layer; `inputs` [tokens, dim]: the states that it reads."""
    root = _moment_root(inputs @ directions)
    attention = _reduce_attention(teacher["attention"], root, directions, num_heads)
    first, second = teacher["intermediate"], teacher["output"]
    into = directions.T @ np.asarray(first["kernel"], np.float64)
    out = np.asarray(second["kernel"], np.float64) @ directions
    size = student["intermediate"]["kernel"].shape[-1]
    weight = np.linalg.norm(into, axis=0) * np.linalg.norm(out, axis=1)
    kept = np.sort(np.argsort(-weight, kind="stable")[:size])
    return {
        **student,
        "attention": attention,
        "attention_norm": _reduce_norm(teacher["attention_norm"], directions, share),
        "intermediate": _linear(into[:, kept], np.asarray(first["bias"])[kept]),
        "output": _linear(out[kept], np.asarray(second["bias"]) @ directions),
        "output_norm": _reduce_norm(teacher["output_norm"], directions, share),
    }


def _reduce_attention(
    teacher: Mapping[str, Any], root: np.ndarray, directions: np.ndarray, num_heads: int
) -> dict[str, Any]:
    """Queries, keys, values and output; `root`: of the second moments of (state, 1)."""
    inverse = np.linalg.pinv(root)
    width = directions.shape[1] // num_heads  # of a head of the student

    def heads(name: str) -> list[np.ndarray]:
        """[dim + 1, head] of each head: kernel along the directions, and bias."""
        kernel = directions.T @ np.asarray(teacher[name]["kernel"], np.float64)
        whole = np.concatenate([kernel, np.asarray(teacher[name]["bias"], np.float64)[None]])
        return np.split(whole, num_heads, axis=1)

    outputs = np.split(
        np.asarray(teacher["output"]["kernel"], np.float64) @ directions, num_heads, axis=0
    )
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("query", "key", "value", "output")}
    for query, key, value, output in zip(
        heads("query"), heads("key"), heads("value"), outputs, strict=True
    ):
        # Scores are divided by the root of the head's width, which the student's is not.
        balance = (width / query.shape[1]) ** 0.25
        left, right = _cut(root @ query @ key.T @ root, width)
        parts["query"].append(balance * inverse @ left)
        parts["key"].append(balance * inverse @ right)
        left, right = _cut(root @ value @ output, width)
        parts["value"].append(inverse @ left)
        parts["output"].append(right.T)
    read = {name: np.concatenate(parts[name], axis=1) for name in ("query", "key", "value")}
    output_bias = np.asarray(teacher["output"]["bias"]) @ directions
    return {
        **{name: _linear(whole[:-1], whole[-1]) for name, whole in read.items()},
        "output": _linear(np.concatenate(parts["output"]), output_bias),
    }


def _cut(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(left, right) [.., rank] with the best left · rightᵀ of this rank."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    roots = np.sqrt(values[:rank])
    return left[:, :rank] * roots, right[:rank].T * roots


def _moment_root(states: np.ndarray) -> np.ndarray:
    """The symmetric root of E[(x, 1)(x, 1)ᵀ], [dim + 1, dim + 1]."""
    whole = np.concatenate([states.astype(np.float64), np.ones((len(states), 1))], axis=1)
    values, vectors = np.linalg.eigh(whole.T @ whole / len(whole))
    floor = 1e-6 * values.max()  # directions that the sample does not use are kept at a low weight
    return (vectors * np.sqrt(np.maximum(values, floor))) @ vectors.T


def _reduce_norm(
    norm: Mapping[str, Any], directions: np.ndarray, share: float
) -> dict[str, np.ndarray]:
    """A LayerNorm along the directions.

    Normalised states of n dimensions have the norm √n, and `share` of their energy is kept.
    """
    dim, num = directions.shape
    factor = np.sqrt(share * dim / num)
    scale = np.square(directions).T @ np.asarray(norm["scale"]) * factor
    bias = np.asarray(norm["bias"]) @ directions
    return {"scale": scale.astype(np.float32), "bias": bias.astype(np.float32)}


def _linear(kernel: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def _layer(stacked: Any, place: int) -> Any:
    if isinstance(stacked, Mapping):
        return {name: _layer(child, place) for name, child in stacked.items()}
    return np.asarray(stacked[place])


def _stack(layers: Sequence[Any]) -> Any:
    if isinstance(layers[0], Mapping):
        return {name: _stack([layer[name] for layer in layers]) for name in layers[0]}
    return np.stack(layers)
