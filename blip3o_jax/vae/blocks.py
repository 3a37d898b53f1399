"""Define the blocks of the deep-compression autoencoder (DC-AE, arXiv 2410.10733).

They match those of `diffusers.AutoencoderDC`. `ResBlock` and `EfficientVitBlock` are residual
blocks at one resolution; `DownBlock` and `UpBlock` change it by a factor of 2 and have a
parameter-free shortcut that moves pixels into channels and back.

Shape suffixes: B batch, H height, W width, C channels, N pixels (H * W), G groups of q, k, v (heads
x scales), K head size.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax import nn

NORM_EPS = 1e-5
ATTENTION_EPS = 1e-15


def pixel_unshuffle(x_BHWC: jax.Array) -> jax.Array:
    """Move 2 x 2 blocks into channels: [B, H, W, C] -> [B, H/2, W/2, 4 C].

    The output channel is c * 4 + dy * 2 + dx; matches `torch.nn.functional.pixel_unshuffle` by 2.
    """
    batch, height, width, channels = x_BHWC.shape
    x = x_BHWC.reshape(batch, height // 2, 2, width // 2, 2, channels)
    # Channel before offset (c, dy, dx), torch's order; the published convolutions depend on it.
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // 2, width // 2, 4 * channels)


def pixel_shuffle(x_BHWC: jax.Array) -> jax.Array:
    """Invert `pixel_unshuffle`: [B, H, W, 4 C] -> [B, 2 H, 2 W, C]."""
    batch, height, width, channels = x_BHWC.shape
    x = x_BHWC.reshape(batch, height, width, channels // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, channels // 4)


def average_channels(x_BHWC: jax.Array, channels: int) -> jax.Array:
    """Average groups of consecutive channels: [B, H, W, C] -> [B, H, W, channels]."""
    return x_BHWC.reshape(*x_BHWC.shape[:3], channels, -1).mean(-1)


def repeat_channels(x_BHWC: jax.Array, channels: int) -> jax.Array:
    """Repeat each channel consecutively: [B, H, W, C] -> [B, H, W, channels]."""
    return jnp.repeat(x_BHWC, channels // x_BHWC.shape[-1], axis=-1)


def constrain(x_BHWC: jax.Array) -> jax.Array:
    """Constrain the sharding of an image or latent (`nn.constrain`)."""
    return nn.constrain(x_BHWC, "batch", "height", "width", "channels")


class ResBlock(nnx.Module):
    """Compute x + norm(conv(silu(conv(x)))) with 3 x 3 convolutions."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        types = {"dtype": dtype, "param_dtype": param_dtype}
        self.conv1 = nn.Conv(channels, channels, 3, padding=1, rngs=rngs, **types)
        self.conv2 = nn.Conv(channels, channels, 3, padding=1, bias=False, rngs=rngs, **types)
        self.norm = nn.RMSNorm(
            channels, eps=NORM_EPS, bias=True, rngs=rngs, param_dtype=param_dtype
        )

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        with jax.named_scope("res_block"):
            return constrain(x_BHWC + self.norm(self.conv2(jax.nn.silu(self.conv1(x_BHWC)))))


