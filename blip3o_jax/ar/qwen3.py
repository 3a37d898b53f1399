"""Define the Qwen3 decoder; it matches `transformers.Qwen3ForCausalLM`.

B batch, L tokens, D width, H query heads, G key/value heads, K head size.
"""

import jax
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.ar import attention
from blip3o_jax.ar.decoder import Decoder, linear, norm
from blip3o_jax.config import Qwen3Config


class Attention(nnx.Module):
    """Project to queries, keys and values and back, with a norm over each head of q and k."""

    def __init__(self, cfg: Qwen3Config, *, rngs: nnx.Rngs):
        d, heads, kv_heads = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads
        self.head_dim = cfg.head_dim
        self.q = linear(cfg, d, heads * cfg.head_dim, ("embed", "heads"), rngs, "q")
        self.k = linear(cfg, d, kv_heads * cfg.head_dim, ("embed", "kv_heads"), rngs, "k")
        self.v = linear(cfg, d, kv_heads * cfg.head_dim, ("embed", "kv_heads"), rngs, "v")
        self.o = linear(cfg, heads * cfg.head_dim, d, ("heads", "embed"), rngs, "o")
        self.q_norm = norm(cfg, cfg.head_dim, rngs)
        self.k_norm = norm(cfg, cfg.head_dim, rngs)

    def project_qkv(
        self, x_BLD: jax.Array, rotary: attention.RotaryEmbedding
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return q [B, L, H, K], k and v [B, L, G, K]; each head is normed, then rotated."""
        split = lambda y: y.reshape(*y.shape[:-1], -1, self.head_dim)
        q_BLHK = attention.apply_rotary_embedding(self.q_norm(split(self.q(x_BLD))), rotary)
        k_BLGK = attention.apply_rotary_embedding(self.k_norm(split(self.k(x_BLD))), rotary)
        v_BLGK = split(self.v(x_BLD))
        kv_axes = ("batch", "length", "act_kv_heads", None)
        q_BLHK = nn.constrain(q_BLHK, "batch", "length", "act_heads", None)
        return q_BLHK, nn.constrain(k_BLGK, *kv_axes), nn.constrain(v_BLGK, *kv_axes)

    def project_out(self, o_BLHK: jax.Array) -> jax.Array:
        """Project attention outputs [B, L, H, K] to [B, L, D]."""
        return self.o(o_BLHK.reshape(*o_BLHK.shape[:2], -1))


class Qwen3(Decoder):
    """Run the decoder with a norm over each head of queries and keys."""

    def __init__(self, cfg: Qwen3Config, *, rngs: nnx.Rngs):
        super().__init__(cfg, Attention, rngs=rngs)
