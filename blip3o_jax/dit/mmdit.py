"""Predict the velocity of latents with MMDiT, the transformer of Stable Diffusion 3.

Source: arXiv 2403.03206; matches `diffusers.SD3Transformer2DModel`.

Latent tokens and condition tokens are two streams with separate weights, which attend to each other
in every layer. Timestep and mean of the condition tokens modulate both. Positions are sines and
cosines, counted from the middle of a table of `pos_embed_max_size` tokens a side.

Latents of reference images stand to the right of the noisy ones (`LatentConcat`), their columns
counted on; no token sees an empty reference slot.

B batch, H W latent height and width, C channels, N latent tokens, T condition tokens, S = N + T
keys, D width, A attention heads, K head size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.config import MMDiTConfig
from blip3o_jax.dit.protocol import LatentConcat
from blip3o_jax.dit.tokens import (
    TIME_CHANNELS,
    concat_width,
    first_map,
    sincos,
    sinusoid,
    token_mask,
    unpatchify,
)

EPS = 1e-6
# Modulations and velocities start near zero, as in SANA (sana.py), not at it: gradients reach
# everything below from the first step on.
MODULATION_INIT = nn.normal(0.02)
OUTPUT_INIT = nn.normal(1e-3)

QueryKeyValue = tuple[jax.Array, jax.Array, jax.Array]


class Context(NamedTuple):
    """Hold the condition's tokens at the network's width, and the embedding of their mean."""

    tokens_BTD: jax.Array
    pooled_BD: jax.Array
    mask_BT: jax.Array | None  # True where there is a token; None: everywhere


class TwoLayers(nnx.Module):
    """Embed the timestep's sinusoid or the condition's mean by Linear, SiLU, Linear."""

    def __init__(self, cfg: MMDiTConfig, d_in: int, axis: str | None, *, rngs: nnx.Rngs):
        d, types = cfg.hidden_size, _types(cfg)
        self.linear_1 = nn.Linear(d_in, d, (axis, "mlp"), rngs=rngs, **types)
        self.linear_2 = nn.Linear(d, d, ("mlp", "embed"), rngs=rngs, **types)

    def __call__(self, x_BX: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x_BX)))


class Projections(nnx.Module):
    """Project one stream to q, k and v; with `qk_norm`, each head of q and k is normed."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        d, axes, lora = cfg.hidden_size, ("embed", "heads"), cfg.lora.of
        self.head_dim = cfg.attention_head_dim
        self.q = nn.Linear(d, d, axes, rngs=rngs, lora=lora("q"), **_types(cfg))
        self.k = nn.Linear(d, d, axes, rngs=rngs, lora=lora("k"), **_types(cfg))
        self.v = nn.Linear(d, d, axes, rngs=rngs, lora=lora("v"), **_types(cfg))
        self.q_norm = _head_norm(cfg, rngs)
        self.k_norm = _head_norm(cfg, rngs)

    def __call__(self, x_BND: jax.Array) -> QueryKeyValue:
        """Return q, k and v, [B, N, A, K] each."""
        split = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)
        normed = lambda norm, y: y if norm is None else norm(y)
        q_BNAK = normed(self.q_norm, split(self.q(x_BND)))
        return q_BNAK, normed(self.k_norm, split(self.k(x_BND))), split(self.v(x_BND))


