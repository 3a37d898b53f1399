"""Convolve NHWC images: dense, grouped and depthwise.

Shape suffixes: B batch, H height, W width, C channels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax.nn.conv_algorithms import conv2d, upsampled_conv2d
from blip3o_jax.nn.parameters import fan_in, param, zeros


class Conv(nnx.Module):
    """Apply a 2-D convolution to NHWC images; matches `torch.nn.Conv2d`.

    The kernel is [kh, kw, in / groups, out], torch's transposed from [out, in, kh, kw]. `padding`
    is the symmetric padding in pixels, as in torch.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_size: int,
        *,
        rngs: nnx.Rngs,
        axes: tuple[str | None, str | None] = ("conv_in", "conv_out"),
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = True,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        init: Callable | None = None,
    ):
        shape = (kernel_size, kernel_size, c_in // groups, c_out)
        self.kernel = param(rngs, shape, (None, None, *axes), init or fan_in(), param_dtype)
        self.bias = param(rngs, (c_out,), (axes[1],), zeros, param_dtype) if bias else None
        self.stride = stride
        self.padding = padding
        self.groups = groups
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        y_BHWC = conv2d(
            x_BHWC.astype(self.dtype),
            kernel,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
        )
        return y_BHWC if self.bias is None else y_BHWC + self.bias[...].astype(self.dtype)

    def upsampled(self, x_BHWC: jax.Array) -> jax.Array:
        """Upsample [B, H, W, in] to twice the size by nearest neighbour, then convolve.

        Returns [B, 2 H, 2 W, out]. Only for 3 x 3 kernels with stride 1 and padding 1.
        """
        y_BHWC = upsampled_conv2d(x_BHWC.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y_BHWC if self.bias is None else y_BHWC + self.bias[...].astype(self.dtype)


class DepthwiseConv(nnx.Module):
    """Apply a depthwise 2-D convolution to NHWC images, keeping H x W.

    Matches `torch.nn.Conv2d(C, C, k, padding=k // 2, groups=C)`, its kernel transposed from
    [C, 1, k, k] to [k, k, 1, C]. `Conv` with groups = channels computes the same values;
    conv_algorithms.py chooses the algorithm for each platform. Raises ValueError for an even
    `kernel_size`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        rngs: nnx.Rngs,
        axis: str | None = "conv_out",
        bias: bool = True,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        init: Callable | None = None,
    ):
        if kernel_size % 2 == 0:
            raise ValueError(
                f"DepthwiseConv: kernel_size={kernel_size} is even; use an odd one, which "
                "keeps the image size"
            )
        shape = (kernel_size, kernel_size, 1, channels)
        self.kernel = param(rngs, shape, (None, None, None, axis), init or fan_in(), param_dtype)
        self.bias = param(rngs, (channels,), (axis,), zeros, param_dtype) if bias else None
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        padding, groups = kernel.shape[0] // 2, kernel.shape[-1]
        y_BHWC = conv2d(x_BHWC.astype(self.dtype), kernel, padding=padding, groups=groups)
        return y_BHWC if self.bias is None else y_BHWC + self.bias[...].astype(self.dtype)
