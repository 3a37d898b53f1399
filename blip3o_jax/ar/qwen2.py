"""Define the Qwen2 and Qwen2.5 decoder; it matches `transformers.Qwen2ForCausalLM`.

Only full attention is supported.

B batch, L tokens, D width, H query heads, G key/value heads, K head size.
"""

import jax
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.ar import attention
from blip3o_jax.ar.decoder import Decoder, linear
from blip3o_jax.config import Qwen2Config


class Attention(nnx.Module):
    """Project to queries, keys and values with biases, and back without."""

    def __init__(self, cfg: Qwen2Config, *, rngs: nnx.Rngs):
        d, width = cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim
        kv_width = cfg.num_key_value_heads * cfg.head_dim
        self.head_dim = cfg.head_dim
        self.q = linear(cfg, d, width, ("embed", "heads"), rngs, "q", bias=True)
        self.k = linear(cfg, d, kv_width, ("embed", "kv_heads"), rngs, "k", bias=True)
        self.v = linear(cfg, d, kv_width, ("embed", "kv_heads"), rngs, "v", bias=True)
        self.o = linear(cfg, width, d, ("heads", "embed"), rngs, "o")

    def project_qkv(
        self, x_BLD: jax.Array, rotary: attention.RotaryEmbedding
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return q [B, L, H, K], k and v [B, L, G, K]; q and k are rotated."""
        split = lambda y: y.reshape(*y.shape[:-1], -1, self.head_dim)
        q_BLHK = attention.apply_rotary_embedding(split(self.q(x_BLD)), rotary)
        k_BLGK = attention.apply_rotary_embedding(split(self.k(x_BLD)), rotary)
        v_BLGK = split(self.v(x_BLD))
        kv_axes = ("batch", "length", "act_kv_heads", None)
        q_BLHK = nn.constrain(q_BLHK, "batch", "length", "act_heads", None)
        return q_BLHK, nn.constrain(k_BLGK, *kv_axes), nn.constrain(v_BLGK, *kv_axes)

    def project_out(self, o_BLHK: jax.Array) -> jax.Array:
        """Project attention outputs [B, L, H, K] to [B, L, D]."""
        return self.o(o_BLHK.reshape(*o_BLHK.shape[:2], -1))


class Qwen2(Decoder):
    """Run the decoder with biases of queries, keys and values."""

    def __init__(self, cfg: Qwen2Config, *, rngs: nnx.Rngs):
        super().__init__(cfg, Attention, rngs=rngs)
