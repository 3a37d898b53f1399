"""Qwen3 decoder: `transformers.Qwen3ForCausalLM`, also cached for decoding.

The tables hold `cfg.padded_vocab_size` rows, a multiple that shards evenly; rows from
`cfg.vocab_size` on stand for no token: `Qwen3.logits` gives them -inf, so that no probability falls
on them and they receive no gradient.

B batch, L tokens, S cache slots, D width, H query heads, G key/value heads, K head size, F width of
the MLP, V vocabulary.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.ar import attention, cache
from blip3o_jax.config import Qwen3Config


class Attention(nnx.Module):
    """Project to queries, keys and values and back; `attention.attend` runs between `project_qkv`
    and `project_out`.
    """

    def __init__(self, cfg: Qwen3Config, *, rngs: nnx.Rngs):
        d, heads, kv_heads = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads
        self.head_dim = cfg.head_dim
        self.q = _linear(cfg, d, heads * cfg.head_dim, ("embed", "heads"), rngs, "q")
        self.k = _linear(cfg, d, kv_heads * cfg.head_dim, ("embed", "kv_heads"), rngs, "k")
        self.v = _linear(cfg, d, kv_heads * cfg.head_dim, ("embed", "kv_heads"), rngs, "v")
        self.o = _linear(cfg, heads * cfg.head_dim, d, ("heads", "embed"), rngs, "o")
        self.q_norm = _norm(cfg, cfg.head_dim, rngs)
        self.k_norm = _norm(cfg, cfg.head_dim, rngs)

    def project_qkv(
        self, x_BLD: jax.Array, rotary: attention.RotaryEmbedding
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, L, H, K], k and v [B, L, G, K]; the norm is over each head, before the rotation."""
        split = lambda y: y.reshape(*y.shape[:-1], -1, self.head_dim)
        q_BLHK = attention.apply_rotary_embedding(self.q_norm(split(self.q(x_BLD))), rotary)
        k_BLGK = attention.apply_rotary_embedding(self.k_norm(split(self.k(x_BLD))), rotary)
        v_BLGK = split(self.v(x_BLD))
        kv_axes = ("batch", "length", "act_kv_heads", None)
        q_BLHK = nn.constrain(q_BLHK, "batch", "length", "act_heads", None)
        return q_BLHK, nn.constrain(k_BLGK, *kv_axes), nn.constrain(v_BLGK, *kv_axes)

    def project_out(self, o_BLHK: jax.Array) -> jax.Array:
        return self.o(o_BLHK.reshape(*o_BLHK.shape[:2], -1))


class Mlp(nnx.Module):
    """SwiGLU."""

    def __init__(self, cfg: Qwen3Config, *, rngs: nnx.Rngs):
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.gate = _linear(cfg, d, f, ("embed", "mlp"), rngs, "gate")
        self.up = _linear(cfg, d, f, ("embed", "mlp"), rngs, "up")
        self.down = _linear(cfg, f, d, ("mlp", "embed"), rngs, "down")

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        h_BLF = jax.nn.silu(self.gate(x_BLD)) * self.up(x_BLD)
        return self.down(nn.constrain(h_BLF, "batch", "length", "act_mlp"))


