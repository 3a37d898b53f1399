"""Compute the reconstruction loss of the autoencoder.

    loss = mean |x_hat - x| + s * mean (x_hat - x)^2
           + w * (mean |dh x_hat - dh x| + mean |dv x_hat - dv x|) / 2

dh and dv are the differences of a pixel to its right and lower neighbour; s is `squared_weight` and
w `gradient_weight`. L1 alone hardly penalises an edge that is blurred over a few pixels; the last
term penalises its slope. It replaces the LPIPS and GAN losses of DC-AE (arXiv 2410.10733), since it
needs no further network. The squared error speeds up the first steps from random weights, where the
other two terms move slowly away from a constant image.

Shape suffixes: B batch, H height, W width, C channels.
"""

import jax
import jax.numpy as jnp

# The squared peak-to-peak value of PSNR: pixels span [-1, 1].
PEAK_SQUARED = 4.0


def reconstruction_loss(
    x_hat_BHWC: jax.Array, x_BHWC: jax.Array, gradient_weight: float, squared_weight: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss in float32, for images [B, H, W, C] in [-1, 1], and its metrics.

    `l1`, `squared` and `gradient_l1` are the terms before weighting. `psnr` is the mean over the
    images in dB, of reconstructions clipped to [-1, 1], as they are when written to files.
    """
    x_hat_BHWC = x_hat_BHWC.astype(jnp.float32)
    x_BHWC = x_BHWC.astype(jnp.float32)
    error_BHWC = x_hat_BHWC - x_BHWC
    l1 = jnp.mean(jnp.abs(error_BHWC))
    squared = jnp.mean(error_BHWC**2)
    # Differences are linear: dh x_hat - dh x = dh (x_hat - x).
    gradient_l1 = (
        jnp.mean(jnp.abs(jnp.diff(error_BHWC, axis=2)))
        + jnp.mean(jnp.abs(jnp.diff(error_BHWC, axis=1)))
    ) / 2
    squared_error_B = jnp.mean((jnp.clip(x_hat_BHWC, -1, 1) - x_BHWC) ** 2, axis=(1, 2, 3))
    psnr = jnp.mean(10 * jnp.log10(PEAK_SQUARED / jnp.maximum(squared_error_B, 1e-10)))
    loss = l1 + squared_weight * squared + gradient_weight * gradient_l1
    return loss, {"l1": l1, "squared": squared, "gradient_l1": gradient_l1, "psnr": psnr}
