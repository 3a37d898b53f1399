"""Predict the velocity of latents with SANA, a linear-attention diffusion transformer.

Sources: arXiv 2410.10629, 2501.18427; matches `diffusers.SanaTransformer2DModel`.
`SanaTransformer.prepare` computes every layer's cross-attention keys and values of the condition,
which do not depend on the latents or the timestep, so that a sampler computes them once; `velocity`
computes the rest. The published model has no position embeddings: the zero padding of the depthwise
convolutions encodes positions, which is slow to learn from random weights. `interpolation_scale`
adds sine-cosine positions. Any H x W is supported in both cases.

Latents of reference images can be concatenated to the right of the noisy ones (`LatentConcat`;
BLIP3o-NEXT, arXiv 2510.15857, "noise-space injection"). The network then runs on the wider map and
returns the velocity of the noisy part. An empty reference slot is equivalent to a map that ends
before it: no token attends to it, and convolutions have zeros there.

B batch, H W latent height and width, R reference slots, C channels, P patch side, N = H W (1
+ R) / P^2 latent tokens, T condition tokens, D width, A attention heads, K head size, F width of
the feed-forward, Y layers (stacked).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.config import SanaConfig
from blip3o_jax.dit.linear_attention import LinearAttention, across_heads_norm, apply_norm
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

# The initialiser of the time embedding in PixArt and SANA: modulations start near zero, so each
# block's gated branches do too.
TIME_INIT = nn.normal(0.02)
# Almost 0: the initial velocity is then close to 0, the mean of the target. It is not exactly 0, so
# that the layers below receive gradients from the first step, even if proj_out is frozen.
OUTPUT_INIT = nn.normal(1e-3)


class Context(NamedTuple):
    """Hold every layer's cross-attention keys (normed) and values of the condition.

    A batch of 1 is broadcast to every row.
    """

    k_YBTAK: jax.Array
    v_YBTAK: jax.Array
    mask_BT: jax.Array | None  # True where there is a token; None: everywhere


class CrossAttention(nnx.Module):
    """Attend from latent tokens to condition tokens by softmax attention.

    q and k are normalised over all heads together.
    """

    def __init__(self, cfg: SanaConfig, *, rngs: nnx.Rngs):
        d = cfg.hidden_size
        types: dict[str, Any] = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        self.head_dim = cfg.cross_attention_head_dim
        self.q = nn.Linear(d, d, ("embed", "heads"), rngs=rngs, lora=cfg.lora.of("q"), **types)
        self.k = nn.Linear(d, d, ("embed", "heads"), rngs=rngs, lora=cfg.lora.of("k"), **types)
        self.v = nn.Linear(d, d, ("embed", "heads"), rngs=rngs, lora=cfg.lora.of("v"), **types)
        self.o = nn.Linear(d, d, ("heads", "embed"), rngs=rngs, lora=cfg.lora.of("o"), **types)
        self.q_norm = across_heads_norm(cfg, rngs)
        self.k_norm = across_heads_norm(cfg, rngs)

    def keys_values(self, condition_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return k and v, [B, T, A, K] each."""
        axes = (_batch_axis(condition_BTD), "condition_tokens")
        k_BTAK = self._heads(apply_norm(self.k_norm, self.k(condition_BTD)), *axes)
        return k_BTAK, self._heads(self.v(condition_BTD), *axes)

    def __call__(
        self, x_BND: jax.Array, k_BTAK: jax.Array, v_BTAK: jax.Array, mask_BT: jax.Array | None
    ) -> jax.Array:
        if k_BTAK.shape[1] == 1 and mask_BT is None:
            # Attention over a single token returns its value for every query: the unconditional
            # branch in sampling.
            o_B1D = self.o(v_BTAK.reshape(v_BTAK.shape[0], 1, -1))
            return jnp.broadcast_to(o_B1D, x_BND.shape)
        q_BNAK = self._heads(apply_norm(self.q_norm, self.q(x_BND)), "batch", "latent_tokens")
        rows = q_BNAK.shape[0]
        # A condition of one row serves the whole batch; `dot_product_attention` does not broadcast
        # it.
        k_BTAK, v_BTAK = (jnp.broadcast_to(y, (rows, *y.shape[1:])) for y in (k_BTAK, v_BTAK))
        mask_B11T = (
            None
            if mask_BT is None
            else jnp.broadcast_to(mask_BT, (rows, mask_BT.shape[1]))[:, None, None, :]
        )
        o_BNAK = jax.nn.dot_product_attention(q_BNAK, k_BTAK, v_BTAK, mask=mask_B11T)
        return self.o(o_BNAK.reshape(x_BND.shape))

    def _heads(self, x: jax.Array, rows: str | None, tokens: str) -> jax.Array:
        return nn.constrain(
            x.reshape(*x.shape[:2], -1, self.head_dim), rows, tokens, "act_heads", None
        )