class Stream(nnx.Module):
    """Run one stream of a block: attention and feed-forward, modulated by adaLN."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        d, types = cfg.hidden_size, _types(cfg)
        self.modulation = _modulation(cfg, 6, rngs)
        self.attention = Projections(cfg, rngs=rngs)
        lora = cfg.lora.of
        self.o = nn.Linear(d, d, ("heads", "embed"), rngs=rngs, lora=lora("o"), **types)
        self.up = nn.Linear(d, 4 * d, ("embed", "mlp"), rngs=rngs, lora=lora("up"), **types)
        self.down = nn.Linear(4 * d, d, ("mlp", "embed"), rngs=rngs, lora=lora("down"), **types)

    def pre_attention(
        self, x_BND: jax.Array, vector_BD: jax.Array
    ) -> tuple[QueryKeyValue, tuple[jax.Array, ...]]:
        """Return q, k and v, and the modulations [B, 1, D] for `post_attention`."""
        # The order of SD3's adaLN-zero: shift, scale, gate of attention, then shift, scale, gate of
        # the MLP.
        shift, scale, *rest = _split(self.modulation, vector_BD, 6)
        return self.attention(_modulate(x_BND, shift, scale)), tuple(rest)

    def post_attention(
        self, x_BND: jax.Array, o_BNAK: jax.Array, rest: tuple[jax.Array, ...], axis: str
    ) -> jax.Array:
        """Return the stream after the residuals of attention and feed-forward.

        `axis` is the logical name of its tokens.
        """
        gate1, shift, scale, gate2 = rest
        o_BND = self.o(o_BNAK.reshape(*o_BNAK.shape[:2], -1))
        x_BND = nn.constrain(x_BND + gate1 * o_BND, "batch", axis, "act_embed")
        h_BNF = jax.nn.gelu(self.up(_modulate(x_BND, shift, scale)), approximate=True)
        y_BND = self.down(nn.constrain(h_BNF, "batch", axis, "act_mlp"))
        return nn.constrain(x_BND + gate2 * y_BND, "batch", axis, "act_embed")


class Block(nnx.Module):
    """Run both streams, which share one attention."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        self.latents = Stream(cfg, rngs=rngs)
        self.context = Stream(cfg, rngs=rngs)

    def __call__(
        self, x_BND: jax.Array, c_BTD: jax.Array, vector_BD: jax.Array, mask_BS: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        (q, k, v), rest = self.latents.pre_attention(x_BND, vector_BD)
        (q_context, *key_value), context_rest = self.context.pre_attention(c_BTD, vector_BD)
        # Latents first, condition second, the order of `_join_masks`. The streams' queries attend
        # separately to the joint keys, so that each keeps its own sharding of tokens.
        k_BSAK, v_BSAK = _join(k, key_value[0]), _join(v, key_value[1])
        o_BNAK = _attend(q, k_BSAK, v_BSAK, mask_BS, "latent_tokens")
        o_BTAK = _attend(q_context, k_BSAK, v_BSAK, mask_BS, "condition_tokens")
        x_BND = self.latents.post_attention(x_BND, o_BNAK, rest, "latent_tokens")
        return x_BND, self.context.post_attention(c_BTD, o_BTAK, context_rest, "condition_tokens")


class LastContext(nnx.Module):
    """Project the condition in the last block, which does not update it.

    The stock class stores its query projection, which is unused.
    """

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        self.modulation = _modulation(cfg, 2, rngs)
        self.attention = Projections(cfg, rngs=rngs)

    def __call__(self, c_BTD: jax.Array, vector_BD: jax.Array) -> QueryKeyValue:
        # Scale before shift, the order of diffusers' `AdaLayerNormContinuous`.
        scale, shift = _split(self.modulation, vector_BD, 2)
        return self.attention(_modulate(c_BTD, shift, scale))


class LastBlock(nnx.Module):
    """Run the last block, which returns only the latents."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        self.latents = Stream(cfg, rngs=rngs)
        self.context = LastContext(cfg, rngs=rngs)

    def __call__(
        self, x_BND: jax.Array, c_BTD: jax.Array, vector_BD: jax.Array, mask_BS: jax.Array | None
    ) -> jax.Array:
        (q, k, v), rest = self.latents.pre_attention(x_BND, vector_BD)
        _, k_context, v_context = self.context(c_BTD, vector_BD)
        o_BNAK = _attend(q, _join(k, k_context), _join(v, v_context), mask_BS, "latent_tokens")
        return self.latents.post_attention(x_BND, o_BNAK, rest, "latent_tokens")


class MMDiT(nnx.Module):
    """Predict the velocity; implements `dit.protocol.DiffusionHead`."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, patch, types = cfg.hidden_size, cfg.patch_size, _types(cfg)
        axes = ("conv_in", "embed")
        self.patch_embed = nn.Conv(
            cfg.in_channels, d, patch, rngs=rngs, axes=axes, stride=patch, **types
        )
        self.time_embed = TwoLayers(cfg, TIME_CHANNELS, None, rngs=rngs)
        self.caption_pooled = TwoLayers(cfg, cfg.pooled_projection_dim, "embed", rngs=rngs)
        self.caption_projection = nn.Linear(
            cfg.joint_attention_dim, d, ("embed", "mlp"), rngs=rngs, **types
        )
        # The last block has other parameters and cannot be one of the stack.
        self.blocks = nn.stack(lambda rngs: Block(cfg, rngs=rngs), cfg.num_layers - 1, rngs)
        self.last_block = LastBlock(cfg, rngs=rngs)
        self.modulation = _modulation(cfg, 2, rngs)
        self.proj_out = nn.Linear(
            d, patch**2 * cfg.out_channels, ("embed", None), rngs=rngs, init=OUTPUT_INIT, **types
        )

    def __call__(
        self,
        z_BHWC: jax.Array,
        timestep_B: jax.Array,
        condition_BTC: jax.Array,
        condition_mask_BT: jax.Array | None = None,
        latent_concat: LatentConcat | None = None,
    ) -> jax.Array:
        """Return the velocity [B, H, W, C] in the compute dtype."""
        context = self.prepare(condition_BTC, condition_mask_BT)
        return self.velocity(z_BHWC, timestep_B, context, latent_concat)

    def prepare(self, condition_BTC: jax.Array, mask_BT: jax.Array | None = None) -> Context:
        """Compute the values that depend only on the condition [B, T, C]."""
        with jax.named_scope("condition"):
            # The mean over the condition's tokens is in the place of SD3's pooled text embedding.
            # It is in float32, a sum over hundreds of tokens.
            weight_BT1 = jnp.ones((*condition_BTC.shape[:2], 1), jnp.float32)
            if mask_BT is not None:
                weight_BT1 = jnp.where(mask_BT[..., None], weight_BT1, 0)
            mean_BC = jnp.sum(condition_BTC.astype(jnp.float32) * weight_BT1, axis=1)
            mean_BC = (mean_BC / jnp.sum(weight_BT1, axis=1)).astype(condition_BTC.dtype)
            pooled_BD = self.caption_pooled(mean_BC)
            return Context(self.caption_projection(condition_BTC), pooled_BD, mask_BT)

    def velocity(
        self,
        z_BHWC: jax.Array,
        timestep_B: jax.Array,
        context: Context,
        latent_concat: LatentConcat | None = None,
    ) -> jax.Array:
        """Return the velocity [B, H, W, C] for a prepared condition.

        Raises ValueError unless H and W are multiples of the patch size.
        """
        (batch, height, width), patch = z_BHWC.shape[:3], self.cfg.patch_size
        if height % patch or width % patch:
            raise ValueError(
                f"latents of {height} x {width} are not a multiple of dit.patch_size={patch} on "
                "both sides"
            )
        one, maps, mask_BN = (height // patch, width // patch), 1, None
        if latent_concat is not None:
            references_BRHWC = latent_concat.z_BRHWC.astype(z_BHWC.dtype)
            maps += references_BRHWC.shape[1]
            z_BHWC = concat_width(jnp.concatenate([z_BHWC[:, None], references_BRHWC], axis=1))
            mask_BN = token_mask(latent_concat.mask_BR, one)
        grid = (one[0], one[1] * maps)
        with jax.named_scope("embed"):
            x_BND = self.patch_embed(z_BHWC).reshape(batch, grid[0] * grid[1], -1)
            x_BND += positions(self.cfg, one, maps).astype(x_BND.dtype)
            x_BND = nn.constrain(x_BND, "batch", "latent_tokens", "act_embed")
            vector_BD = self.time_embed(sinusoid(timestep_B)) + context.pooled_BD
            c_BTD = jnp.broadcast_to(context.tokens_BTD, (batch, *context.tokens_BTD.shape[1:]))
            c_BTD = nn.constrain(c_BTD, "batch", "condition_tokens", "act_embed")
            mask_BS = _join_masks(mask_BN, context.mask_BT, x_BND, c_BTD)

        def step(
            block: Block, carry: tuple[jax.Array, jax.Array], _: None
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            x_BND, c_BTD = carry
            return block(x_BND, c_BTD, vector_BD, mask_BS), None

        (x_BND, c_BTD), _ = nn.scan(
            self.blocks, step, (x_BND, c_BTD), remat=self.cfg.remat, unroll=self.cfg.unroll
        )
        x_BND = self.last_block(x_BND, c_BTD, vector_BD, mask_BS)
        with jax.named_scope("output"):
            # The references only inform: their tokens are dropped before the output projection.
            x_BND = x_BND if maps == 1 else first_map(x_BND, grid, one[1])
            x_BND = nn.constrain(x_BND, "batch", "latent_tokens", "act_embed")
            scale, shift = _split(self.modulation, vector_BD, 2)
            return unpatchify(self.proj_out(_modulate(x_BND, shift, scale)), one, patch)


def positions(cfg: MMDiTConfig, grid: tuple[int, int], maps: int = 1) -> np.ndarray:
    """Return positions [rows * maps * columns, D], float32, for maps of `grid` (rows, columns).

    They are the centre of the table; the columns of further maps continue to the right.
    """
    largest, base = cfg.pos_embed_max_size, cfg.sample_size // cfg.patch_size
    # A centred crop of the table, as in diffusers: a smaller image has the middle of a larger one's
    # positions.
    top, left = ((largest - side) // 2 for side in grid)
    unit = np.float32(largest / base)
    rows = np.arange(top, top + grid[0]).astype(np.float32) / unit
    columns = np.arange(left, left + maps * grid[1]).astype(np.float32) / unit
    return sincos(rows, columns, cfg.hidden_size)


def _types(cfg: MMDiTConfig) -> dict[str, Any]:
    return {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}


def _head_norm(cfg: MMDiTConfig, rngs: nnx.Rngs) -> nn.RMSNorm | None:
    if cfg.qk_norm is None:
        return None
    return nn.RMSNorm(cfg.attention_head_dim, rngs=rngs, eps=EPS, param_dtype=cfg.param_dtype)


def _modulation(cfg: MMDiTConfig, count: int, rngs: nnx.Rngs) -> nn.Linear:
    d, axes = cfg.hidden_size, ("embed", "mlp")
    return nn.Linear(d, count * d, axes, rngs=rngs, init=MODULATION_INIT, **_types(cfg))


def _split(modulation: nn.Linear, vector_BD: jax.Array, count: int) -> list[jax.Array]:
    """Return `count` modulations [B, 1, D]."""
    return jnp.split(modulation(jax.nn.silu(vector_BD))[:, None], count, axis=-1)


def _modulate(x_BND: jax.Array, shift_B1D: jax.Array, scale_B1D: jax.Array) -> jax.Array:
    return nn.standardise(x_BND, EPS) * (1 + scale_B1D) + shift_B1D


def _join(of_latents: jax.Array, of_context: jax.Array) -> jax.Array:
    """Return keys or values [B, S, A, K] of both streams.

    They are not sharded over tokens, even if the queries are.
    """
    joined = jnp.concatenate([of_latents, of_context], axis=1)
    return nn.constrain(joined, "batch", None, "act_heads", None)


def _join_masks(
    mask_BN: jax.Array | None, mask_BT: jax.Array | None, x_BND: jax.Array, c_BTD: jax.Array
) -> jax.Array | None:
    """Return the mask [B, S] of the keys; None if all are attended to."""
    if mask_BN is None and mask_BT is None:
        return None
    full = lambda x, mask: (
        jnp.ones(x.shape[:2], bool) if mask is None else jnp.broadcast_to(mask, x.shape[:2])
    )
    return jnp.concatenate([full(x_BND, mask_BN), full(c_BTD, mask_BT)], axis=1)


def _attend(
    q_BNAK: jax.Array, k_BSAK: jax.Array, v_BSAK: jax.Array, mask_BS: jax.Array | None, axis: str
) -> jax.Array:
    """Return softmax attention [B, N, A, K] in the dtype of `v`, over the keys in `mask_BS`."""
    with jax.named_scope("attention"):
        q_BNAK = nn.constrain(q_BNAK, "batch", axis, "act_heads", None)
        scores_BANS = jnp.einsum(
            "BNAK,BSAK->BANS", q_BNAK, k_BSAK, preferred_element_type=jnp.float32
        )
        scores_BANS *= q_BNAK.shape[-1] ** -0.5
        if mask_BS is not None:
            # Finite, so that a row without any key has no NaN (ar/attention.py).
            lowest = jnp.finfo(jnp.float32).min
            scores_BANS = jnp.where(mask_BS[:, None, None], scores_BANS, lowest)
        weights_BANS = jax.nn.softmax(scores_BANS, axis=-1).astype(v_BSAK.dtype)
        return jnp.einsum("BANS,BSAK->BNAK", weights_BANS, v_BSAK)
