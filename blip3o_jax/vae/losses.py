"""The reconstruction loss of the autoencoder: L1 and squared error of pixels, and L1 of differences
of neighbouring pixels.

loss = mean |x_hat - x| + s * mean (x_hat - x)^2 + w * (mean |dh x_hat - dh x| + mean |dv x_hat - dv
x|) / 2

dh and dv are the differences to the right and lower neighbour. L1 alone hardly
penalises edges that are blurred over a few pixels, each a little wrong; the last term penalises
their slope. It replaces the LPIPS and GAN losses of DC-AE (arXiv 2410.10733), as it needs no other
network. The squared error speeds up the first steps from random weights, where the other two terms
leave the constant image slowly.

Shape suffixes: B batch, H height, W width, C channels.
"""

import jax
import jax.numpy as jnp

# Pixels span [-1, 1]: the squared peak-to-peak that PSNR is measured against.
PEAK_SQUARED = 4.0


def reconstruction_loss(
    x_hat_BHWC: jax.Array, x_BHWC: jax.Array, gradient_weight: float, squared_weight: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss above in float32, for images in [-1, 1], and its metrics.

    `l1`, `squared` and `gradient_l1` are the terms before weighting; `psnr` in dB is the mean over
    the images, each reconstruction clipped to [-1, 1] as it is when it becomes an image.
    """
    x_hat_BHWC, x_BHWC = x_hat_BHWC.astype(jnp.float32), x_BHWC.astype(jnp.float32)
    error_BHWC = x_hat_BHWC - x_BHWC
    l1, squared = jnp.mean(jnp.abs(error_BHWC)), jnp.mean(error_BHWC**2)
    # Differences are linear: those of the error are the error of those.
    gradient_l1 = (
        jnp.mean(jnp.abs(jnp.diff(error_BHWC, axis=2)))
        + jnp.mean(jnp.abs(jnp.diff(error_BHWC, axis=1)))
    ) / 2
    squared_error_B = jnp.mean((jnp.clip(x_hat_BHWC, -1, 1) - x_BHWC) ** 2, axis=(1, 2, 3))
    psnr = jnp.mean(10 * jnp.log10(PEAK_SQUARED / jnp.maximum(squared_error_B, 1e-10)))
    loss = l1 + squared_weight * squared + gradient_weight * gradient_l1
    return loss, {"l1": l1, "squared": squared, "gradient_l1": gradient_l1, "psnr": psnr}
