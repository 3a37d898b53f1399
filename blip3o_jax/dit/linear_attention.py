"""ReLU linear attention (SANA, arXiv 2410.10629, section 2.2): linear in the number of tokens.

    o_n = sum_m relu(q_n) . relu(k_m) v_m / (sum_m relu(q_n) . relu(k_m) + eps)
        = relu(q_n) (sum_m relu(k_m) v_m^T) / (relu(q_n) . sum_m relu(k_m) + eps)

B batch, N tokens, H heads, K head size, D width.
"""

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
    """Compute the second form above -> [B, N, H, K] in the dtype of `v`; diffusers'
    `SanaLinearAttnProcessor2_0`. Only the tokens m that `mask_BN` sets are summed; all where it is
    None.

    diffusers appends a row of ones to v so that one product gives numerator and denominator;
    summing k beside it is the same without copying v, and keeps the head size a power of two.
    """
    # Sums over thousands of tokens, then a ratio: all in float32, since bfloat16 holds 8 bits. A
    # TPU rounds float32 factors to bfloat16 unless told not to; at K x K a head, exact products
    # cost next to nothing beside the projections.
    exact, f32 = jax.lax.Precision.HIGHEST, jnp.float32
    q_BNHK, k_BNHK = jax.nn.relu(q_BNHK).astype(f32), jax.nn.relu(k_BNHK).astype(f32)
    if mask_BN is not None:
        k_BNHK = jnp.where(mask_BN[..., None, None], k_BNHK, 0)
    state_BHKV = jnp.einsum("BNHK,BNHV->BHKV", k_BNHK, v_BNHK.astype(f32), precision=exact)
    numerator_BNHV = jnp.einsum("BNHK,BHKV->BNHV", q_BNHK, state_BHKV, precision=exact)
    denominator_BNH = jnp.einsum("BNHK,BHK->BNH", q_BNHK, jnp.sum(k_BNHK, axis=1), precision=exact)
    return (numerator_BNHV / (denominator_BNH[..., None] + eps)).astype(v_BNHK.dtype)


class LinearAttention(nnx.Module):
    """Self-attention of a SANA block: projections without bias, q and k normalised over all heads
    together.
    """

    def __init__(self, cfg: SanaConfig, *, rngs: nnx.Rngs):
        d, types = cfg.hidden_size, {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
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
                apply_norm(self.q_norm, self.q(x_BND)),
                apply_norm(self.k_norm, self.k(x_BND)),
                self.v(x_BND),
            )
        )
        return self.o(relu_linear_attention(q_BNHK, k_BNHK, v_BNHK, mask_BN).reshape(x_BND.shape))


def across_heads_norm(cfg: SanaConfig, rngs: nnx.Rngs) -> nn.RMSNorm | None:
    """Return the norm of q or k that `cfg.qk_norm` names, over the whole width, before the split
    into heads; None for no norm.
    """
    if cfg.qk_norm is None:
        return None
    return nn.RMSNorm(cfg.hidden_size, rngs=rngs, eps=1e-5, param_dtype=cfg.param_dtype)


def apply_norm(norm: nn.RMSNorm | None, x: jax.Array) -> jax.Array:
    """Apply `norm`, or return `x` where there is none."""
    return x if norm is None else norm(x)
