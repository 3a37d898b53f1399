"""Compute the noise levels and the loss of flow matching (arXiv 2210.02747, 2209.03003).

Matches `diffusers.FlowMatchEulerDiscreteScheduler`.

    sigma' = shift sigma / (1 + (shift - 1) sigma)     more steps near the noise for shift > 1
    x_sigma = (1 - sigma) z + sigma e                  z a latent, e ~ N(0, I)
    v = dx / dsigma = e - z                            the network's target, given x_sigma and
                                                       1000 sigma
    x_next = x + (sigma_next - sigma) v                Euler step of the sampler, sigma from 1 to 0

Training samples u ~ U[0, 1) and uses entry floor(1000 u) of the shifted levels 1, 0.999 .. 0.001.

B batch, S steps; latents are [B, H, W, C], sigmas have no unit.
"""

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import FlowConfig


def _shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    return (shift * sigmas / (1 + (shift - 1) * sigmas)).astype(np.float32)


def sigmas(cfg: FlowConfig) -> np.ndarray:
    """Return the noise levels of training [num_train_timesteps], float32, descending from 1."""
    steps = cfg.num_train_timesteps
    # float32 throughout, as in diffusers, whose levels are reproduced bit for bit.
    return _shifted(np.arange(steps, 0, -1, dtype=np.float32) / np.float32(steps), cfg.shift)


def sampling_sigmas(steps: int, cfg: FlowConfig) -> np.ndarray:
    """Return the noise levels of the sampler [steps + 1], float32, from 1 to 0.

    Raises ValueError unless `steps` is positive.
    """
    if steps < 1:
        raise ValueError(f"sampling steps={steps} must be 1 or more")
    return np.append(
        _shifted(np.linspace(1, 1 / steps, steps, dtype=np.float32), cfg.shift), np.float32(0)
    )


def sample_train_sigma(key: jax.Array, batch: int, cfg: FlowConfig) -> jax.Array:
    """Sample a noise level for each row, float32 [batch].

    The timestep is `cfg.num_train_timesteps` times the level.
    """
    # u < 1, so that the index never reaches `num_train_timesteps`.
    u_B = jax.random.uniform(key, (batch,), jnp.float32)
    return jnp.asarray(sigmas(cfg))[jnp.floor(u_B * cfg.num_train_timesteps).astype(jnp.int32)]


def add_noise(z_BHWC: jax.Array, noise_BHWC: jax.Array, sigma_B: jax.Array) -> jax.Array:
    """Return the noisy latents x_sigma [B, H, W, C], float32."""
    sigma = sigma_B.astype(jnp.float32)[:, None, None, None]
    return (1 - sigma) * z_BHWC.astype(jnp.float32) + sigma * noise_BHWC.astype(jnp.float32)


def flow_loss(
    prediction_BHWC: jax.Array,
    z_BHWC: jax.Array,
    noise_BHWC: jax.Array,
    weight_B: jax.Array | None = None,
) -> jax.Array:
    """Return the mean squared error of each row's velocity times its weight, float32 [B].

    The caller averages over the rows.
    """
    # The loss is in float32: the squared error of bfloat16 predictions is a mean over many small
    # terms.
    velocity_BHWC = noise_BHWC.astype(jnp.float32) - z_BHWC.astype(jnp.float32)
    loss_B = jnp.mean((prediction_BHWC.astype(jnp.float32) - velocity_BHWC) ** 2, axis=(1, 2, 3))
    return loss_B if weight_B is None else loss_B * weight_B
