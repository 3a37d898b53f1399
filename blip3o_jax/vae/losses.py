"""What the autoencoder is trained on: L1 over pixels, and L1 over the differences of neighbouring pixels.

    loss = mean |x_hat - x| + w * (mean |dh x_hat - dh x| + mean |dv x_hat - dv x|) / 2

dh and dv are the differences to the right and lower neighbour. L1 alone is content with edges smeared over a few pixels, each
a little wrong; their slope is then far off, which the second term charges for: it is the sharpness term. It stands where the
paper of DC-AE (arXiv 2410.10733) has LPIPS and a GAN loss, as it needs no other network.

Shape suffixes: B batch, H height, W width, C channels.
"""

import jax
import jax.numpy as jnp

# Pixels span [-1, 1]: the squared peak-to-peak that PSNR is measured against.
PEAK_SQUARED = 4.0


def reconstruction_loss(
    x_hat_BHWC: jax.Array, x_BHWC: jax.Array, gradient_weight: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss above in float32, for images in [-1, 1], and its metrics.

    `l1` and `gradient_l1` are the two terms before weighting; `psnr` in dB is the mean over the images, each
    reconstruction clipped to [-1, 1] as it is when it becomes an image.
    """
    x_hat_BHWC, x_BHWC = x_hat_BHWC.astype(jnp.float32), x_BHWC.astype(jnp.float32)
    error_BHWC = x_hat_BHWC - x_BHWC
    l1 = jnp.mean(jnp.abs(error_BHWC))
    # Differences are linear: those of the error are the error of those.
    gradient_l1 = (jnp.mean(jnp.abs(jnp.diff(error_BHWC, axis=2))) + jnp.mean(jnp.abs(jnp.diff(error_BHWC, axis=1)))) / 2
    squared_error_B = jnp.mean((jnp.clip(x_hat_BHWC, -1, 1) - x_BHWC) ** 2, axis=(1, 2, 3))
    psnr = jnp.mean(10 * jnp.log10(PEAK_SQUARED / jnp.maximum(squared_error_B, 1e-10)))
    return l1 + gradient_weight * gradient_l1, {"l1": l1, "gradient_l1": gradient_l1, "psnr": psnr}