class MixFfn(nnx.Module):
    """Apply a gated feed-forward with a depthwise 3x3 convolution between its projections.

    The convolution mixes neighbouring tokens.
    """

    def __init__(self, cfg: SanaConfig, *, rngs: nnx.Rngs):
        d = cfg.hidden_size
        f = int(cfg.mlp_ratio * cfg.hidden_size)
        types: dict[str, Any] = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        self.expand = nn.Linear(
            d, 2 * f, ("embed", "mlp"), rngs=rngs, lora=cfg.lora.of("expand"), **types
        )
        self.depthwise = nn.DepthwiseConv(2 * f, 3, rngs=rngs, axis="mlp", **types)
        # No bias, as in the published weights (`GLUMBConv`).
        self.contract = nn.Linear(
            f, d, ("mlp", "embed"), rngs=rngs, lora=cfg.lora.of("contract"), bias=False, **types
        )

    def __call__(
        self, x_BND: jax.Array, grid: tuple[int, int], mask_BN: jax.Array | None = None
    ) -> jax.Array:
        batch, tokens, _ = x_BND.shape
        h_BNF = nn.constrain(jax.nn.silu(self.expand(x_BND)), "batch", "latent_tokens", "act_mlp")
        if mask_BN is not None:
            # Zeros for empty reference slots, as the convolution has beyond the map's edge: the
            # slot has no influence on its neighbour.
            h_BNF = jnp.where(mask_BN[..., None], h_BNF, 0)
        h_BNF = self.depthwise(h_BNF.reshape(batch, *grid, -1)).reshape(batch, tokens, -1)
        value_BNF, gate_BNF = jnp.split(h_BNF, 2, axis=-1)
        return self.contract(
            nn.constrain(value_BNF * jax.nn.silu(gate_BNF), "batch", "latent_tokens", "act_mlp")
        )


class Block(nnx.Module):
    """Apply linear self-attention, cross-attention and feed-forward.

    The timestep modulates and gates the self-attention and the feed-forward.
    """

    def __init__(self, cfg: SanaConfig, *, rngs: nnx.Rngs):
        self.self_attention = LinearAttention(cfg, rngs=rngs)
        self.cross_attention = CrossAttention(cfg, rngs=rngs)
        self.ffn = MixFfn(cfg, rngs=rngs)
        self.scale_shift_table = _modulation_table(cfg, 6, rngs)

    def __call__(
        self,
        x_BND: jax.Array,
        modulation_B6D: jax.Array,
        key_value: tuple[jax.Array, jax.Array],
        mask_BT: jax.Array | None,
        grid: tuple[int, int],
        mask_BN: jax.Array | None = None,
    ) -> jax.Array:
        """Return [B, N, D]; `mask_BT` is of the condition, `mask_BN` of the latent tokens."""
        table_6D = self.scale_shift_table[...].astype(x_BND.dtype)
        # The table is each block's own offset to the modulations that all blocks share (PixArt's
        # adaLN-single).
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            table_6D + modulation_B6D, 6, axis=1
        )  # [B, 1, D] each
        with jax.named_scope("self_attention"):
            x_BND = _constrain_residual(
                x_BND + gate1 * self.self_attention(_modulate(x_BND, shift1, scale1), mask_BN)
            )
        with jax.named_scope("cross_attention"):
            # No norm, modulation or gate here, as in the stock class.
            x_BND = _constrain_residual(x_BND + self.cross_attention(x_BND, *key_value, mask_BT))
        with jax.named_scope("ffn"):
            return _constrain_residual(
                x_BND + gate2 * self.ffn(_modulate(x_BND, shift2, scale2), grid, mask_BN)
            )


