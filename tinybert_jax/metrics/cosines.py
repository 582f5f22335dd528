"""Cosines between vectors, on the host."""

import numpy as np
from jaxtyping import Float


def unit_vectors(vectors: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n dim"]:
    """Rows divided by their length, or by 1e-12 where shorter."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def cosines(
    first: Float[np.ndarray, "n dim"], second: Float[np.ndarray, "n dim"]
) -> Float[np.ndarray, " n"]:
    """fp64: the cosine of each row of `first` with that of `second`."""
    first, second = (unit_vectors(rows.astype(np.float64)) for rows in (first, second))
    return np.sum(first * second, axis=-1)
