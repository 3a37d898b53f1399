"""Compute 2-D convolutions on NHWC with the fastest algorithm for the target platform.

1x1 kernels are matrix products (batched over the groups). All others use XLA's native convolution,
with two exceptions:
- Depthwise convolutions are sums of shifted products on CPUs and TPUs. On CPUs the native one is 10
  to 70 times slower, forward and backward. On TPUs the native one leaves the matrix unit idle; the
  compiler's estimate for shifted products is half its time, without transposing copies.
- The derivatives of dense convolutions on CPUs are written out. Inside a scan XLA does not rewrite
  JAX's form of the kernel's gradient to one with a fast kernel, and runs it 40 times slower.
The platform is resolved when a computation is lowered (`jax.lax.platform_dependent`), so compiling
for a TPU on a CPU host selects the TPU's algorithm.

Shape suffixes: B batch, H height, W width, C channels, I and O channels in and out of a group, G
groups.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def conv2d(
    x_BHWC: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int = 0, groups: int = 1
) -> jax.Array:
    """Convolve [B, H, W, in] with `kernel` [kh, kw, in / groups, out] -> [B, H', W', out].

    Matches `torch.nn.functional.conv2d`; `padding` is in pixels on every side.
    """
    side, _, c_in, c_out = kernel.shape
    if (side, stride, padding) == (1, 1, 0):
        return _pointwise(x_BHWC, kernel[0, 0], groups)
    # Only the form that keeps H x W (stride 1, padding of half the kernel) is a sum of shifted
    # windows of equal size.
    if c_in == 1 and c_out == groups and (stride, 2 * padding + 1) == (1, side):
        return _depthwise(x_BHWC, kernel)
    if (stride, groups) == (1, 1):
        return _dense(x_BHWC, kernel, padding)
    return _native(x_BHWC, kernel, stride, padding, groups)


def upsampled_conv2d(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve the 2x nearest-neighbour upsampling of `x_BHWC` with a 3 x 3 kernel and padding 1.

    Returns [B, 2 H, 2 W, O] without building the upsampled image. Two of the kernel's three rows
    fall on the same row of x, so every output pixel is a 2 x 2 convolution over x with summed taps:
    4 / 9 of the work. Output row 2 i + p applies the kernel's rows k0, k1, k2 to rows of x:

        p = 0    k0 on i - 1, k1 + k2 on i      = row i of a 2 x 2 convolution with padding 1
        p = 1    k0 + k1 on i, k2 on i + 1      = row i + 1
    """
    batch, height, width, _ = x_BHWC.shape
    c_in, c_out = kernel.shape[2:]

    def folded(taps: jax.Array) -> jax.Array:
        """Sum the 3 taps of the first axis: [3, ...] -> [2 taps, 2 phases, ...]."""
        k0, k1, k2 = taps
        return jnp.stack([jnp.stack([k0, k0 + k1]), jnp.stack([k1 + k2, k2])])

    # Taps are added in float32: a bfloat16 sum would round the kernel.
    rows = folded(kernel.astype(jnp.float32))  # [row's tap, row's phase, 3, I, O]
    # [column's tap, column's phase, row's tap, row's phase, I, O]
    both = folded(jnp.moveaxis(rows, 2, 0))
    # -> [row's tap, column's tap, I, row's phase, column's phase, O]: the four phases become output
    # channels of one 2 x 2 convolution.
    both = both.transpose(2, 0, 4, 3, 1, 5).reshape(2, 2, c_in, 4 * c_out).astype(kernel.dtype)
    # Padding 1 on both sides gives one row and column more than x has. Phase 0 reads from row i,
    # phase 1 from row i + 1, as the table above has it.
    y_BHWX = conv2d(x_BHWC, both, padding=1).reshape(batch, height + 1, width + 1, 2, 2, c_out)
    phases = [[y_BHWX[:, p : p + height, q : q + width, p, q] for q in range(2)] for p in range(2)]
    y = jnp.stack([jnp.stack(row, axis=3) for row in phases], axis=2)  # [B, H, 2, W, 2, O]
    return y.reshape(batch, 2 * height, 2 * width, c_out)


