"""Hold the statistics of norms to float32."""

import jax.numpy as jnp
from flax import nnx

from blip3o_jax import nn


def test_norms_take_their_statistics_in_float32(rng):
    """Sum in float32: in bfloat16 the sum of 4096 equal squares stops growing long before the
    end.
    """
    x = jnp.full((4096,), 3.0, jnp.bfloat16)
    norm = nn.RMSNorm(4096, rngs=nnx.Rngs(0), eps=0.0)
    assert norm(x).dtype == jnp.bfloat16 and float(norm(x)[0]) == 1.0
