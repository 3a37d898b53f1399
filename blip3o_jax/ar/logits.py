"""Project hidden states to logits, and grow the tables of a vocabulary.

D width, V vocabulary rows.
"""

import jax
import jax.numpy as jnp


def project(hidden_BLD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """Return logits [..., V], accumulated and kept in float32, the factors in the dtype of the
    hidden states.
    """
    head_DV = head_DV.astype(hidden_BLD.dtype)
    return jnp.einsum("...D,DV->...V", hidden_BLD, head_DV, preferred_element_type=jnp.float32)


def resize_embeddings(table_VD: jax.Array, used: int, rows: int) -> jax.Array:
    """Return a table of `rows` rows whose first `used` are copied; every further one is their mean,
    so that a new token starts neither more nor less likely than a typical one. For an lm_head
    kernel, pass and take the transpose.
    """
    if not 0 < used <= min(rows, table_VD.shape[0]):
        raise ValueError(
            f"resize_embeddings: used={used} must lie in 1 .. {min(rows, table_VD.shape[0])}, the rows of both tables"
        )
    kept_VD = table_VD[:used]
    mean_D = kept_VD.astype(jnp.float32).mean(axis=0).astype(table_VD.dtype)
    return jnp.concatenate([kept_VD, jnp.broadcast_to(mean_D, (rows - used, table_VD.shape[1]))])
