"""Normalise over the last dimension, with statistics in float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax.nn.parameters import ones, param, zeros


class RMSNorm(nnx.Module):
    """Compute x / rms(x) * scale (+ bias) over the last dimension.

    Matches `Qwen3RMSNorm` and diffusers' `RMSNorm`. The statistics are in float32 for every compute
    dtype, since bfloat16 has too few bits to add up squares.
    """

    def __init__(
        self,
        dim: int,
        *,
        rngs: nnx.Rngs,
        eps: float,
        bias: bool = False,
        param_dtype: Any = jnp.float32,
        init: Callable = ones,
        axes: tuple[str | None] = ("norm",),
    ):
        self.scale = param(rngs, (dim,), axes, init, param_dtype)
        self.bias = param(rngs, (dim,), axes, zeros, param_dtype) if bias else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x_f32 = x.astype(jnp.float32)
        # Cast before the product with the scale, as in the stock classes: the order decides the
        # last bit in bfloat16.
        y = (x_f32 * jax.lax.rsqrt(jnp.mean(x_f32**2, axis=-1, keepdims=True) + self.eps)).astype(
            x.dtype
        )
        y = y * self.scale[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def standardise(x: jax.Array, eps: float) -> jax.Array:
    """Return (x - mean) / std over the last dimension, with statistics in float32.

    Matches `torch.nn.LayerNorm` without weights.
    """
    x_f32 = x.astype(jnp.float32)
    mean = jnp.mean(x_f32, axis=-1, keepdims=True)
    # Two passes: E[x^2] - E[x]^2 cancels where the mean is large against the deviation.
    var = jnp.mean((x_f32 - mean) ** 2, axis=-1, keepdims=True)
    return ((x_f32 - mean) * jax.lax.rsqrt(var + eps)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalise the last dimension and scale and shift it; matches `torch.nn.LayerNorm`."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs, eps: float, param_dtype: Any = jnp.float32):
        self.scale = param(rngs, (dim,), ("norm",), ones, param_dtype)
        self.bias = param(rngs, (dim,), ("norm",), zeros, param_dtype)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return standardise(x, self.eps) * self.scale[...].astype(x.dtype) + self.bias[...].astype(
            x.dtype
        )
