"""placeholder while the autoencoder's engineer writes it"""
import jax
import jax.numpy as jnp


def reconstruction_loss(x_hat_BHWC: jax.Array, x_BHWC: jax.Array, gradient_weight: float):
    x_hat, x = x_hat_BHWC.astype(jnp.float32), x_BHWC.astype(jnp.float32)
    e = x_hat - x
    l1 = jnp.mean(jnp.abs(e))
    g = jnp.mean(jnp.abs(e[:, 1:] - e[:, :-1])) + jnp.mean(jnp.abs(e[:, :, 1:] - e[:, :, :-1]))
    psnr = -10 * jnp.log10(jnp.mean((jnp.clip(x_hat, -1, 1) - x) ** 2) / 4)
    return l1 + gradient_weight * g, {"l1": l1, "gradient": g, "psnr": psnr}
