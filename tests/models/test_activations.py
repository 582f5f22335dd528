import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.models.activations import ACTIVATIONS


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 4e-3)])
def test_gelu_and_derivative_match_the_formula(dtype, tolerance):
    """Against x·Φ(x) and Φ(x) + x·φ(x) in fp64, at inputs that `dtype` can represent."""
    x = np.asarray(jnp.linspace(-9, 9, 1001).astype(dtype), np.float64)
    cdf = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])
    slope = cdf + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    given = jnp.asarray(x, dtype)
    values, slopes = jax.jvp(ACTIVATIONS["gelu"], (given,), (jnp.ones_like(given),))
    for ours, exact in ((values, x * cdf), (slopes, slope)):
        assert ours.dtype == dtype
        error = np.abs(np.asarray(ours, np.float64) - exact)
        assert (error <= tolerance * np.maximum(np.abs(exact), 1)).all()
