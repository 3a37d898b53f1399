"""Build position embeddings.

Shape suffixes: L length, D features.
"""

import jax
import jax.numpy as jnp
import numpy as np


def sinusoids(length: int, dim: int) -> jax.Array:
    """Return sinusoidal position embeddings [L, D], float32: sines, then cosines.

    Source: "Attention is all you need" (arXiv 1706.03762, section 3.5). An odd D ends with a zero.
    """
    # NumPy computes the table in float64 while tracing, so that it is a constant of the program.
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(dim // 2) / (dim // 2))
    return jnp.asarray(
        np.pad(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), ((0, 0), (0, dim % 2))),
        jnp.float32,
    )
