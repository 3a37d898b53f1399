"""Project hidden states to logits and resize vocabulary tables.

D width, V vocabulary rows.
"""

import jax
import jax.numpy as jnp


def project(hidden_BLD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """Return float32 logits [..., V]; the factors are in the hidden states' dtype."""
    head_DV = head_DV.astype(hidden_BLD.dtype)
    return jnp.einsum("...D,DV->...V", hidden_BLD, head_DV, preferred_element_type=jnp.float32)


def resize_embeddings(table_VD: jax.Array, used: int, rows: int) -> jax.Array:
    """Return a table of `rows` rows: the first `used` are copied, the others are their mean.

    A new token then has the initial probability of an average one. For an lm_head kernel, pass the
    transpose and transpose the result. Raises ValueError unless `used` rows are in both tables.
    """
    if not 0 < used <= min(rows, table_VD.shape[0]):
        raise ValueError(
            f"resize_embeddings: used={used} must lie in 1 .. {min(rows, table_VD.shape[0])}, the "
            "rows of both tables"
        )
    kept_VD = table_VD[:used]
    mean_D = kept_VD.astype(jnp.float32).mean(axis=0).astype(table_VD.dtype)
    return jnp.concatenate([kept_VD, jnp.broadcast_to(mean_D, (rows - used, table_VD.shape[1]))])