class MultiscaleProjection(nnx.Module):
    """Aggregate q, k and v over a neighbourhood.

    A depthwise convolution precedes a 1 x 1 convolution within each head's q, k or v.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        kernel_size: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
    ):
        types = {"bias": False, "rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.proj_in = nn.DepthwiseConv(channels, kernel_size, **types)
        self.proj_out = nn.Conv(
            channels, channels, 1, groups=groups, axes=(None, "conv_out"), **types
        )

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return self.proj_out(self.proj_in(x_BHWC))


def relu_attention(q_BNGK: jax.Array, k_BNGK: jax.Array, v_BNGK: jax.Array) -> jax.Array:
    """Attend with weights relu(q) . relu(k), normalised over the keys -> [B, N, G, K].

    Without a softmax the sum over keys can be computed first, at a cost of N K^2 per head instead
    of N^2 K. As in diffusers, the cheaper form is used: the former, in float32, unless N <= K.
    """
    q_BNGK = jax.nn.relu(q_BNGK)
    k_BNGK = jax.nn.relu(k_BNGK)
    if q_BNGK.shape[1] <= q_BNGK.shape[-1]:
        # The quadratic form: here the scores [N, M] are no larger than the states [K, V] below.
        scores_BGNM = jnp.einsum("bngk,bmgk->bgnm", q_BNGK, k_BNGK).astype(jnp.float32)
        weights_BGNM = scores_BGNM / (scores_BGNM.sum(-1, keepdims=True) + ATTENTION_EPS)
        return jnp.einsum("bgnm,bmgk->bngk", weights_BGNM.astype(v_BNGK.dtype), v_BNGK)
    q, k, v = (x.astype(jnp.float32) for x in (q_BNGK, k_BNGK, v_BNGK))
    # The quotient of sums over all pixels needs more than the bfloat16 products that TPUs use by
    # default.
    exact = jax.lax.Precision.HIGHEST
    states_BGKV = jnp.einsum("bngk,bngv->bgkv", k, v, precision=exact)
    numerator_BNGK = jnp.einsum("bngk,bgkv->bngv", q, states_BGKV, precision=exact)
    denominator_BNG = jnp.einsum("bngk,bgk->bng", q, k.sum(1), precision=exact)
    return (numerator_BNGK / (denominator_BNG[..., None] + ATTENTION_EPS)).astype(q_BNGK.dtype)


class MultiscaleAttention(nnx.Module):
    """Compute x + norm(project(attention)) over all pixels, with q, k, v at several scales.

    Matches diffusers' `SanaMultiscaleLinearAttention`.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int,
        scales: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
    ):
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        heads = channels // head_dim
        inner, axes = heads * head_dim, ("conv_in", "conv_out")
        self.to_q = nn.Linear(channels, inner, axes, bias=False, **types)
        self.to_k = nn.Linear(channels, inner, axes, bias=False, **types)
        self.to_v = nn.Linear(channels, inner, axes, bias=False, **types)
        self.scales = nnx.List(
            [MultiscaleProjection(3 * inner, 3 * heads, size, **types) for size in scales]
        )
        self.to_out = nn.Linear(inner * (1 + len(scales)), channels, axes, bias=False, **types)
        self.norm = nn.RMSNorm(
            channels, eps=NORM_EPS, bias=True, rngs=rngs, param_dtype=param_dtype
        )
        self.head_dim = head_dim

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        batch, height, width, _ = x_BHWC.shape
        qkv_BHWC = jnp.concatenate(
            [self.to_q(x_BHWC), self.to_k(x_BHWC), self.to_v(x_BHWC)], axis=-1
        )
        qkv_BHWC = jnp.concatenate(
            [qkv_BHWC, *(project(qkv_BHWC) for project in self.scales)], axis=-1
        )
        # Each run of 3 * head_dim channels is split as one head's q, k, v, although the channels
        # are all heads' q, then k, then v: the published weights are trained with this layout.
        qkv_BNGK = qkv_BHWC.reshape(batch, height * width, -1, 3 * self.head_dim)
        y_BNGK = relu_attention(*jnp.split(qkv_BNGK, 3, axis=-1))
        return constrain(x_BHWC + self.norm(self.to_out(y_BNGK.reshape(batch, height, width, -1))))


