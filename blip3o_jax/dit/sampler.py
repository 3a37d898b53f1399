"""Noise -> latents: Euler steps along the velocity, with classifier-free guidance (arXiv 2207.12598).

    v = v_null + g (v_condition - v_null)

B batch, T condition tokens, C channels (of the condition or of the latents), S steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from blip3o_jax.config import FlowConfig
from blip3o_jax.dit import flow as flow_matching
from blip3o_jax.dit.sana import SanaTransformer


def sample(
    dit: SanaTransformer,
    condition_BTC: jax.Array,
    null_BTC: jax.Array,
    noise_BHWC: jax.Array,
    *,
    steps: int,
    guidance: float,
    flow: FlowConfig,
) -> jax.Array:
    """Latents [B, H, W, C], float32, from noise ~ N(0, I), in one loop over the steps; to be called under `jax.jit`.

    `null_BTC` is the unconditional branch: [B or 1, any number of tokens, C]; a leading 1 serves every row, and where all its
    tokens are equal one of them is enough. `steps`, `guidance` and `flow` are Python values; guidance 1.0 leaves the
    unconditional branch out.
    """
    return euler(guided_velocity(dit, condition_BTC, null_BTC, guidance), noise_BHWC, steps=steps, flow=flow)


def euler(
    velocity: Callable[[jax.Array, jax.Array], jax.Array], noise_BHWC: jax.Array, *, steps: int, flow: FlowConfig
) -> jax.Array:
    """Euler's method along `velocity(latents, timestep_B)`; see `sample`."""

    def step(z_BHWC: jax.Array, sigma_pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, sigma_next = sigma_pair
        timestep_B = jnp.broadcast_to(sigma * flow.num_train_timesteps, z_BHWC.shape[:1])
        return z_BHWC + (sigma_next - sigma) * velocity(z_BHWC, timestep_B), None

    sigmas_S = jnp.asarray(flow_matching.sampling_sigmas(steps, flow))
    z_BHWC, _ = jax.lax.scan(step, noise_BHWC.astype(jnp.float32), (sigmas_S[:-1], sigmas_S[1:]))
    return z_BHWC


def guided_velocity(
    dit: SanaTransformer, condition_BTC: jax.Array, null_BTC: jax.Array, guidance: float
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(latents [B, H, W, C], timesteps [B]) -> velocity, float32, with what does not depend on them done once. Arguments as of
    `sample`."""
    # The branches differ in their number of condition tokens, so each is a call of its own: padding the null branch to T
    # and masking would spend the cross-attention of T tokens on it. Everything else is the same work either way.
    context = dit.prepare(condition_BTC)
    null = dit.prepare(null_BTC) if guidance != 1.0 else None

    def velocity(z_BHWC: jax.Array, timestep_B: jax.Array) -> jax.Array:
        v_BHWC = dit.velocity(z_BHWC, timestep_B, context).astype(jnp.float32)
        if null is None:
            return v_BHWC
        v_null_BHWC = dit.velocity(z_BHWC, timestep_B, null).astype(jnp.float32)
        return v_null_BHWC + guidance * (v_BHWC - v_null_BHWC)

    return velocity
