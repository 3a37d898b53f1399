"""Sample latents from noise by Euler steps (arXiv 2210.02747).

B batch, C channels of the latents, S steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from blip3o_jax.config import FlowConfig
from blip3o_jax.dit import flow as flow_matching
from blip3o_jax.dit.guidance import Guidance, guided_velocity
from blip3o_jax.dit.protocol import DiffusionHead


def sample(
    dit: DiffusionHead,
    guidance: Guidance,
    noise_BHWC: jax.Array,
    *,
    steps: int,
    flow: FlowConfig,
) -> jax.Array:
    """Sample latents [B, H, W, C], float32, from noise ~ N(0, I).

    The steps are one loop. Call it under `jax.jit`; `steps` and `flow` are Python values.
    """
    return euler(guided_velocity(dit, guidance), noise_BHWC, steps=steps, flow=flow)


def euler(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    noise_BHWC: jax.Array,
    *,
    steps: int,
    flow: FlowConfig,
) -> jax.Array:
    """Integrate `velocity(latents, timestep_B)` by Euler's method, as `sample` does."""

    def step(z_BHWC: jax.Array, sigma_pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, sigma_next = sigma_pair
        timestep_B = jnp.broadcast_to(sigma * flow.num_train_timesteps, z_BHWC.shape[:1])
        return z_BHWC + (sigma_next - sigma) * velocity(z_BHWC, timestep_B), None

    # The latents are float32 through all steps: bfloat16 would round away a step's small update.
    sigmas_S = jnp.asarray(flow_matching.sampling_sigmas(steps, flow))
    z_BHWC, _ = jax.lax.scan(step, noise_BHWC.astype(jnp.float32), (sigmas_S[:-1], sigmas_S[1:]))
    return z_BHWC
