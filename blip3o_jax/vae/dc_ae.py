"""Encode images to latents and decode them: the deep-compression autoencoder (DC-AE).

Matches `diffusers.AutoencoderDC`, with NHWC for its NCHW. Each side of a latent is 2^(stages - 1)
times smaller than the image's. Latents are raw: the caller applies `scaling_factor`. The blocks of
a stage are stacked and scanned, so that compile time does not grow with depth.

Shape suffixes: B batch, H height, W width, C channels.
"""

from typing import Any

import jax
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.config import DcAeConfig
from blip3o_jax.vae import blocks
from blip3o_jax.vae.blocks import NORM_EPS, DownBlock, UpBlock


class Stage(nnx.Module):
    """Hold the blocks of one resolution and the resampling to the next one.

    The encoder runs `resample` after the blocks, the decoder before them.
    """

    def __init__(self, stacked: nnx.Module | None, resample: nnx.Module | None):
        self.blocks = stacked
        self.resample = resample


class Encoder(nnx.Module):
    """Encode images [B, H, W, 3] to raw latents [B, H/f, W/f, C]; stages run finest first."""

    def __init__(self, cfg: DcAeConfig, *, rngs: nnx.Rngs):
        types: dict[str, Any] = {"rngs": rngs, "dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        channels, layers = cfg.encoder_block_out_channels, cfg.encoder_layers_per_block
        kind, last = cfg.downsample_block_type, len(channels) - 1
        self.conv_in: nn.Conv | DownBlock
        if layers[0]:
            self.conv_in = nn.Conv(cfg.in_channels, channels[0], 3, padding=1, **types)
        else:
            # A first stage without blocks is only a resampling of the image, so that the stem goes
            # to the second stage's width.
            self.conv_in = DownBlock(cfg.in_channels, channels[1], kind, shortcut=False, **types)
        self.stages: nnx.List[Stage] = nnx.List()
        for i, (name, scales) in enumerate(
            zip(cfg.encoder_block_types, cfg.encoder_qkv_multiscales, strict=True)
        ):
            stacked = blocks.stage_blocks(
                name, layers[i], channels[i], cfg.attention_head_dim, scales, **types
            )
            step = i < last and layers[i] > 0
            down = (
                DownBlock(channels[i], channels[i + 1], kind, shortcut=True, **types)
                if step
                else None
            )
            self.stages.append(Stage(stacked, down))
        self.conv_out = nn.Conv(channels[-1], cfg.latent_channels, 3, padding=1, **types)
        self.latent_channels = cfg.latent_channels
        self.remat = cfg.remat
        self.unroll = cfg.unroll

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h_BHWC = self.conv_in(x_BHWC)
        for i, stage in enumerate(self.stages):
            with jax.named_scope(f"encoder_stage_{i}"):
                h_BHWC = blocks.run_blocks(
                    stage.blocks, h_BHWC, remat=self.remat, unroll=self.unroll
                )
                h_BHWC = h_BHWC if stage.resample is None else stage.resample(h_BHWC)
        return self.conv_out(h_BHWC) + blocks.average_channels(h_BHWC, self.latent_channels)


class Decoder(nnx.Module):
    """Decode raw latents to images; `stages` are numbered finest first and run in reverse."""

    def __init__(self, cfg: DcAeConfig, *, rngs: nnx.Rngs):
        types: dict[str, Any] = {"rngs": rngs, "dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        channels, layers = cfg.decoder_block_out_channels, cfg.decoder_layers_per_block
        kind, last = cfg.upsample_block_type, len(channels) - 1
        self.conv_in = nn.Conv(cfg.latent_channels, channels[-1], 3, padding=1, **types)
        self.stages: nnx.List[Stage] = nnx.List()
        for i, (name, scales) in enumerate(
            zip(cfg.decoder_block_types, cfg.decoder_qkv_multiscales, strict=True)
        ):
            step = i < last and layers[i] > 0
            up = (
                UpBlock(channels[i + 1], channels[i], kind, shortcut=True, **types)
                if step
                else None
            )
            stacked = blocks.stage_blocks(
                name, layers[i], channels[i], cfg.attention_head_dim, scales, **types
            )
            self.stages.append(Stage(stacked, up))
        # As in the encoder, a first stage without blocks is merged into the convolution at the
        # image's end.
        width = channels[0] if layers[0] else channels[1]
        self.norm_out = nn.RMSNorm(
            width, eps=NORM_EPS, bias=True, rngs=rngs, param_dtype=cfg.param_dtype
        )
        self.conv_out: nn.Conv | UpBlock
        if layers[0]:
            self.conv_out = nn.Conv(width, cfg.in_channels, 3, padding=1, **types)
        else:
            self.conv_out = UpBlock(width, cfg.in_channels, kind, shortcut=False, **types)
        self.width_in = channels[-1]
        self.remat = cfg.remat
        self.unroll = cfg.unroll

    def __call__(self, z_BHWC: jax.Array) -> jax.Array:
        h_BHWC = self.conv_in(z_BHWC)
        h_BHWC = h_BHWC + blocks.repeat_channels(z_BHWC.astype(h_BHWC.dtype), self.width_in)
        for i, stage in reversed(list(enumerate(self.stages))):
            with jax.named_scope(f"decoder_stage_{i}"):
                h_BHWC = h_BHWC if stage.resample is None else stage.resample(h_BHWC)
                h_BHWC = blocks.run_blocks(
                    stage.blocks, h_BHWC, remat=self.remat, unroll=self.unroll
                )
        return self.conv_out(jax.nn.relu(self.norm_out(h_BHWC)))


class DcAe(nnx.Module):
    """Encode and decode images; matches `diffusers.AutoencoderDC`."""

    def __init__(self, cfg: DcAeConfig, *, rngs: nnx.Rngs):
        self.encoder = Encoder(cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)
        self.cfg = cfg

    def encode(self, x_BHWC: jax.Array) -> jax.Array:
        """Encode images [B, H, W, 3] in [-1, 1] to raw latents [B, H/f, W/f, latent_channels].

        f is `spatial_compression`. Raises ValueError when H or W is not a multiple of f.
        """
        factor = self.cfg.spatial_compression
        height, width = x_BHWC.shape[1:3]
        if height % factor or width % factor:
            near = " x ".join(
                str(max(1, round(side / factor)) * factor) for side in (height, width)
            )
            raise ValueError(
                f"the autoencoder cannot encode an image of {height} x {width} pixels: height and "
                f"width must be multiples of {factor}; resize it to {near}"
            )
        return self.encoder(x_BHWC)

    def decode(self, z_BHWC: jax.Array) -> jax.Array:
        """Decode raw latents [B, H, W, latent_channels] to images [B, f H, f W, 3].

        Pixels lie about in [-1, 1] and are not clipped.
        """
        return self.decoder(z_BHWC)
