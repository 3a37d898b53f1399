"""The reconstruction loss against values worked out by hand."""

import math

import jax
import jax.numpy as jnp
import pytest

from blip3o_jax.vae.losses import reconstruction_loss


def image(rows):
    return jnp.asarray(rows, jnp.float32)[None, :, :, None]


def test_by_hand():
    """Compare with errors        to the right     down
    0.2  0.0  0.0   -0.2  0.0        -0.2  0.4  0.0
    0.0  0.4  0.0    0.4 -0.4
    l1 = 0.6 / 6; gradient = (1.0 / 4 + 0.6 / 3) / 2; squared error = (0.04 + 0.16) / 6.
    """
    x = image([[0.1, 0.2, 0.3], [-0.5, 0.5, 0.0]])
    x_hat = x + image([[0.2, 0.0, 0.0], [0.0, 0.4, 0.0]])
    loss, metrics = reconstruction_loss(x_hat, x, 0.5, 2.0)
    assert metrics["l1"] == pytest.approx(0.1, rel=1e-5)
    assert metrics["gradient_l1"] == pytest.approx(0.225, rel=1e-5)
    assert metrics["squared"] == pytest.approx(0.2 / 6, rel=1e-5)
    assert loss == pytest.approx(0.1 + 2.0 * 0.2 / 6 + 0.5 * 0.225, rel=1e-5)
    assert metrics["psnr"] == pytest.approx(10 * math.log10(4 / (0.2 / 6)), rel=1e-5)


def test_psnr_is_of_the_clipped_image_and_the_loss_is_not():
    x, x_hat = image([[1.0, 1.0], [1.0, 0.0]]), image([[1.5, 1.0], [1.0, 0.2]])
    loss, metrics = reconstruction_loss(x_hat, x, 0.0)
    assert loss == pytest.approx(0.7 / 4, rel=1e-5)
    assert metrics["psnr"] == pytest.approx(10 * math.log10(4 / (0.04 / 4)), rel=1e-5)


def test_psnr_is_the_mean_over_images():
    x = jnp.zeros((2, 2, 2, 1))
    _, metrics = reconstruction_loss(x + jnp.asarray([0.2, 0.02])[:, None, None, None], x, 1.0)
    assert metrics["psnr"] == pytest.approx((20 + 40) / 2, rel=1e-5)


def test_perfect_images_are_finite():
    """Allow neither an infinite PSNR nor a NaN gradient; 10^-10 of squared error caps the former
    at 106 dB.
    """
    x = image([[0.1, 0.2], [0.3, 0.4]])
    gradient, metrics = jax.grad(lambda x_hat: reconstruction_loss(x_hat, x, 1.0), has_aux=True)(x)
    assert metrics["psnr"] == pytest.approx(10 * math.log10(4e10), rel=1e-5)
    assert jnp.all(jnp.isfinite(gradient))


def test_bfloat16_is_summed_in_float32():
    """Sum 300 x 300 equal errors of 2^-7: a bfloat16 sum would stop growing long before."""
    x = jnp.zeros((1, 300, 300, 1), jnp.bfloat16)
    loss, _ = reconstruction_loss(x + 2**-7, x, 1.0)
    assert loss.dtype == jnp.float32
    assert loss == pytest.approx(2**-7, rel=1e-5)
