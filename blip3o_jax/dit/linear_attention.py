"""Compute ReLU linear attention (SANA, arXiv 2410.10629, section 2.2).

Its cost is linear in the number of tokens.

    o_n = sum_m relu(q_n) . relu(k_m) v_m / (sum_m relu(q_n) . relu(k_m) + eps)
        = relu(q_n) (sum_m relu(k_m) v_m^T) / (relu(q_n) . sum_m relu(k_m) + eps)

B batch, N tokens, H heads, K head size, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.config import SanaConfig


def relu_linear_attention(
    q_BNHK: jax.Array,
    k_BNHK: jax.Array,
    v_BNHK: jax.Array,
    mask_BN: jax.Array | None = None,
    *,
    eps: float = 1e-15,
) -> jax.Array:
    """Attend by the second form of the module's equation -> [B, N, H, K] in the dtype of `v`.

    Matches diffusers' `SanaLinearAttnProcessor2_0`. Only tokens m in `mask_BN` are summed (None:
    all). diffusers appends a row of ones to v, so that one product gives numerator and denominator;
    summing k separately gives the same without a copy of v and keeps the head size a power of two.
    """
    # The ratio of sums over thousands of tokens is in float32, since bfloat16 has 8 bits. TPUs
    # round float32 factors to bfloat16 by default; HIGHEST avoids it, and costs little, since a
    # head's state is only K x K.
    exact = jax.lax.Precision.HIGHEST
    f32 = jnp.float32
    q_BNHK = jax.nn.relu(q_BNHK).astype(f32)
    k_BNHK = jax.nn.relu(k_BNHK).astype(f32)
    if mask_BN is not None:
        # Zero keys leave both sums unchanged, so that masked tokens need no other treatment.
        k_BNHK = jnp.where(mask_BN[..., None, None], k_BNHK, 0)
    state_BHKV = jnp.einsum("BNHK,BNHV->BHKV", k_BNHK, v_BNHK.astype(f32), precision=exact)
    numerator_BNHV = jnp.einsum("BNHK,BHKV->BNHV", q_BNHK, state_BHKV, precision=exact)
    denominator_BNH = jnp.einsum("BNHK,BHK->BNH", q_BNHK, jnp.sum(k_BNHK, axis=1), precision=exact)
    return (numerator_BNHV / (denominator_BNH[..., None] + eps)).astype(v_BNHK.dtype)


class LinearAttention(nnx.Module):
    """Apply the self-attention of a SANA block.

    Input projections have no bias; q and k are normalised over all heads together.
    """

    def __init__(self, cfg: SanaConfig, *, rngs: nnx.Rngs):
        d = cfg.hidden_size
        types: dict[str, Any] = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        self.head_dim = cfg.attention_head_dim
        self.q = nn.Linear(
            d, d, ("embed", "heads"), rngs=rngs, lora=cfg.lora.of("q"), bias=False, **types
        )
        self.k = nn.Linear(
            d, d, ("embed", "heads"), rngs=rngs, lora=cfg.lora.of("k"), bias=False, **types
        )
        self.v = nn.Linear(
            d, d, ("embed", "heads"), rngs=rngs, lora=cfg.lora.of("v"), bias=False, **types
        )
        self.o = nn.Linear(d, d, ("heads", "embed"), rngs=rngs, lora=cfg.lora.of("o"), **types)
        self.q_norm = across_heads_norm(cfg, rngs)
        self.k_norm = across_heads_norm(cfg, rngs)

    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array | None = None) -> jax.Array:
        q_BNHK, k_BNHK, v_BNHK = (
            nn.constrain(
                y.reshape(*y.shape[:2], -1, self.head_dim),
                "batch",
                "latent_tokens",
                "act_heads",
                None,
            )
            for y in (
                # The norm precedes the split into heads: it is over the whole width.
                apply_norm(self.q_norm, self.q(x_BND)),
                apply_norm(self.k_norm, self.k(x_BND)),
                self.v(x_BND),
            )
        )
        return self.o(relu_linear_attention(q_BNHK, k_BNHK, v_BNHK, mask_BN).reshape(x_BND.shape))


def across_heads_norm(cfg: SanaConfig, rngs: nnx.Rngs) -> nn.RMSNorm | None:
    """Return the norm of q or k that `cfg.qk_norm` names, or None.

    It is over the whole width, before the split into heads.
    """
    if cfg.qk_norm is None:
        return None
    return nn.RMSNorm(cfg.hidden_size, rngs=rngs, eps=1e-5, param_dtype=cfg.param_dtype)


def apply_norm(norm: nn.RMSNorm | None, x: jax.Array) -> jax.Array:
    """Apply `norm`, or return `x` if it is None."""
    return x if norm is None else norm(x)
