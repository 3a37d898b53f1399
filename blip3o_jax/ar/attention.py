"""Compute rotary position embeddings and causal grouped-query attention within segments.

B batch, L query tokens, S key slots, H query heads, G key/value heads, R query heads per key/value
head, K head size.
"""

import functools
import logging
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax import nn
from blip3o_jax.ar.splash import splash
from blip3o_jax.config import ConfigError

RotaryEmbedding = tuple[jax.Array, jax.Array]


def rotary_embedding(positions_BL: jax.Array, head_dim: int, theta: float) -> RotaryEmbedding:
    """Return cosines and sines [B, L, K/2], float32, of the angles position * theta^(-2i/K).

    Matches `Qwen3RotaryEmbedding`. They are in float32 for every compute dtype, since bfloat16
    rounds positions 1000 and 1001 to the same value.
    """
    # The frequencies are constants of the model: NumPy computes them in float64 while tracing, and
    # they are rounded to float32 once.
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    angles = positions_BL[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary_embedding(x_BLHK: jax.Array, rotary_embedding: RotaryEmbedding) -> jax.Array:
    """Rotate the pairs (x_i, x_{i + K/2}) of every head (rotate-half), in float32."""
    # The pairs are (i, i + K/2) as in the published Qwen checkpoints, not the adjacent (2i, 2i + 1)
    # of the RoFormer paper: q and k projections are stored in this order.
    cos, sin = (a[:, :, None, :] for a in rotary_embedding)
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x_BLHK.dtype)


def attend(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    query_segments_BL: jax.Array,
    key_segments_BS: jax.Array,
    query_start: jax.Array | int = 0,
    implementation: str = "auto",
) -> jax.Array:
    """Attend causally within segments -> [B, L, H, K] in the dtype of `v`.

    Query l is at slot query_start + l and attends to slots up to its own. Segment 0 is padding: no
    query attends to it, and its outputs are zero. Query head h uses key/value head h // (H / G).
    When a row is sharded, queries stay sharded and keys and values are gathered: with few key/value
    heads they are small compared with the activations. Raises ConfigError for a kernel of another
    platform.
    """
    # A traced start means decoding on a cache: the slots after the queries are not in use yet.
    if implementation == "auto":
        implementation = default_implementation(
            nn.platform(), v_BSGK.dtype.name, whole_rows=isinstance(query_start, int)
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is not one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if nn.platform() not in PLATFORMS.get(implementation, (nn.platform(),)):
        raise ConfigError(
            f"ar.attention={implementation!r} is a kernel of "
            f"{PLATFORMS[implementation][0].upper()}s and this runs on a {nn.platform().upper()}: "
            "set 'auto', the fastest implementation of each platform, or 'xla'"
        )
    # "keys" is a separate logical axis from "length": it gathers keys and values, while the queries
    # stay sharded where the strategy shards the rows of a sequence.
    keys_at = ("batch", "keys", "act_kv_heads", None)
    k_BSGK = nn.constrain(k_BSGK, *keys_at)
    v_BSGK = nn.constrain(v_BSGK, *keys_at)
    o_BLHK = IMPLEMENTATIONS[implementation](
        q_BLHK, k_BSGK, v_BSGK, query_segments_BL, key_segments_BS, query_start
    )
    # Implementations differ at padding queries (the softmax of `_xla` is uniform over masked keys):
    # zeros make them agree.
    return jnp.where(query_segments_BL[:, :, None, None] != 0, o_BLHK, 0)


def attention_mask(
    query_segments_BL: jax.Array, key_segments_BS: jax.Array, query_start: jax.Array | int
) -> jax.Array:
    """Return the boolean mask [B, L, S].

    For one row with query_start 0, segments 1 1 2 0 give

    1 0 0 0
    1 1 0 0
    0 0 1 0
    0 0 0 0
    """
    # Causality is between slots, not positions: padding takes up slots but has no position.
    slots_L = query_start + jnp.arange(query_segments_BL.shape[1])
    causal_LS = jnp.arange(key_segments_BS.shape[1])[None, :] <= slots_L[:, None]
    same_BLS = query_segments_BL[:, :, None] == key_segments_BS[:, None, :]
    return causal_LS & same_BLS & (key_segments_BS != 0)[:, None, :]


def _xla(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    query_segments_BL: jax.Array,
    key_segments_BS: jax.Array,
    query_start: jax.Array | int,
) -> jax.Array:
    B, L, H, K = q_BLHK.shape
    G = k_BSGK.shape[2]
    # Heads precede tokens in all factors, the layout of a batched product: otherwise XLA transposes
    # them on CPUs.
    q_BGRLK = q_BLHK.reshape(B, L, G, H // G, K).transpose(0, 2, 3, 1, 4)
    # The scope marks the products over pairs of positions, of which half are seen (train/flops.py).
    with jax.named_scope("pairs"):
        scores = (
            jnp.einsum("BGRLK,BSGK->BGRLS", q_BGRLK, k_BSGK, preferred_element_type=jnp.float32)
            * K**-0.5
        )
    mask_BLS = attention_mask(query_segments_BL, key_segments_BS, query_start)
    # The mask value is finite: all keys of a padding query are masked, and a softmax over -inf only
    # is NaN, as is its gradient.
    scores = jnp.where(mask_BLS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    # The weights are rounded to the compute dtype only after the softmax, as in transformers' eager
    # attention.
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    with jax.named_scope("pairs"):
        o_BGRLK = jnp.einsum("BGRLS,BSGK->BGRLK", weights, v_BSGK)
    return o_BGRLK.transpose(0, 3, 1, 2, 4).reshape(B, L, H, K)


def dot_product(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    query_segments_BL: jax.Array,
    key_segments_BS: jax.Array,
    query_start: jax.Array | int,
    *,
    implementation: Literal["xla", "cudnn"],
) -> jax.Array:
    """Call `jax.nn.dot_product_attention` with "cudnn" (flash attention), or "xla" for tests."""
    mask_BLS = attention_mask(query_segments_BL, key_segments_BS, query_start)
    return jax.nn.dot_product_attention(
        q_BLHK, k_BSGK, v_BSGK, mask=mask_BLS[:, None], implementation=implementation
    )


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": _xla,
    "cudnn": functools.partial(dot_product, implementation="cudnn"),
    "splash": splash,
}
PLATFORMS = {"cudnn": ("gpu", "cuda"), "splash": ("tpu",)}  # others run on every platform


@functools.cache
def default_implementation(platform: str, dtype: str, *, whole_rows: bool) -> str:
    """Return the implementation that "auto" selects, and log it once for each case.

    Decoding, with one query against a cache, is bound by memory bandwidth: kernels do not help.
    """
    name = "xla"
    if whole_rows and platform in PLATFORMS["splash"]:
        name = "splash"
    # cuDNN has no flash attention for float32.
    elif whole_rows and platform in PLATFORMS["cudnn"] and dtype in ("bfloat16", "float16"):
        name = "cudnn"
    rows = "whole rows" if whole_rows else "a cache"
    logging.getLogger(__name__).info(
        "attention over %s in %s on %s: %s", rows, dtype, platform, name
    )
    return name