class TimeEmbedding(nnx.Module):
    """Embed the timestep and compute the six modulations that all blocks share."""

    def __init__(self, cfg: SanaConfig, *, rngs: nnx.Rngs):
        d = cfg.hidden_size
        types: dict[str, Any] = {
            "dtype": cfg.dtype,
            "param_dtype": cfg.param_dtype,
            "init": TIME_INIT,
        }
        self.linear_1 = nn.Linear(TIME_CHANNELS, d, (None, "mlp"), rngs=rngs, **types)
        self.linear_2 = nn.Linear(d, d, ("mlp", "embed"), rngs=rngs, **types)
        self.modulation = nn.Linear(d, 6 * d, ("embed", "mlp"), rngs=rngs, **types)

    def __call__(self, timestep_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the embedding [B, D] and the modulations [B, 6, D] of timesteps [B]."""
        embedding_BD = self.linear_2(jax.nn.silu(self.linear_1(sinusoid(timestep_B))))
        return embedding_BD, self.modulation(jax.nn.silu(embedding_BD)).reshape(
            embedding_BD.shape[0], 6, -1
        )


class CaptionProjection(nnx.Module):
    """Project condition channels to the width by Linear, GELU, Linear."""

    def __init__(self, cfg: SanaConfig, *, rngs: nnx.Rngs):
        d = cfg.hidden_size
        types: dict[str, Any] = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        self.linear_1 = nn.Linear(cfg.caption_channels, d, ("embed", "mlp"), rngs=rngs, **types)
        self.linear_2 = nn.Linear(d, d, ("mlp", "embed"), rngs=rngs, **types)

    def __call__(self, condition_BTC: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.gelu(self.linear_1(condition_BTC), approximate=True))


class SanaTransformer(nnx.Module):
    """Predict the velocity from noisy latents, timestep and condition.

    Partial training selects parameters by path: the attributes `caption_projection`,
    `caption_norm`, `patch_embed` and `proj_out` are that interface, and no other path contains
    these words.
    """

    def __init__(self, cfg: SanaConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d = cfg.hidden_size
        patch = cfg.patch_size
        types: dict[str, Any] = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        self.patch_embed = nn.Conv(
            cfg.in_channels, d, patch, rngs=rngs, axes=("conv_in", "embed"), stride=patch, **types
        )
        self.time_embed = TimeEmbedding(cfg, rngs=rngs)
        self.caption_projection = CaptionProjection(cfg, rngs=rngs)
        self.caption_norm = nn.RMSNorm(d, rngs=rngs, eps=1e-5, param_dtype=cfg.param_dtype)
        self.blocks = nn.stack(lambda rngs: Block(cfg, rngs=rngs), cfg.num_layers, rngs)
        self.scale_shift_table = _modulation_table(cfg, 2, rngs)
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
        """Return the velocity [B, H, W, C] in the compute dtype.

        `timestep_B` is 1000 sigma, float, in [0, 1000]. The mask is True on condition tokens; every
        row has at least one.
        """
        return self.velocity(
            z_BHWC, timestep_B, self.prepare(condition_BTC, condition_mask_BT), latent_concat
        )

    def prepare(self, condition_BTC: jax.Array, mask_BT: jax.Array | None = None) -> Context:
        """Compute the values that depend only on the condition [B, T, C]."""
        with jax.named_scope("condition"):
            condition_BTD = self.caption_norm(self.caption_projection(condition_BTC))
            condition_BTD = nn.constrain(
                condition_BTD, _batch_axis(condition_BTD), "condition_tokens", "act_embed"
            )

            def step(
                layer: CrossAttention, carry: None, _: None
            ) -> tuple[None, tuple[jax.Array, jax.Array]]:
                return carry, layer.keys_values(condition_BTD)

            _, (k_YBTAK, v_YBTAK) = nn.scan(
                # A stack has the attributes of its layers, which its type does not state.
                self.blocks.cross_attention,  # type: ignore[attr-defined]
                step,
                None,
                remat=self.cfg.remat,
                unroll=self.cfg.unroll,
            )
        return Context(k_YBTAK, v_YBTAK, mask_BT)

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
        height, width = z_BHWC.shape[1:3]
        patch = self.cfg.patch_size
        if height % patch or width % patch:
            raise ValueError(
                f"latents of {height} x {width}: both sides must be multiples of "
                f"dit.patch_size={patch}"
            )
        # The grid of the output; `grid` includes the references to its right.
        noisy_grid = (height // patch, width // patch)
        count = 0 if latent_concat is None else latent_concat.z_BRHWC.shape[1]
        grid = (noisy_grid[0], noisy_grid[1] * (1 + count))
        mask_BN = None
        if latent_concat is not None:
            z_BHWC = concat_width(
                jnp.concatenate(
                    [z_BHWC[:, None], latent_concat.z_BRHWC.astype(z_BHWC.dtype)], axis=1
                )
            )
            mask_BN = token_mask(latent_concat.mask_BR, noisy_grid)
        with jax.named_scope("embed"):
            x_BND = self.patch_embed(z_BHWC).reshape(z_BHWC.shape[0], grid[0] * grid[1], -1)
            if self.cfg.interpolation_scale is not None:
                # Added in the compute dtype; the table is computed in float32 while tracing.
                x_BND += positions(self.cfg, noisy_grid, 1 + count).astype(x_BND.dtype)
            embedding_BD, modulation_B6D = self.time_embed(timestep_B)

        def step(
            block: Block, x_BND: jax.Array, key_value: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, None]:
            return block(x_BND, modulation_B6D, key_value, context.mask_BT, grid, mask_BN), None

        keys_values = (context.k_YBTAK, context.v_YBTAK)
        x_BND, _ = nn.scan(
            self.blocks,
            step,
            _constrain_residual(x_BND),
            keys_values,
            remat=self.cfg.remat,
            unroll=self.cfg.unroll,
        )
        with jax.named_scope("output"):
            if latent_concat is not None:
                # Only the noisy part has a velocity: the references' tokens are dropped before the
                # output projection.
                x_BND = _constrain_residual(first_map(x_BND, grid, noisy_grid[1]))
            # The last modulation adds the time embedding itself, not its projection by
            # `time_embed.modulation`.
            table_2D = self.scale_shift_table[...].astype(x_BND.dtype)
            shift_B1D, scale_B1D = jnp.split(table_2D + embedding_BD[:, None], 2, axis=1)
            return unpatchify(
                self.proj_out(_modulate(x_BND, shift_B1D, scale_B1D)), noisy_grid, patch
            )


def positions(cfg: SanaConfig, grid: tuple[int, int], maps: int = 1) -> np.ndarray:
    """Return positions [rows columns, D], float32: sines and cosines of the column, then of the row
    (`diffusers.PatchEmbed`, "sincos"). Both count from 0 to `sample_size / patch_size` over the
    whole side, whatever the grid, divided by `interpolation_scale`. Of `maps` side by side the
    columns of each go on where those of the one before end, [rows maps columns, D].
    """
    base = cfg.sample_size // cfg.patch_size
    indices = [np.arange(n) for n in (grid[0], maps * grid[1])]
    rows, columns = [
        # In diffusers' order of float32 divisions, which decides the last bit.
        c.astype(np.float32) / np.float32(n / base) / np.float32(cfg.interpolation_scale)
        for c, n in zip(indices, grid, strict=True)
    ]
    return sincos(rows, columns, cfg.hidden_size)


def _modulate(x_BND: jax.Array, shift_B1D: jax.Array, scale_B1D: jax.Array) -> jax.Array:
    return nn.standardise(x_BND, 1e-6) * (1 + scale_B1D) + shift_B1D


def _constrain_residual(x_BND: jax.Array) -> jax.Array:
    return nn.constrain(x_BND, "batch", "latent_tokens", "act_embed")


def _batch_axis(condition: jax.Array) -> str | None:
    """Return the logical name of the leading dimension.

    A condition of one row is broadcast to the whole batch and is not sharded.
    """
    return None if condition.shape[0] == 1 else "batch"


def _modulation_table(cfg: SanaConfig, rows: int, rngs: nnx.Rngs) -> nnx.Param:
    init = nn.normal(cfg.hidden_size**-0.5)
    return nn.param(rngs, (rows, cfg.hidden_size), (None, "embed"), init, cfg.param_dtype)