class GluConv(nnx.Module):
    """Compute x + norm(project(a * silu(b))), the gated convolution of diffusers' `GLUMBConv`.

    a and b are the halves of depthwise(silu(expand(x))), each 4 times as wide as x.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        axes = ("conv_in", "conv_out")
        self.expand = nn.Linear(channels, 8 * channels, axes, **types)
        self.depthwise = nn.DepthwiseConv(8 * channels, 3, **types)
        self.project = nn.Linear(4 * channels, channels, axes, bias=False, **types)
        self.norm = nn.RMSNorm(
            channels, eps=NORM_EPS, bias=True, rngs=rngs, param_dtype=param_dtype
        )

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        a_BHWC, b_BHWC = jnp.split(self.depthwise(jax.nn.silu(self.expand(x_BHWC))), 2, axis=-1)
        return constrain(x_BHWC + self.norm(self.project(a_BHWC * jax.nn.silu(b_BHWC))))


class EfficientVitBlock(nnx.Module):
    """Apply multi-scale attention over all pixels, then a gated convolution."""

    def __init__(
        self,
        channels: int,
        head_dim: int,
        scales: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
    ):
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.attention = MultiscaleAttention(channels, head_dim, scales, **types)
        self.glu = GluConv(channels, **types)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        with jax.named_scope("efficient_vit_block"):
            return self.glu(self.attention(x_BHWC))


class DownBlock(nnx.Module):
    """Halve the resolution: [B, H, W, c_in] -> [B, H/2, W/2, c_out]; matches `DCDownBlock2d`.

    The convolution has stride 2 (`kind` "Conv") or is followed by a pixel unshuffle
    ("pixel_unshuffle"). The shortcut averages groups of channels of the pixel-unshuffled input.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kind: str,
        *,
        shortcut: bool,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
    ):
        self.unshuffle = kind == "pixel_unshuffle"
        self.shortcut = shortcut
        self.c_out = c_out
        # The pixel unshuffle multiplies the channels by 4 and halves the sides, so that the
        # convolution before it makes a quarter of them at stride 1.
        width, stride = (c_out // 4, 1) if self.unshuffle else (c_out, 2)
        self.conv = nn.Conv(
            c_in,
            width,
            3,
            stride=stride,
            padding=1,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
        )

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        with jax.named_scope("down_block"):
            y_BHWC = self.conv(x_BHWC)
            y_BHWC = pixel_unshuffle(y_BHWC) if self.unshuffle else y_BHWC
            if self.shortcut:
                y_BHWC = y_BHWC + average_channels(pixel_unshuffle(x_BHWC), self.c_out)
            return constrain(y_BHWC)


class UpBlock(nnx.Module):
    """Double the resolution: [B, H, W, c_in] -> [B, 2 H, 2 W, c_out]; matches `DCUpBlock2d`.

    The convolution follows a nearest-neighbour upsampling (`kind` "interpolate") or precedes a
    pixel shuffle. The shortcut is the pixel-shuffled input with its channels repeated.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kind: str,
        *,
        shortcut: bool,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
    ):
        self.interpolate = kind == "interpolate"
        self.shortcut = shortcut
        self.c_out = c_out
        width = c_out if self.interpolate else 4 * c_out
        self.conv = nn.Conv(
            c_in, width, 3, padding=1, rngs=rngs, dtype=dtype, param_dtype=param_dtype
        )

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        with jax.named_scope("up_block"):
            y_BHWC = (
                self.conv.upsampled(x_BHWC)
                if self.interpolate
                else pixel_shuffle(self.conv(x_BHWC))
            )
            if self.shortcut:
                y_BHWC = y_BHWC + pixel_shuffle(repeat_channels(x_BHWC, 4 * self.c_out))
            return constrain(y_BHWC)


def stage_blocks(
    kind: str,
    count: int,
    channels: int,
    head_dim: int,
    scales: tuple[int, ...],
    *,
    rngs: nnx.Rngs,
    dtype: Any,
    param_dtype: Any,
) -> nnx.Module | None:
    """Return the `count` blocks of one stage as a stack; None for a count of 0."""

    def make(rngs: nnx.Rngs) -> nnx.Module:
        if kind == "ResBlock":
            return ResBlock(channels, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        return EfficientVitBlock(
            channels, head_dim, scales, rngs=rngs, dtype=dtype, param_dtype=param_dtype
        )

    return nn.stack(make, count, rngs) if count else None


def run_blocks(
    blocks: nnx.Module | None, x_BHWC: jax.Array, *, remat: str, unroll: bool
) -> jax.Array:
    """Run stacked blocks in order on [B, H, W, C]; None runs nothing."""
    if blocks is None:
        return x_BHWC
    return nn.scan(
        blocks, lambda block, x_BHWC, _: (block(x_BHWC), None), x_BHWC, remat=remat, unroll=unroll
    )[0]
