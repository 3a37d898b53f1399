"""Run a pre-norm decoder with rotary grouped-query attention and SwiGLU, on rows or with a cache.

The Qwen families (qwen2.py, qwen3.py) share it and define their attention projections. The tables
have `cfg.padded_vocab_size` rows, a multiple that shards evenly. Rows from `cfg.vocab_size` are
padding: `Decoder.logits` sets them to -inf, so that they have probability 0 and no gradient.

B batch, L tokens, S cache slots, D width, H query heads, G key/value heads, K head size, F width of
the MLP, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.ar import attention, cache
from blip3o_jax.ar.logits import project
from blip3o_jax.config import QwenConfig


class AttentionProjections(Protocol):
    """Define a family's attention projections; `attention.attend` runs between the methods."""

    def project_qkv(
        self, x_BLD: jax.Array, rotary: attention.RotaryEmbedding
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return rotated queries [B, L, H, K], rotated keys and values [B, L, G, K]."""
        ...

    def project_out(self, o_BLHK: jax.Array) -> jax.Array:
        """Project attention outputs [B, L, H, K] to [B, L, D]."""
        ...


class Mlp(nnx.Module):
    """Apply the SwiGLU feed-forward to each token."""

    def __init__(self, cfg: QwenConfig, *, rngs: nnx.Rngs):
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.gate = linear(cfg, d, f, ("embed", "mlp"), rngs, "gate")
        self.up = linear(cfg, d, f, ("embed", "mlp"), rngs, "up")
        self.down = linear(cfg, f, d, ("mlp", "embed"), rngs, "down")

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        h_BLF = jax.nn.silu(self.gate(x_BLD)) * self.up(x_BLD)
        return self.down(nn.constrain(h_BLF, "batch", "length", "act_mlp"))


class Layer(nnx.Module):
    """Run one decoder layer in two halves, `pre_attention` and `post_attention`.

    Attention on whole rows or on the cache runs between them.
    """

    def __init__(
        self, cfg: QwenConfig, projections: Callable[..., AttentionProjections], *, rngs: nnx.Rngs
    ):
        self.attention_norm = norm(cfg, cfg.hidden_size, rngs)
        self.attention = projections(cfg, rngs=rngs)
        self.mlp_norm = norm(cfg, cfg.hidden_size, rngs)
        self.mlp = Mlp(cfg, rngs=rngs)

    def pre_attention(
        self, x_BLD: jax.Array, rotary: attention.RotaryEmbedding
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the layer's q, k and v for its input [B, L, D]."""
        with jax.named_scope("attention"):
            return self.attention.project_qkv(self.attention_norm(x_BLD), rotary)

    def post_attention(self, x_BLD: jax.Array, o_BLHK: jax.Array) -> jax.Array:
        """Return the layer's output [B, L, D] for its input and attention outputs."""
        with jax.named_scope("attention"):
            x_BLD = nn.constrain(
                x_BLD + self.attention.project_out(o_BLHK), "batch", "length", "act_embed"
            )
        with jax.named_scope("mlp"):
            return nn.constrain(
                x_BLD + self.mlp(self.mlp_norm(x_BLD)), "batch", "length", "act_embed"
            )


class Decoder(nnx.Module):
    """Map embeddings to hidden states; `embed` and `logits` convert from and to token ids.

    The input is embeddings, so that projected image features can replace some of them. It
    implements `ar.protocol.LanguageModel`.
    """

    def __init__(
        self, cfg: QwenConfig, projections: Callable[..., AttentionProjections], *, rngs: nnx.Rngs
    ):
        """Create the layers; `projections` is the class of their `AttentionProjections`."""
        self.cfg = cfg
        rows, d = cfg.padded_vocab_size, cfg.hidden_size
        self.embedding = nn.param(
            rngs, (rows, d), ("vocab", "embed"), nn.normal(cfg.embedding_std), cfg.param_dtype
        )
        self.layers = nn.stack(
            lambda rngs: Layer(cfg, projections, rngs=rngs), cfg.num_hidden_layers, rngs
        )
        self.norm = norm(cfg, d, rngs)
        self.lm_head = (
            None
            if cfg.tie_word_embeddings
            else linear(cfg, d, rows, ("embed", "vocab"), rngs, "lm_head")
        )

    def embed(self, tokens_BL: jax.Array) -> jax.Array:
        """Return the embeddings [B, L, D] of ids in the compute dtype.

        Each device looks up its columns of the table for the rows of all devices that share the
        table; then the rows are redistributed. So the table and its gradient stay sharded.
        """
        with jax.named_scope("embed"):
            # "lookup_batch" omits the mesh axis that shards the table's width: the lookup then
            # needs no gather of the table, and the gradient's scatter stays on the same shards.
            tokens_BL = nn.constrain(tokens_BL, "lookup_batch", "length")
            x_BLD = self.embedding[...][tokens_BL].astype(self.cfg.dtype)
            x_BLD = nn.constrain(x_BLD, "lookup_batch", "length", "embed")
            return nn.constrain(x_BLD, "batch", "length", "act_embed")

    def __call__(
        self, x_BLD: jax.Array, positions_BL: jax.Array, segment_ids_BL: jax.Array
    ) -> jax.Array:
        """Return hidden states [B, L, D] after the final norm.

        Matches `last_hidden_state` of `Qwen2Model` and `Qwen3Model`. Tokens attend to earlier
        tokens of their segment; segment 0 is padding, whose hidden states are undefined.
        `positions_BL` restart at 0 with each segment.
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
        rows = (x_BND.shape[0], x_BND.shape[1])
        prompt_rotary, rotary = self._rotary_embeddings(segment_ids_PL, rows, repeat)
        # Segment 1 is the prompt's segment too, so that the tokens continue it.
        own_BN = jnp.ones(x_BND.shape[:2], jnp.int32)
        key_segments_BS = jnp.concatenate([repeat(segment_ids_PL), own_BN], axis=1)
        attend = functools.partial(attention.attend, implementation=self.cfg.attention)

        def step(
            layer: Layer, carry: tuple[jax.Array, jax.Array], _: None
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            # Both streams run through the layer together: a prompt's keys and values of this layer
            # are needed by its continuations in this layer only, and storing all layers' would cost
            # a cache.
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
        # Slots before the first real token (the prompt that the unconditional branch masks) would
        # count as -1.
        prompt_PL = jnp.maximum(jnp.cumsum(real_PL, axis=1) - 1, 0)
        after_BN = repeat(real_PL.sum(axis=1))[:, None] + jnp.arange(rows[1])
        embed = lambda positions: attention.rotary_embedding(
            positions, self.cfg.head_dim, self.cfg.rope_theta
        )
        return embed(prompt_PL), embed(after_BN)

    def start_decoding(
        self, batch: int, capacity: int
    ) -> tuple[cache.Cache, list[nnx.Module] | None]:
        """Return an empty cache of `capacity` slots per row, and the layers for `extend`.

        The layers are unstacked with `cfg.unroll`, else None.
        """
        layers = nn.unstack(self.layers) if self.cfg.unroll else None
        return cache.empty(self.cfg, batch, capacity), layers

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
                    # The segments of the slots after this chunk are still 0, which masks what those
                    # slots hold.
                    key_segments_BS=present.segment_ids_BS,
                    query_start=past.end,
                )
            return (layer.post_attention(x_BLD, o_BLHK), k_YBGSK, v_YBGSK), None

        if self.cfg.unroll:
            ks, vs = [], []
            unstacked = layers or cast("list[Layer]", nn.unstack(self.layers))
            for layer, *cached in zip(unstacked, past.k_YBGSK, past.v_YBGSK, strict=True):
                (x_BLD, k_BGSK, v_BGSK), _ = step(layer, (x_BLD, *cached), None)
                ks.append(k_BGSK)
                vs.append(v_BGSK)
            k_YBGSK = tuple(ks)
            v_YBGSK = tuple(vs)
        else:
            carry = (x_BLD, past.k_YBGSK, past.v_YBGSK)
            indices = jnp.arange(self.cfg.num_hidden_layers)
            # No remat: decoding has no backward pass, and the barriers would only prevent fusion.
            (x_BLD, k_YBGSK, v_YBGSK), _ = nn.scan(
                self.layers, step, carry, indices, remat="none", unroll=False
            )
        return self.norm(x_BLD), present._replace(k_YBGSK=k_YBGSK, v_YBGSK=v_YBGSK)

    def head(self, rows: tuple[int, int] | None = None) -> jax.Array:
        """Return the output projection [D, V] as stored, or its columns rows[0] .. rows[1] - 1.

        The stored one includes the padding columns.
        """
        first, last = rows or (0, self.cfg.padded_vocab_size)
        return (
            self.embedding[first:last].T
            if self.lm_head is None
            else self.lm_head.kernel[:, first:last]
        )

    def logits(self, hidden_BLD: jax.Array, rows: tuple[int, int] | None = None) -> jax.Array:
        """Return float32 logits [..., V] of all stored rows, or of ids rows[0] .. rows[1] - 1.

        Padding rows have -inf.
        """
        first, last = rows or (0, self.cfg.padded_vocab_size)
        logits_BLV = project(hidden_BLD, self.head(rows))
        # No padding among these columns, so that the mask would be a no-op over a large array.
        if last <= self.cfg.vocab_size:
            return logits_BLV
        return jnp.where(jnp.arange(first, last) < self.cfg.vocab_size, logits_BLV, -jnp.inf)


def linear(
    cfg: QwenConfig,
    d_in: int,
    d_out: int,
    axes: tuple[str, str],
    rngs: nnx.Rngs,
    name: str,
    *,
    bias: bool = False,
) -> nn.Linear:
    """Return a linear layer with the settings of `cfg`, and with LoRA if it selects `name`."""
    # Qwen initialises all projections with one standard deviation, not by fan-in.
    own: dict[str, Any] = {"init": nn.normal(cfg.initializer_range), "lora": cfg.lora.of(name)}
    return nn.Linear(
        d_in,
        d_out,
        axes,
        rngs=rngs,
        bias=bias,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        **own,
    )


def norm(cfg: QwenConfig, dim: int, rngs: nnx.Rngs) -> nn.RMSNorm:
    """Return the RMSNorm of `cfg` over `dim` channels."""
    return nn.RMSNorm(dim, rngs=rngs, eps=cfg.rms_norm_eps, param_dtype=cfg.param_dtype)