def _native(
    x_BHWC: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x_BHWC,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _pointwise(x_BHWC: jax.Array, kernel_IO: jax.Array, groups: int) -> jax.Array:
    if groups == 1:
        return x_BHWC @ kernel_IO
    c_in, c_out = kernel_IO.shape
    x_BHWGI = x_BHWC.reshape(*x_BHWC.shape[:3], groups, c_in)
    y_BHWGO = jnp.einsum(
        "bhwgi,igo->bhwgo", x_BHWGI, kernel_IO.reshape(c_in, groups, c_out // groups)
    )
    return y_BHWGO.reshape(*x_BHWC.shape[:3], c_out)


# The custom derivatives below also save memory: differentiating through `platform_dependent` would
# store the residuals of both branches.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(x_BHWC: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    return _native(x_BHWC, kernel, 1, padding, 1)


def _dense_fwd(
    x_BHWC: jax.Array, kernel: jax.Array, padding: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dense(x_BHWC, kernel, padding), (x_BHWC, kernel)


def _dense_bwd(
    padding: int, saved: tuple[jax.Array, jax.Array], dy_BHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def native(
        x_BHWC: jax.Array, kernel: jax.Array, dy_BHWC: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda x, k: _native(x, k, 1, padding, 1), x_BHWC, kernel)[1](dy_BHWC)

    def fast_form(
        x_BHWC: jax.Array, kernel: jax.Array, dy_BHWC: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        # The input's gradient convolves dy with the reversed kernel, its channels swapped. The
        # kernel's gradient convolves x with dy as an H x W kernel, summing over the batch, which
        # therefore takes the place of the input channels.
        dx_BHWC = _native(
            dy_BHWC, kernel[::-1, ::-1].transpose(0, 1, 3, 2), 1, kernel.shape[0] - 1 - padding, 1
        )
        dkernel_IhwO = _native(
            x_BHWC.transpose(3, 1, 2, 0), dy_BHWC.transpose(1, 2, 0, 3), 1, padding, 1
        )
        return dx_BHWC, dkernel_IhwO.transpose(1, 2, 0, 3)

    return jax.lax.platform_dependent(*saved, dy_BHWC, cpu=fast_form, default=native)


_dense.defvjp(_dense_fwd, _dense_bwd)


# The kernel's gradient has an algorithm per platform: a reduction over all pixels for each tap, as
# automatic differentiation of the shifted products gives, is slow on CPUs.
@jax.custom_vjp
def _depthwise(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        x_BHWC, kernel, cpu=_depthwise_shifted, tpu=_depthwise_shifted, default=_depthwise_native
    )


def _depthwise_native(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    return _native(x_BHWC, kernel, 1, kernel.shape[0] // 2, kernel.shape[-1])


def _windows(x_BHWC: jax.Array, side: int) -> Iterator[tuple[int, int, jax.Array]]:
    """Yield (i, j, window) for each kernel position (i, j): the padded x shifted by it, float32."""
    _, height, width, _ = x_BHWC.shape
    padded_BHWC = jnp.pad(x_BHWC, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    for i, j in np.ndindex(side, side):
        yield i, j, padded_BHWC[:, i : i + height, j : j + width].astype(jnp.float32)


def _depthwise_shifted(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    taps = kernel.astype(jnp.float32)
    # The sum over the taps is in float32.
    y_BHWC: Any = sum(
        window_BHWC * taps[i, j, 0] for i, j, window_BHWC in _windows(x_BHWC, kernel.shape[0])
    )
    return y_BHWC.astype(x_BHWC.dtype)


def _depthwise_gradients_native(
    x_BHWC: jax.Array, kernel: jax.Array, dy_BHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(_depthwise_native, x_BHWC, kernel)[1](dy_BHWC)


def _depthwise_gradients_reduced(
    x_BHWC: jax.Array, kernel: jax.Array, dy_BHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    side = kernel.shape[0]
    dy_f32_BHWC = dy_BHWC.astype(jnp.float32)
    taps = [
        jnp.sum(window_BHWC * dy_f32_BHWC, axis=(0, 1, 2))
        for _, _, window_BHWC in _windows(x_BHWC, side)
    ]
    dkernel = jnp.stack(taps).reshape(kernel.shape)
    return _depthwise_shifted(dy_BHWC, kernel[::-1, ::-1]), dkernel.astype(kernel.dtype)


def _depthwise_gradients_by_pixel(
    x_BHWC: jax.Array, kernel: jax.Array, dy_BHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    batch, height, width, channels = x_BHWC.shape
    side = kernel.shape[0]
    # Padded and cast once, not for each pixel of the loop.
    padded_BHWC = jnp.pad(
        x_BHWC.astype(jnp.float32), ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0))
    )
    dy_f32_BHWC = dy_BHWC.astype(jnp.float32)

    def add_pixel(t: jax.Array, total: jax.Array) -> jax.Array:
        # The contribution of one output pixel to the kernel's gradient, all taps at once. The batch
        # and the channels stay whole, so that this works sharded over either.
        h, w = t // width, t % width
        window = jax.lax.dynamic_slice(padded_BHWC, (0, h, w, 0), (batch, side, side, channels))
        return total + window * jax.lax.dynamic_slice(
            dy_f32_BHWC, (0, h, w, 0), (batch, 1, 1, channels)
        )

    start = jnp.zeros((batch, side, side, channels), jnp.float32)
    dkernel = jax.lax.fori_loop(0, height * width, add_pixel, start).sum(0)[:, :, None]
    return _depthwise_shifted(dy_BHWC, kernel[::-1, ::-1]), dkernel.astype(kernel.dtype)


def _depthwise_fwd(
    x_BHWC: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _depthwise(x_BHWC, kernel), (x_BHWC, kernel)


def _depthwise_bwd(
    saved: tuple[jax.Array, jax.Array], dy_BHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return jax.lax.platform_dependent(
        *saved,
        dy_BHWC,
        cpu=_depthwise_gradients_by_pixel,
        tpu=_depthwise_gradients_reduced,
        default=_depthwise_gradients_native,
    )


_depthwise.defvjp(_depthwise_fwd, _depthwise_bwd)
