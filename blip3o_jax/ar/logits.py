"""Project hidden states to logits, a block of positions at a time, and resize vocabulary tables.

B batch, M positions, C positions of a block, D width, V vocabulary rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def project(hidden_BLD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """Return float32 logits [..., V]; the factors are in the hidden states' dtype."""
    head_DV = head_DV.astype(hidden_BLD.dtype)
    return jnp.einsum("...D,DV->...V", hidden_BLD, head_DV, preferred_element_type=jnp.float32)


def scan_blocks(
    block: Callable[..., tuple[Any, Any]],
    arrays: tuple[jax.Array | None, ...],
    totals: Any,
    *,
    chunk: int,
    multiple: int = 1,
) -> tuple[Any, Any]:
    """Run `block` on equal blocks of at most `chunk` positions, whose logits exist one at a time.

    `arrays` [B, M, ...] (or None) are cut along M, padded with zeros at the end; the blocks are
    the smallest of their number that are a multiple of `multiple` long. `block` maps arrays
    [B, C, ...] to (sums, outputs [B, C, ...]). Returns `totals` plus the sums over the blocks, and
    the outputs [B, M, ...].

    The backward pass computes the values of each block again, unless there is only one.
    """
    length = next(x.shape[1] for x in arrays if x is not None)
    blocks = -(-length // chunk)
    chunk = -(-length // (blocks * multiple)) * multiple

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, blocks * chunk - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), blocks, chunk, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(len(x), -1, *x.shape[3:])[:, :length]

    def body(totals: Any, inputs: tuple[jax.Array | None, ...]) -> tuple[Any, Any]:
        # Recomputing one block would repeat all of the head's FLOPs and save nothing, since its
        # logits are alive in the backward pass in either case.
        sums, outputs = (block if blocks == 1 else jax.checkpoint(block))(*inputs)
        return jax.tree.map(jnp.add, totals, sums), outputs

    totals, outputs = jax.lax.scan(body, totals, jax.tree.map(cut, arrays))
    return totals, jax.tree.map(join, outputs)


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