class Layer(nnx.Module):
    """One decoder layer in two halves, `pre_attention` and `post_attention`, since full and cached
    attention differ in what runs between them.
    """

    def __init__(self, cfg: Qwen3Config, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(cfg, cfg.hidden_size, rngs)
        self.attention = Attention(cfg, rngs=rngs)
        self.mlp_norm = _norm(cfg, cfg.hidden_size, rngs)
        self.mlp = Mlp(cfg, rngs=rngs)

    def pre_attention(
        self, x_BLD: jax.Array, rotary: attention.RotaryEmbedding
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        with jax.named_scope("attention"):
            return self.attention.project_qkv(self.attention_norm(x_BLD), rotary)

    def post_attention(self, x_BLD: jax.Array, o_BLHK: jax.Array) -> jax.Array:
        with jax.named_scope("attention"):
            x_BLD = nn.constrain(
                x_BLD + self.attention.project_out(o_BLHK), "batch", "length", "act_embed"
            )
        with jax.named_scope("mlp"):
            return nn.constrain(
                x_BLD + self.mlp(self.mlp_norm(x_BLD)), "batch", "length", "act_embed"
            )


class Qwen3(nnx.Module):
    """The decoder between token ids (`embed`) and logits (`logits`); its input is embeddings, so
    that projected image features can stand in for some of them.
    """

    def __init__(self, cfg: Qwen3Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        rows, d = cfg.padded_vocab_size, cfg.hidden_size
        self.embedding = nn.param(
            rngs, (rows, d), ("vocab", "embed"), nn.normal(cfg.embedding_std), cfg.param_dtype
        )
        self.layers = nn.stack(lambda rngs: Layer(cfg, rngs=rngs), cfg.num_hidden_layers, rngs)
        self.norm = _norm(cfg, d, rngs)
        self.lm_head = (
            None
            if cfg.tie_word_embeddings
            else _linear(cfg, d, rows, ("embed", "vocab"), rngs, "lm_head")
        )

    def embed(self, tokens_BL: jax.Array) -> jax.Array:
        """Ids -> embeddings [B, L, D] in the compute dtype. Each device looks up the columns that
        it holds for the rows of all that share the table, then the rows are handed out; so neither
        the table nor its gradient is ever whole.
        """
        with jax.named_scope("embed"):
            tokens_BL = nn.constrain(tokens_BL, "lookup_batch", "length")
            x_BLD = self.embedding[...][tokens_BL].astype(self.cfg.dtype)
            x_BLD = nn.constrain(x_BLD, "lookup_batch", "length", "embed")
            return nn.constrain(x_BLD, "batch", "length", "act_embed")

    def __call__(
        self, x_BLD: jax.Array, positions_BL: jax.Array, segment_ids_BL: jax.Array
    ) -> jax.Array:
        """Embeddings -> hidden states [B, L, D] after the final norm (`last_hidden_state` of
        `Qwen3Model`).

        Tokens see earlier tokens of their own segment; segment 0 is padding, whose hidden states
        mean nothing. `positions_BL` restart at 0 with each segment.
        """
        rotary = attention.rotary_embedding(positions_BL, self.cfg.head_dim, self.cfg.rope_theta)

        def step(layer: Layer, x_BLD: jax.Array, _: None) -> tuple[jax.Array, None]:
            q_BLHK, k_BLGK, v_BLGK = layer.pre_attention(x_BLD, rotary)
            with jax.named_scope("attention"):
                o_BLHK = attention.attend(
                    q_BLHK,
                    k_BLGK,
                    v_BLGK,
                    query_segments_BL=segment_ids_BL,
                    key_segments_BS=segment_ids_BL,
                    implementation=self.cfg.attention,
                )
            return layer.post_attention(x_BLD, o_BLHK), None

        x_BLD, _ = nn.scan(self.layers, step, x_BLD, remat=self.cfg.remat, unroll=self.cfg.unroll)
        return self.norm(x_BLD)

    def score_with_prefix(
        self,
        x_PLD: jax.Array,
        segment_ids_PL: jax.Array,
        x_BND: jax.Array,
        repeat: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Score given tokens after a shared prefix: P prompts and N tokens in each of B rows ->
        hidden states [P, L, D] and [B, N, D].

        Equal to `__call__` over B whole rows, prompt and tokens, but computes every prompt once.
        `repeat` repeats arrays that lead with P for the rows that continue them. Segment 0 marks
        padding in the prompts.
        """
        prompt_rotary, rotary = self._rotary_embeddings(segment_ids_PL, x_BND.shape[:2], repeat)
        own_BN = jnp.ones(x_BND.shape[:2], jnp.int32)
        key_segments_BS = jnp.concatenate([repeat(segment_ids_PL), own_BN], axis=1)
        attend = functools.partial(attention.attend, implementation=self.cfg.attention)

        def step(
            layer: Layer, carry: tuple[jax.Array, jax.Array], _: None
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            x_PLD, x_BND = carry
            q_PLHK, k_PLGK, v_PLGK = layer.pre_attention(x_PLD, prompt_rotary)
            q_BNHK, k_BNGK, v_BNGK = layer.pre_attention(x_BND, rotary)
            with jax.named_scope("attention"):
                o_PLHK = attend(
                    q_PLHK,
                    k_PLGK,
                    v_PLGK,
                    query_segments_BL=segment_ids_PL,
                    key_segments_BS=segment_ids_PL,
                )
                o_BNHK = attend(
                    q_BNHK,
                    jnp.concatenate([repeat(k_PLGK), k_BNGK], axis=1),
                    jnp.concatenate([repeat(v_PLGK), v_BNGK], axis=1),
                    query_segments_BL=own_BN,
                    key_segments_BS=key_segments_BS,
                    query_start=segment_ids_PL.shape[1],
                )
            return (layer.post_attention(x_PLD, o_PLHK), layer.post_attention(x_BND, o_BNHK)), None

        hidden, _ = nn.scan(
            self.layers, step, (x_PLD, x_BND), remat=self.cfg.remat, unroll=self.cfg.unroll
        )
        return self.norm(hidden[0]), self.norm(hidden[1])

    def _rotary_embeddings(
        self,
        segment_ids_PL: jax.Array,
        rows: tuple[int, int],
        repeat: Callable[[jax.Array], jax.Array],
    ) -> tuple[attention.RotaryEmbedding, attention.RotaryEmbedding]:
        """Return the rotations of the prompts' tokens, and of the tokens after them."""
        real_PL = (segment_ids_PL != 0).astype(jnp.int32)
        prompt_PL = jnp.maximum(jnp.cumsum(real_PL, axis=1) - 1, 0)
        after_BN = repeat(real_PL.sum(axis=1))[:, None] + jnp.arange(rows[1])
        embed = lambda positions: attention.rotary_embedding(
            positions, self.cfg.head_dim, self.cfg.rope_theta
        )
        return embed(prompt_PL), embed(after_BN)

    def extend(
        self,
        x_BLD: jax.Array,
        segment_ids_BL: jax.Array,
        past: cache.Cache,
        layers: list[Layer] | None = None,
    ) -> tuple[jax.Array, cache.Cache]:
        """Run the next L tokens of every row (a prompt, or one token) on the cache -> (hidden
        states [B, L, D], extended cache).

        Equal to `__call__` over all tokens so far. Segment 0 marks padding in the chunk. Writing
        past the cache's capacity is the caller's error and is not detected. `layers` are
        `self.layers` unstacked, for a token loop with `cfg.unroll`.
        """
        present, positions_BL = cache.reserve(past, segment_ids_BL)
        rotary = attention.rotary_embedding(positions_BL, self.cfg.head_dim, self.cfg.rope_theta)

        def step(layer: Layer, carry: tuple, index: jax.Array | None) -> tuple[tuple, None]:
            x_BLD, k_YBGSK, v_YBGSK = carry
            q_BLHK, k_BLGK, v_BLGK = layer.pre_attention(x_BLD, rotary)
            with jax.named_scope("attention"):
                k_YBGSK, k_BSGK = cache.write(k_YBGSK, k_BLGK, index, past.end)
                v_YBGSK, v_BSGK = cache.write(v_YBGSK, v_BLGK, index, past.end)
                o_BLHK = attention.attend(
                    q_BLHK,
                    k_BSGK,
                    v_BSGK,
                    query_segments_BL=segment_ids_BL,
                    key_segments_BS=present.segment_ids_BS,
                    query_start=past.end,
                )
            return (layer.post_attention(x_BLD, o_BLHK), k_YBGSK, v_YBGSK), None

        if self.cfg.unroll:
            ks, vs = [], []
            for layer, *cached in zip(
                layers or nn.unstack(self.layers), past.k_YBGSK, past.v_YBGSK, strict=True
            ):
                (x_BLD, k_BGSK, v_BGSK), _ = step(layer, (x_BLD, *cached), None)
                ks.append(k_BGSK)
                vs.append(v_BGSK)
            k_YBGSK, v_YBGSK = tuple(ks), tuple(vs)
        else:
            carry, indices = (
                (x_BLD, past.k_YBGSK, past.v_YBGSK),
                jnp.arange(self.cfg.num_hidden_layers),
            )
            (x_BLD, k_YBGSK, v_YBGSK), _ = nn.scan(
                self.layers, step, carry, indices, remat="none", unroll=False
            )
        return self.norm(x_BLD), present._replace(k_YBGSK=k_YBGSK, v_YBGSK=v_YBGSK)

    def head(self, rows: tuple[int, int] | None = None) -> jax.Array:
        """Return the output projection [D, V] as stored, padded rows' columns included, or its
        columns rows[0] .. rows[1] - 1.
        """
        first, last = rows or (0, self.cfg.padded_vocab_size)
        return (
            self.embedding[first:last].T
            if self.lm_head is None
            else self.lm_head.kernel[:, first:last]
        )

    def logits(self, hidden_BLD: jax.Array, rows: tuple[int, int] | None = None) -> jax.Array:
        """Return float32 logits [..., V] of all stored rows, -inf at the padded ones; or of ids
        rows[0] .. rows[1] - 1 only.
        """
        first, last = rows or (0, self.cfg.padded_vocab_size)
        logits_BLV = project(hidden_BLD, self.head(rows))
        if last <= self.cfg.vocab_size:
            return logits_BLV
        return jnp.where(jnp.arange(first, last) < self.cfg.vocab_size, logits_BLV, -jnp.inf)


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


def _linear(
    cfg: Qwen3Config, d_in: int, d_out: int, axes: tuple[str, str], rngs: nnx.Rngs, name: str
) -> nn.Linear:
    own = {"init": nn.normal(cfg.initializer_range), "lora": cfg.lora.of(name)}
    return nn.Linear(
        d_in,
        d_out,
        axes,
        rngs=rngs,
        bias=False,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        **own,
    )


def _norm(cfg: Qwen3Config, dim: int, rngs: nnx.Rngs) -> nn.RMSNorm:
    return nn.RMSNorm(dim, rngs=rngs, eps=cfg.rms_norm_eps, param_dtype=cfg.param_dtype)
