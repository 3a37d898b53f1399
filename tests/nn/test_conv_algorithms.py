"""Every form of the convolution against XLA's native one (which the networks' own tests compare
with torch's).
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.nn import conv_algorithms
from blip3o_jax.nn.conv_algorithms import conv2d, upsampled_conv2d
from tests.conftest import relative_error


def native(x, kernel, stride=1, padding=0, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@pytest.mark.parametrize(
    ("kernel_shape", "settings"),
    [
        ((1, 1, 6, 4), {}),
        ((1, 1, 2, 9), {"groups": 3}),
        ((3, 3, 1, 6), {"groups": 6, "padding": 1}),
        ((5, 5, 1, 6), {"groups": 6, "padding": 2}),
        ((3, 3, 6, 4), {"padding": 1}),
        ((3, 3, 6, 4), {}),
        ((3, 3, 6, 4), {"stride": 2, "padding": 1}),
        (
            (3, 3, 1, 12),
            {"groups": 6, "padding": 1},
        ),  # two outputs a channel: not the depthwise form
    ],
)
def test_forms_equal_native(rng, kernel_shape, settings):
    """Compare value and both gradients; float32 sums in another order, hence 1e-6."""
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 7, 6), kernel_shape))
    want, want_vjp = jax.vjp(functools.partial(native, **settings), x, kernel)
    got, got_vjp = jax.vjp(functools.partial(conv2d, **settings), x, kernel)
    assert relative_error(got, want) < 1e-6
    dy = jnp.asarray(rng.normal(size=want.shape), jnp.float32)
    for got_gradient, want_gradient in zip(got_vjp(dy), want_vjp(dy), strict=True):
        assert relative_error(got_gradient, want_gradient) < 1e-6


def test_upsampled_equals_upsampling_first(rng):
    """Compare value and both gradients, on a map that is not square; taps added up before they are
    multiplied, hence 1e-6.
    """
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 7, 6), (3, 3, 6, 4)))
    want, want_vjp = jax.vjp(
        lambda x, k: native(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), k, padding=1), x, kernel
    )
    got, got_vjp = jax.vjp(upsampled_conv2d, x, kernel)
    assert relative_error(got, want) < 1e-6
    dy = jnp.asarray(rng.normal(size=want.shape), jnp.float32)
    for got_gradient, want_gradient in zip(got_vjp(dy), want_vjp(dy), strict=True):
        assert relative_error(got_gradient, want_gradient) < 1e-6


def test_depthwise_accumulates_in_float32(rng):
    """Check that with bfloat16 in and out the sums over taps and pixels stay in float32: one
    rounding at the end, 2^-8 at most.
    """
    x, kernel, dy = (
        jnp.asarray(rng.normal(size=s), jnp.bfloat16)
        for s in ((2, 12, 12, 4), (3, 3, 1, 4), (2, 12, 12, 4))
    )
    want, want_vjp = jax.vjp(
        lambda x, k: native(x, k, padding=1, groups=4),
        x.astype(jnp.float32),
        kernel.astype(jnp.float32),
    )
    got, got_vjp = jax.vjp(lambda x, k: conv2d(x, k, padding=1, groups=4), x, kernel)
    pairs = [(got, want), *zip(got_vjp(dy), want_vjp(dy.astype(jnp.float32)), strict=True)]
    for value, reference in pairs:
        assert value.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(value, np.float32), reference, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "gradients",
    [conv_algorithms._depthwise_gradients_reduced, conv_algorithms._depthwise_gradients_by_pixel],
)
def test_gradients_of_every_platform(rng, gradients):
    """Compare those of the TPU's form too, which a CPU does not take by itself; sums in another
    order, hence 1e-6.
    """
    x, kernel, dy = (
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((2, 5, 7, 6), (3, 3, 1, 6), (2, 5, 7, 6))
    )
    want = jax.vjp(functools.partial(native, padding=1, groups=6), x, kernel)[1](dy)
    for got_gradient, want_gradient in zip(gradients(x, kernel, dy), want, strict=True):
        assert relative_error(got_gradient, want_gradient) < 1e-6


def convolutions(kernel_shape, settings, platform):
    """Return the `dim_labels` of the convolutions of forward and backward, as lowered for
    `platform`."""
    x, kernel = (
        jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32),
        jax.ShapeDtypeStruct(kernel_shape, jnp.float32),
    )
    loss = lambda x, kernel: (conv2d(x, kernel, padding=1, **settings) ** 2).sum()
    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(x, kernel)
    return re.findall(
        r"dim_numbers = (\[.*?\])x(\[.*?\])->(\[.*?\]),",
        traced.lower(lowering_platforms=(platform,)).as_text(),
    )


def test_platform_is_settled_when_lowering():
    """Lower for each platform: XLA's own convolution but for depthwise ones, on GPUs for those
    too.
    """
    depthwise, dense = ((3, 3, 1, 2), {"groups": 2}), ((3, 3, 2, 2), {})
    assert len(convolutions(*depthwise, "cuda")) == 3
    assert convolutions(*depthwise, "tpu") == convolutions(*depthwise, "cpu") == []
    assert len(set(convolutions(*dense, "tpu"))) == 3
    assert set(convolutions(*dense, "cpu")) == {("[b, 0, 1, f]", "[0, 1, i, o]", "[b, 0, 1, f]")}
