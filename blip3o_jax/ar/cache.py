"""Hold and update the key/value cache of decoding: a pytree of static shape.

Slots are shared by the rows of a batch: a chunk of L tokens takes slots end .. end + L - 1 of every
row, so that a write is one `dynamic_update_slice` at one scalar index. Padding of shorter rows has
segment 0, which no query attends to; a token's *position* counts only the real tokens of its
row. For prompts of 3 and 2 tokens, padded to 3, and two more:

    slot          0 1 2 3 4        segments   1 1 1 1 1        positions  0 1 2 3 4
                                              1 1 0 1 1                   0 1 - 2 3

The layer loop and the token loop both *carry* the cache and update it in place. In a scan's xs and
ys it would be copied at every token. Heads precede slots, the layout of a product over each head's
slots: in the other order they would be transposed at every token.

Y layers, B batch, L tokens of the chunk, S slots, G key/value heads, K head size.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blip3o_jax import nn
from blip3o_jax.config import LanguageModelConfig


class Cache(NamedTuple):
    """Hold the keys and values of all layers and the segments of the slots.

    Where the layer loop is unrolled (`ar.unroll`) keys and values are a tuple of one array [B,
    G, S, K] a layer: reading a layer's slots out of one for all would copy them at every token.
    """

    k_YBGSK: jax.Array | tuple[jax.Array, ...]
    v_YBGSK: jax.Array | tuple[jax.Array, ...]
    segment_ids_BS: jax.Array  # int32; 0 for a slot that is empty or holds padding
    lengths_B: jax.Array  # int32; real tokens of each row so far = the position of its next token
    end: jax.Array  # int32 scalar; the first slot not yet written


def empty(cfg: LanguageModelConfig, batch: int, capacity: int) -> Cache:
    """Return an empty cache of `capacity` slots a row, in the compute dtype."""
    shape, axes = (
        (batch, cfg.num_key_value_heads, capacity, cfg.head_dim),
        ("batch", "act_kv_heads", None, None),
    )
    zeros: jax.Array | tuple[jax.Array, ...]
    if cfg.unroll:
        # The same array in every place: values are immutable, and each layer's is replaced by its
        # first write.
        zeros = (nn.constrain(jnp.zeros(shape, cfg.dtype), *axes),) * cfg.num_hidden_layers
    else:
        zeros = nn.constrain(jnp.zeros((cfg.num_hidden_layers, *shape), cfg.dtype), None, *axes)
    integers = jnp.zeros((batch, capacity), jnp.int32)
    return Cache(zeros, zeros, integers, jnp.zeros(batch, jnp.int32), jnp.zeros((), jnp.int32))


def reserve(cache: Cache, segment_ids_BL: jax.Array) -> tuple[Cache, jax.Array]:
    """Take the next L slots -> (cache, positions [B, L] of the chunk's tokens).

    The keys and values of every layer are then written with `write`, at the *old* cache's `end`.
    """
    real_BL = (segment_ids_BL != 0).astype(jnp.int32)
    # Padding in the chunk repeats the position of the token before it. Nothing reads it, since no
    # query attends to segment 0.
    positions_BL = cache.lengths_B[:, None] + jnp.cumsum(real_BL, axis=1) - 1
    segment_ids_BS = jax.lax.dynamic_update_slice(
        cache.segment_ids_BS, segment_ids_BL.astype(jnp.int32), (0, cache.end)
    )
    cache = cache._replace(
        segment_ids_BS=segment_ids_BS,
        lengths_B=cache.lengths_B + real_BL.sum(axis=1),
        end=cache.end + segment_ids_BL.shape[1],
    )
    return cache, positions_BL


def repeat(cache: Cache, rows: Callable[[jax.Array], jax.Array]) -> Cache:
    """Return the cache with `rows`, a function of arrays that lead with the batch, applied to every
    such array.
    """
    # The stacked form has the layers in front of the batch, so that `rows` is mapped over them.
    per_layer = lambda k: tuple(map(rows, k)) if isinstance(k, tuple) else jax.vmap(rows)(k)
    return cache._replace(
        k_YBGSK=per_layer(cache.k_YBGSK),
        v_YBGSK=per_layer(cache.v_YBGSK),
        segment_ids_BS=rows(cache.segment_ids_BS),
        lengths_B=rows(cache.lengths_B),
    )


def write(
    cached_YBGSK: jax.Array, new_BLGK: jax.Array, layer: jax.Array | None, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Write one layer's chunk at `slot` -> (the whole array, that layer's slots [B, S, G, K]).
    Layer None: the array is one layer's already.
    """
    new_BGLK = new_BLGK.swapaxes(1, 2).astype(cached_YBGSK.dtype)
    if layer is None:
        cached_YBGSK = cached_BGSK = jax.lax.dynamic_update_slice(
            cached_YBGSK, new_BGLK, (0, 0, slot, 0)
        )
    else:
        cached_YBGSK = jax.lax.dynamic_update_slice(
            cached_YBGSK, new_BGLK[None], (layer, 0, 0, slot, 0)
        )
        # Read back from the updated array: the chunk's queries attend to its own keys too.
        cached_BGSK = jax.lax.dynamic_index_in_dim(cached_YBGSK, layer, keepdims=False)
    return cached_YBGSK, cached_BGSK.swapaxes(1, 2)
